"""The privacy ledger: admission, reservation, composition across runs and processes, and its chain."""

from __future__ import annotations

import json
import math
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from foedus_client.ledger import Admission, Ledger
from foedus_protocols import accounting
from foedus_protocols.accounting import Event
from foedus_protocols.canonical import canonical_bytes, digest
from foedus_protocols.charter import less_slack
from foedus_protocols.errors import BudgetExhausted, StateError, VerificationError
from support.ledgers import charged, head

DELTA = 1e-5
ROUNDS = 4
ONE = Event(noise_multiplier=2.0, sampling_prob=0.25, steps=1)
ALL = Event(noise_multiplier=2.0, sampling_prob=0.25, steps=ROUNDS)
ONE_CHARTER = accounting.epsilon([ALL], less_slack(DELTA, 0.0))
LATER = 2_000_000_000


def name(letter: str) -> str:
    """A charter's digest."""
    return letter * 64


class Home:
    """A ledger whose clock the test turns, and a count of the signatures that were made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 1_000.0
        self.signatures = 0
        self.open()
        self.ledger.open_namespace("patients", unit="patient")

    def open(self) -> None:
        """Open the file again, as a fresh process would."""
        self.ledger = Ledger(self.path, clock=lambda: self.now)

    def sign(self) -> str:
        self.signatures += 1
        return f"signature {self.signatures}"

    def admit(self, charter: str, cap: float, *, events: tuple[Event, ...] = (ALL,), **terms: Any) -> Admission:
        terms = {"expires": LATER, "sign": self.sign} | terms
        return self.ledger.admit("patients", name(charter), events, DELTA, cap, **terms)

    def reserve(self, charter: str, number: int, words: str = "f", run: str = "run-1") -> Any:
        return self.ledger.reserve("patients", name(charter), run, number, ONE, name(words))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "ledger.db")


# --- Admission -------------------------------------------------------------------------------------------------------


def test_epsilon_equal_to_the_cap_is_admitted_and_runs_to_its_last_round(home: Home) -> None:
    admitted = home.admit("a", ONE_CHARTER)
    assert (admitted.epsilon, admitted.accountant) == (ONE_CHARTER, "pld")
    for number in range(1, ROUNDS + 1):
        home.ledger.require_allotted("patients", name("a"), ONE)
        home.ledger.commit(home.reserve("a", number), {"verdict": "included"})
    assert home.ledger.spent("patients") == (ALL,)
    assert home.ledger.epsilon_spent("patients", DELTA) == ONE_CHARTER
    with pytest.raises(BudgetExhausted):
        home.ledger.require_allotted("patients", name("a"), ONE)
    with pytest.raises(BudgetExhausted):
        home.reserve("a", ROUNDS + 1)


def test_a_hair_above_the_cap_is_refused_and_leaves_nothing(home: Home) -> None:
    before = head(home.ledger, "patients")
    with pytest.raises(BudgetExhausted, match="epsilon_cap") as caught:
        home.admit("a", ONE_CHARTER - 1e-9)
    assert caught.value.step == 10
    assert home.signatures == 0
    assert head(home.ledger, "patients") == before
    assert home.ledger.admission(name("a")) is None


def test_the_noise_tables_slack_is_taken_off_delta(home: Home) -> None:
    with pytest.raises(BudgetExhausted):
        home.admit("a", ONE_CHARTER, delta_slack=DELTA / 10)
    admitted = home.admit("a", 10.0, delta_slack=DELTA / 10)
    assert admitted.epsilon == accounting.epsilon([ALL], less_slack(DELTA, DELTA / 10))


def test_all_slack_is_taken_at_the_cap_that_is_claimed_now(home: Home) -> None:
    """Slack grows with e^cap: after the cap was raised, what an earlier charter was charged is no longer enough."""
    slack = DELTA / 1e4
    home.admit("a", 5.0, delta_slack=slack)
    grown = slack * (1 + math.exp(12.0)) / (1 + math.exp(5.0))
    order = accounting.filter_order([ALL], epsilon_cap=5.0, delta=less_slack(DELTA, slack))
    admitted = home.admit("b", 12.0, delta_slack=slack)
    assert admitted.epsilon == pytest.approx(
        accounting.epsilon_rdp([ALL, ALL], less_slack(DELTA, slack + grown), order=order), rel=1e-12
    )
    assert admitted.epsilon > accounting.epsilon_rdp([ALL, ALL], less_slack(DELTA, 2 * slack), order=order)


def test_asking_again_returns_the_first_signature_and_allots_once(home: Home) -> None:
    first = home.admit("a", ONE_CHARTER)
    assert home.admit("a", ONE_CHARTER) == first
    home.open()
    assert home.ledger.admission(name("a")) == first
    assert home.signatures == 1
    assert charged(home.ledger, "patients") == (ALL,)


def test_a_failing_signature_allots_nothing(home: Home) -> None:
    def no_key() -> str:
        raise VerificationError("no key")

    with pytest.raises(VerificationError):
        home.admit("a", ONE_CHARTER, sign=no_key)
    assert charged(home.ledger, "patients") == ()


def test_open_allotments_of_other_charters_count_before_anything_is_spent(home: Home) -> None:
    home.admit("a", ONE_CHARTER)
    with pytest.raises(BudgetExhausted, match="rdp"):
        home.admit("b", ONE_CHARTER)


def test_later_charters_are_judged_by_the_filter_over_all_events_at_the_first_ones_order(home: Home) -> None:
    cap = 20.0
    home.admit("a", cap)
    order = accounting.filter_order([ALL], epsilon_cap=cap, delta=less_slack(DELTA, 0.0))
    second = home.admit("b", cap)
    both = accounting.epsilon_rdp([ALL, ALL], less_slack(DELTA, 0.0), order=order)
    assert (second.epsilon, second.accountant) == (both, "rdp")
    # The filter is looser than the PLD of the same events, never tighter.
    assert both > accounting.epsilon([ALL, ALL], less_slack(DELTA, 0.0))
    third = home.admit("c", cap)
    assert third.epsilon == accounting.epsilon_rdp([ALL] * 3, less_slack(DELTA, 0.0), order=order)


def test_composes_across_runs_and_restarts_until_the_cap(home: Home) -> None:
    cap = 3 * ONE_CHARTER
    admitted = 0
    for letter in "abcdef0123456789":
        try:
            home.admit(letter, cap)
        except BudgetExhausted:
            break
        admitted += 1
        for number in range(1, ROUNDS + 1):
            home.reserve(letter, number)
        home.ledger.release_allotment(name(letter))
        home.open()
    assert 2 <= admitted < 16
    assert home.ledger.spent("patients") == (Event(noise_multiplier=2.0, sampling_prob=0.25, steps=ROUNDS * admitted),)
    assert ONE_CHARTER < home.ledger.epsilon_spent("patients", DELTA) <= cap


def test_release_frees_what_was_not_spent(home: Home) -> None:
    home.admit("a", ONE_CHARTER)
    home.ledger.release_allotment(name("a"))
    home.ledger.release_allotment(name("a"))
    home.ledger.release_allotment(name("e"))
    assert charged(home.ledger, "patients") == ()
    # Nothing was released to anybody, so the next charter is a first one again.
    assert home.admit("b", ONE_CHARTER).accountant == "pld"


def test_release_keeps_what_was_spent(home: Home) -> None:
    home.admit("a", ONE_CHARTER)
    home.reserve("a", 1)
    home.ledger.release_allotment(name("a"))
    assert charged(home.ledger, "patients") == (ONE,)
    with pytest.raises(BudgetExhausted):
        home.admit("b", ONE_CHARTER)
    with pytest.raises(StateError, match="was left"):
        home.reserve("a", 2)


def test_a_charter_that_was_left_unspent_can_be_signed_again_and_a_spent_one_cannot(home: Home) -> None:
    home.admit("a", ONE_CHARTER)
    home.ledger.release_allotment(name("a"))
    home.admit("a", ONE_CHARTER)
    home.reserve("a", 1)
    home.ledger.release_allotment(name("a"))
    with pytest.raises(StateError, match="never left"):
        home.admit("a", ONE_CHARTER)


def test_expired_charters_are_freed_for_good(home: Home) -> None:
    home.admit("a", ONE_CHARTER, expires=2_000)
    home.now = 2_001.0
    with pytest.raises(StateError, match="expired"):
        home.reserve("a", 1)
    home.ledger.require_fits("patients", name("b"), (ALL,), DELTA, ONE_CHARTER)
    home.admit("b", ONE_CHARTER)
    home.now = 1_500.0  # A clock that is set back does not bring the first one back beside the second.
    with pytest.raises(StateError, match="was left"):
        home.reserve("a", 1)


def test_require_fits_answers_as_admit_does_and_writes_nothing(home: Home) -> None:
    ask: Callable[[str, float], None] = lambda letter, cap: home.ledger.require_fits(  # noqa: E731
        "patients", name(letter), (ALL,), DELTA, cap
    )
    before = head(home.ledger, "patients")
    ask("a", ONE_CHARTER)
    with pytest.raises(BudgetExhausted):
        ask("a", ONE_CHARTER - 1e-9)
    assert head(home.ledger, "patients") == before
    home.admit("a", ONE_CHARTER)
    ask("a", ONE_CHARTER)  # Already admitted: it does not count against itself.
    with pytest.raises(BudgetExhausted):
        ask("b", ONE_CHARTER)


def test_mode_none_reserves_words_and_spends_nothing(home: Home) -> None:
    admitted = home.admit("a", 1e-9, events=())
    assert (admitted.epsilon, admitted.accountant) == (0.0, "none")
    entry = home.ledger.reserve("patients", name("a"), "run-1", 1, None, name("f"))
    assert home.ledger.reservation(name("a"), "run-1", 1) == entry
    assert home.ledger.spent("patients") == ()
    assert home.admit("b", ONE_CHARTER).accountant == "pld"
    with pytest.raises(BudgetExhausted):
        home.ledger.reserve("patients", name("b"), "run-2", 1, None, name("f"))
    with pytest.raises(BudgetExhausted):
        home.reserve("a", 2)


def test_namespaces_are_separate_and_belong_to_one_unit(home: Home) -> None:
    home.ledger.open_namespace("matters", unit="matter")
    home.ledger.open_namespace("matters", unit="matter")
    assert home.ledger.namespaces() == ["matters", "patients"]
    home.admit("a", ONE_CHARTER)
    home.ledger.admit("matters", name("b"), (ALL,), DELTA, ONE_CHARTER, expires=LATER, sign=home.sign)
    with pytest.raises(StateError, match="'matter'"):
        home.ledger.open_namespace("matters", unit="record")
    with pytest.raises(StateError, match="register"):
        home.ledger.spent("visits")


# --- Rounds ----------------------------------------------------------------------------------------------------------


def test_a_round_is_spent_once_and_only_for_its_words(home: Home) -> None:
    home.admit("a", ONE_CHARTER)
    first = home.reserve("a", 1)
    home.open()
    assert home.reserve("a", 1) == first
    assert home.ledger.reservation(name("a"), "run-1", 1) == first
    assert home.ledger.reservation(name("a"), "run-1", 2) is None
    with pytest.raises(StateError, match="spent once"):
        home.reserve("a", 1, words="e")
    assert home.ledger.spent("patients") == (ONE,)


def test_a_second_run_of_one_charter_draws_on_the_same_allotment(home: Home) -> None:
    home.admit("a", ONE_CHARTER)
    for number in range(1, ROUNDS + 1):
        home.reserve("a", number)
    with pytest.raises(BudgetExhausted):
        home.reserve("a", 1, run="run-2")


def test_an_event_that_was_not_allotted_is_not_reserved(home: Home) -> None:
    home.admit("a", ONE_CHARTER)
    for event in (
        Event(noise_multiplier=1.0, sampling_prob=0.25, steps=1),
        Event(noise_multiplier=2.0, sampling_prob=0.5, steps=1),
        Event(noise_multiplier=2.0, sampling_prob=0.25, steps=ROUNDS + 1),
    ):
        with pytest.raises(BudgetExhausted):
            home.ledger.reserve("patients", name("a"), "run-1", 1, event, name("f"))
    with pytest.raises(StateError):
        home.reserve("b", 1)


def test_commit_keeps_the_first_receipt(home: Home, tmp_path: Path) -> None:
    home.admit("a", ONE_CHARTER)
    entry = home.reserve("a", 1)
    first = home.ledger.commit(entry, {"verdict": "included"})
    assert home.ledger.commit(entry, {"verdict": "late"}) == first
    assert first.body == {"reservation": entry.digest, "receipt": {"verdict": "included"}}
    with pytest.raises(StateError, match="reservation"):
        home.ledger.commit(first, {})
    other = Home(tmp_path / "other.db")
    with pytest.raises(StateError):
        other.ledger.commit(entry, {})


# --- Two processes ---------------------------------------------------------------------------------------------------

ADMIT_SCRIPT = """
import pathlib, sys, time
from foedus_client.ledger import Ledger
from foedus_protocols.accounting import Event
from foedus_protocols.canonical import canonical_bytes, digest
from foedus_protocols.errors import BudgetExhausted
folder, letter, cap = pathlib.Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
ledger = Ledger(folder / "ledger.db")
event = Event(noise_multiplier=2.0, sampling_prob=0.25, steps=4)
(folder / letter).touch()
deadline = time.monotonic() + 60
while not (folder / "go").exists() and time.monotonic() < deadline:
    time.sleep(0.001)
try:
    ledger.admit("patients", letter * 64, [event], 1e-5, cap, expires=2_000_000_000, sign=lambda: "by " + letter)
    print("admitted")
except BudgetExhausted:
    print("refused")
"""


def test_of_two_processes_that_admit_at_once_exactly_one_is_admitted(home: Home, tmp_path: Path) -> None:
    command = [sys.executable, "-c", ADMIT_SCRIPT, str(tmp_path)]
    processes = [
        subprocess.Popen([*command, letter, repr(ONE_CHARTER)], stdout=subprocess.PIPE, text=True) for letter in "ab"
    ]
    deadline = time.monotonic() + 60
    while not all((tmp_path / letter).exists() for letter in "ab"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (tmp_path / "go").touch()
    said = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert sorted(said) == ["admitted", "refused"]
    winner = "ab"[said.index("admitted")]
    kinds = [(entry.kind, entry.charter) for entry in home.ledger.entries("patients")]
    assert kinds == [("open", None), ("allot", name(winner))]
    assert charged(home.ledger, "patients") == (ALL,)
    home.ledger.verify_chain()


# --- The chain -------------------------------------------------------------------------------------------------------


@pytest.fixture
def full(home: Home) -> Home:
    """A ledger with a life behind it."""
    home.admit("a", ONE_CHARTER, details={"unit": "patient", "l2_clip_norm": 0.15})
    home.ledger.commit(home.reserve("a", 1), {"verdict": "included"})
    home.reserve("a", 2)
    home.ledger.release_allotment(name("a"))
    home.ledger.open_namespace("matters", unit="matter")
    return home


def test_the_chain_verifies_and_the_head_names_the_newest_entry(full: Home) -> None:
    full.ledger.verify_chain()
    entries = full.ledger.entries("patients")
    assert [entry.kind for entry in entries] == ["open", "allot", "reserve", "commit", "reserve", "release"]
    assert [entry.previous for entry in entries[1:]] == [entry.digest for entry in entries[:-1]]
    assert stat.S_IMODE(full.path.stat().st_mode) == 0o600


@pytest.mark.parametrize("statement", ["UPDATE entries SET digest = 'x'", "DELETE FROM entries"])
def test_the_table_refuses_changes(full: Home, statement: str) -> None:
    connection = sqlite3.connect(full.path)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)
    connection.close()


def forge(path: Path, *statements: str) -> None:
    """Change the file as somebody with SQLite and no respect for its triggers would."""
    connection = sqlite3.connect(path)
    connection.execute("DROP TRIGGER entries_are_not_changed")
    connection.execute("DROP TRIGGER entries_are_not_removed")
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


@pytest.mark.parametrize(
    "statements",
    [
        ["DELETE FROM entries WHERE namespace = 'patients' AND sequence = 2"],
        ["UPDATE entries SET content = replace(content, '\"steps\":1', '\"steps\":0') WHERE sequence = 4"],
        ["UPDATE entries SET namespace = 'matters', sequence = 1 WHERE namespace = 'patients' AND sequence = 5"],
        ["UPDATE entries SET charter = NULL WHERE sequence = 2"],
        [
            "UPDATE entries SET sequence = 9 WHERE namespace = 'patients' AND sequence = 2",
            "UPDATE entries SET sequence = 2 WHERE namespace = 'patients' AND sequence = 4",
            "UPDATE entries SET sequence = 4 WHERE namespace = 'patients' AND sequence = 9",
        ],
    ],
    ids=["removed", "changed", "moved", "unindexed", "swapped"],
)
def test_a_forged_chain_is_found(full: Home, statements: list[str]) -> None:
    # `replace` makes text of a blob, which a STRICT table refuses: cast it back.
    forge(
        full.path,
        *(text.replace("= replace(", "= CAST(replace(").replace("0')", "0') AS BLOB)") for text in statements),
    )
    with pytest.raises(VerificationError, match="unbroken"):
        full.ledger.verify_chain()
    with pytest.raises(VerificationError, match="unbroken"):
        full.open()


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff"])
def test_an_entry_that_is_none_is_named(full: Home, content: bytes) -> None:
    forge(full.path, f"UPDATE entries SET content = X'{content.hex()}' WHERE sequence = 2")
    with pytest.raises(VerificationError, match="entry of the ledger"):
        full.open()
    with pytest.raises(VerificationError, match="entry of the ledger"):
        full.ledger.spent("patients")


def test_a_changed_entry_with_its_own_digest_put_right_is_found_by_the_next(full: Home) -> None:
    entry = full.ledger.entries("patients")[2]
    value = {field: getattr(entry, field) for field in entry.__dataclass_fields__ if field != "digest"}
    value["body"] = {"event": None, "words": name("0")}

    content = canonical_bytes(value)
    forge(
        full.path,
        f"UPDATE entries SET content = X'{content.hex()}', digest = '{digest(content)}' "
        "WHERE namespace = 'patients' AND sequence = 2",
    )
    with pytest.raises(VerificationError, match="entry 3"):
        full.ledger.verify_chain()


def test_no_epsilon_is_read_back_from_the_file(full: Home) -> None:
    """Entries keep events; the figure of an admission is for people, and the spent one is recomputed."""
    two = Event(noise_multiplier=2.0, sampling_prob=0.25, steps=2)
    expected = accounting.epsilon([two], less_slack(DELTA, 0.0))
    assert full.ledger.epsilon_spent("patients", DELTA) == expected
    body = json.dumps([dict(entry.body) for entry in full.ledger.entries("patients") if entry.kind == "reserve"])
    assert "epsilon" not in body


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(b"not a database at all, just some bytes" * 100)
    with pytest.raises(StateError, match="ledger"):
        Ledger(path)
    newer = tmp_path / "newer.db"
    connection = sqlite3.connect(newer)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StateError, match="newer Foedus"):
        Ledger(newer)
