"""The ledger's file over the years: older formats, torn and edited files, disks that fail, clocks that jump."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from foedus_client.chain import FORMAT
from foedus_client.ledger import Ledger
from foedus_client.restoring import state_spent
from foedus_protocols import accounting
from foedus_protocols.accounting import Event
from foedus_protocols.canonical import digest, parse_canonical
from foedus_protocols.charter import less_slack
from foedus_protocols.errors import BudgetExhausted, StateError, VerificationError
from foedus_protocols.files import DiskTrouble
from support.ledgers import charged

OLD = Path(__file__).parent.parent / "vectors" / "ledger-0001.db"
ONE = Event(noise_multiplier=2.0, sampling_prob=0.25, steps=1)
ALL = Event(noise_multiplier=2.0, sampling_prob=0.25, steps=4)
DELTA = 1e-5
LATER = 2_000_000_000


def name(letter: str) -> str:
    """A charter's digest."""
    return letter * 64


class Clock:
    """Turned by the test."""

    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """A ledger with an open charter of four rounds, one of them spent. The accountant has tests of its own."""
    monkeypatch.setattr(accounting, "epsilon", lambda events, delta: 7.9)
    monkeypatch.setattr(accounting, "filter_order", lambda events, *, epsilon_cap, delta: 8.0)
    made = Ledger(tmp_path / "ledger.db", clock=clock)
    made.open_namespace("patients", unit="patient")
    admit(made, "a")
    made.commit(made.reserve("patients", name("a"), "run-1", 1, ONE, name("f")), {"verdict": "included"})
    return made


def admit(ledger: Ledger, charter: str, *, expires: int = LATER, cap: float = 20.0) -> None:
    ledger.admit("patients", name(charter), [ALL], DELTA, cap, expires=expires, sign=lambda: "signature")


def user_version(path: Path) -> int:
    connection = sqlite3.connect(path)
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    connection.close()
    return int(found)


# --- Formats ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A ledger that the first version wrote: two charters of patients, one in mode none of matters."""
    path = Path(shutil.copy(OLD, tmp_path / "ledger.db"))
    assert user_version(path) == 1
    return path


def test_a_ledger_of_format_1_goes_on_with_all_that_it_holds(old: Path) -> None:
    before = Ledger(old, read_only=True).export()
    ledger = Ledger(old)
    assert user_version(old) == ledger.format == FORMAT == 2
    assert ledger.export() == before
    assert ledger.spent("patients") == (Event(noise_multiplier=2.0, sampling_prob=0.25, steps=5),)
    assert [one.sequence for one in ledger.entries("matters")] == [0, 1, 2]
    ledger.reserve("patients", name("b"), "second-bbbb", 2, ONE, name("d"))
    with pytest.raises(StateError, match="spent once"):
        ledger.reserve("patients", name("b"), "second-bbbb", 1, ONE, name("d"))
    state_spent(ledger, "matters", [ONE], runs=["x"], delta=DELTA, cap=8.0)
    assert Ledger(old).spent("matters") == (ONE,)


def test_looking_at_an_old_file_leaves_it_as_it_is(old: Path) -> None:
    before = old.read_bytes()
    assert Ledger(old, read_only=True).format == 1
    assert old.read_bytes() == before


def test_a_broken_old_file_is_not_migrated(old: Path) -> None:
    connection = sqlite3.connect(old)
    connection.execute("DROP TRIGGER entries_are_not_removed")
    connection.execute("DELETE FROM entries WHERE namespace = 'patients' AND sequence = 3")
    connection.commit()
    connection.close()
    with pytest.raises(VerificationError, match="entry 4 of namespace 'patients'"):
        Ledger(old)
    assert user_version(old) == 1


def test_a_newer_format_is_refused_with_what_to_update(ledger: Ledger, tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "ledger.db")
    connection.execute(f"PRAGMA user_version = {FORMAT + 1}")
    connection.close()
    with pytest.raises(StateError, match=f"got {FORMAT + 1}: a newer Foedus wrote it, update Foedus here"):
        Ledger(tmp_path / "ledger.db")


def test_a_database_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE letters (text TEXT)")
    connection.commit()
    connection.close()
    for read_only in (True, False):
        with pytest.raises(StateError, match="another or an empty database"):
            Ledger(path, read_only=read_only)
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT name FROM sqlite_schema").fetchall() == [("letters",)]
    connection.close()


# --- Copies ----------------------------------------------------------------------------------------------------------


def test_a_backup_is_one_private_file_that_verifies_and_overwrites_nothing(ledger: Ledger, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    ledger.backup(copy)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("copy.db")] == ["copy.db"]
    assert Ledger(copy, read_only=True).export() == ledger.export()
    before = copy.read_bytes()
    with pytest.raises(StateError, match="there is one"):
        ledger.backup(copy)
    assert copy.read_bytes() == before


def test_a_read_only_ledger_cannot_be_written(ledger: Ledger, tmp_path: Path) -> None:
    looking = Ledger(tmp_path / "ledger.db", read_only=True)
    with pytest.raises(DiskTrouble):
        looking.reserve("patients", name("a"), "run-1", 2, ONE, name("e"))
    assert len(ledger.spent("patients")) == 1
    with pytest.raises(StateError, match="no such file"):
        Ledger(tmp_path / "none.db", read_only=True)
    assert not (tmp_path / "none.db").exists()


def test_an_export_holds_every_entry_and_chains_by_digest(ledger: Ledger) -> None:
    lines = ledger.export()
    assert [digest(line) for line in lines] == [entry.digest for entry in ledger.entries("patients")]
    assert [parse_canonical(line)["previous"] for line in lines[1:]] == [digest(line) for line in lines[:-1]]


# --- Torn files ------------------------------------------------------------------------------------------------------


def whole(path: Path) -> bytes:
    """The ledger's bytes in one file, without a journal."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.execute("PRAGMA journal_mode = DELETE")
    connection.close()
    return path.read_bytes()


def test_a_truncated_file_is_refused_whole_or_not_at_all(ledger: Ledger, tmp_path: Path) -> None:
    data = whole(tmp_path / "ledger.db")
    torn = tmp_path / "torn.db"
    for length in (len(data) - 1, len(data) - 4096, len(data) // 2, 5000, 4096, 1000, 100, 16):
        torn.write_bytes(data[:length])
        with pytest.raises((StateError, VerificationError), match=r"ledger.*torn\.db"):
            Ledger(torn)


def said(path: Path) -> list[bytes] | str:
    """A ledger's entries, or what its refusal says."""
    try:
        return Ledger(path, read_only=True).export()
    except (StateError, VerificationError) as error:
        return str(error)


def test_flipped_bytes_never_change_what_was_spent(ledger: Ledger, tmp_path: Path) -> None:
    """One byte in each stretch of the file is flipped: it is refused, or it says exactly the same."""
    data = whole(tmp_path / "ledger.db")
    expected, torn, refused = ledger.export(), tmp_path / "torn.db", 0
    for place in range(0, len(data), 41):
        torn.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        found = said(torn)
        refused += isinstance(found, str)
        assert found == expected or "torn.db" in found
    assert refused > 20


def test_an_index_that_hides_a_reservation_is_found(ledger: Ledger, tmp_path: Path) -> None:
    """A reservation is looked up by the index: a row that it misses would be spent again."""
    path = tmp_path / "ledger.db"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA writable_schema = ON")
    connection.execute("UPDATE sqlite_schema SET rootpage = 0, sql = NULL WHERE 0")
    connection.execute(
        "UPDATE sqlite_schema SET sql = 'CREATE INDEX entries_by_charter ON entries (namespace)' "
        "WHERE name = 'entries_by_charter'"
    )
    connection.commit()
    connection.close()
    with pytest.raises(StateError, match="torn or damaged"):
        Ledger(path)


def test_a_changed_entry_is_named_by_file_namespace_and_place(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    connection = sqlite3.connect(path)
    connection.execute("DROP TRIGGER entries_are_not_changed")
    connection.execute("UPDATE entries SET content = CAST('{\"steps\":0}' AS BLOB) WHERE sequence = 2")
    connection.commit()
    connection.close()
    with pytest.raises(VerificationError, match=r"entry 2 of namespace 'patients' in .*ledger\.db"):
        Ledger(path)


# --- Disks -----------------------------------------------------------------------------------------------------------


@contextmanager
def full_disk(at: int) -> Iterator[None]:
    """No file of this process may grow beyond `at` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_on_a_full_disk_nothing_is_reserved_half_and_later_everything_is(ledger: Ledger, tmp_path: Path) -> None:
    before = ledger.export()
    for place in (0, 512, 4096, 6000, 8192):
        with full_disk(place), pytest.raises(DiskTrouble):
            ledger.reserve("patients", name("a"), "run-1", 2, ONE, name("e"))
        assert ledger.export() == before
    with full_disk(4096), pytest.raises(DiskTrouble):
        ledger.backup(tmp_path / "copy.db")
    assert not list(tmp_path.glob("copy.db*"))
    ledger.reserve("patients", name("a"), "run-1", 2, ONE, name("e"))
    assert sum(event.steps for event in ledger.spent("patients")) == 2
    Ledger(tmp_path / "ledger.db")


READ_ONLY = """
import os, pathlib, sys
path = pathlib.Path(sys.argv[1])
from foedus_client.ledger import Ledger
from foedus_protocols.accounting import Event
from foedus_protocols.errors import StateError
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)  # Permissions do not bind root.
try:
    event = Event(noise_multiplier=2.0, sampling_prob=0.25, steps=1)
    Ledger(path).reserve("patients", "a" * 64, "run-1", 2, event, "e" * 64)
    print("reserved")
except StateError as error:
    print("StateError", error)
print(len(Ledger(path, read_only=True).export()))
"""


def test_on_a_read_only_disk_nothing_is_reserved_and_the_ledger_can_be_read(tmp_path: Path, ledger: Ledger) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    ledger.backup(folder / "ledger.db")
    (folder / "ledger.db").chmod(0o444)
    folder.chmod(0o555)
    # Under xdist pytest's own folders lie one deeper; all of them are ours to open.
    for parent in [tmp_path, *tmp_path.parents]:
        if parent.stat().st_uid == os.geteuid() and parent.stat().st_mode & 0o055 != 0o055 and len(parent.parts) > 2:
            parent.chmod(parent.stat().st_mode | 0o055)
    done = subprocess.run(
        [sys.executable, "-c", READ_ONLY, str(folder / "ledger.db")], capture_output=True, text=True, check=False
    )
    folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith("StateError expected")
    assert "read-only" in said[0] or "cannot be opened" in said[0]
    assert said[1] == str(len(ledger.export()))


def test_a_ledger_that_vanishes_under_a_running_daemon_stays_away(ledger: Ledger, tmp_path: Path) -> None:
    for trace in tmp_path.glob("ledger.db*"):
        trace.unlink()
    with pytest.raises(DiskTrouble):
        ledger.reserve("patients", name("a"), "run-1", 2, ONE, name("e"))
    assert not list(tmp_path.glob("ledger.db*"))


def test_a_death_between_append_and_commit_leaves_nothing(ledger: Ledger, tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys\n"
        "from foedus_client.ledger import Ledger\n"
        "ledger = Ledger(pathlib.Path(sys.argv[1]))\n"
        "with ledger.transaction() as transaction:\n"
        "    body, charter = {'event': None, 'words': 'x'}, 'a' * 64\n"
        "    transaction.append('patients', 'reserve', body, charter=charter, run='r', round=2)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    before = ledger.export()
    path = tmp_path / "ledger.db"
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False, env=os.environ)
    assert done.returncode == -9
    assert Ledger(path).export() == before


# --- Clocks ----------------------------------------------------------------------------------------------------------


def test_a_clock_that_jumps_forward_frees_and_one_set_back_revives_nothing(ledger: Ledger, clock: Clock) -> None:
    admit(ledger, "b", expires=2_000)
    clock.now = 5e9
    with pytest.raises(StateError, match="expired"):
        ledger.reserve("patients", name("b"), "run-2", 1, ONE, name("e"))
    admit(ledger, "c", expires=2**40)
    clock.now = 1_500.0
    for charter in "ab":
        with pytest.raises(StateError, match="was left"):
            ledger.reserve("patients", name(charter), "run-2", 1, ONE, name("e"))
    ledger.reserve("patients", name("c"), "run-3", 1, ONE, name("e"))
    ledger.verify_chain()
    times = [json.loads(line)["time"] for line in ledger.export()]
    assert times != sorted(times)  # The order is that of the chain, whatever the clock said.


def test_a_clock_set_back_before_the_start_of_time_spends_as_usual(ledger: Ledger, clock: Clock) -> None:
    clock.now = -1e9
    ledger.reserve("patients", name("a"), "run-1", 2, ONE, name("e"))
    assert sum(event.steps for event in ledger.spent("patients")) == 2


# --- What a person states --------------------------------------------------------------------------------------------


def test_stated_spending_counts_for_ever_and_no_charter_after_it_is_a_first_one(tmp_path: Path, clock: Clock) -> None:
    ledger = Ledger(tmp_path / "ledger.db", clock=clock)
    ledger.open_namespace("patients", unit="patient")
    alone = accounting.epsilon([ALL], less_slack(DELTA, 0.0))
    state_spent(ledger, "patients", [ALL], runs=["lost-1"], delta=DELTA, cap=8.0)
    assert ledger.spent("patients") == charged(ledger, "patients") == (ALL,)
    stated = ledger.epsilon_spent("patients", DELTA)
    assert stated > alone  # By the filter: nobody knows in the light of what it was chosen.
    with pytest.raises(BudgetExhausted, match="rdp"):
        admit(ledger, "a", cap=alone)
    judged = ledger.require_fits("patients", name("a"), [ALL], DELTA, 20.0)
    (entry,) = (one for one in ledger.entries("patients") if one.kind == "state")
    expected = accounting.epsilon_rdp([ALL, ALL], less_slack(DELTA, 0.0), order=entry.body["filter_order"])
    assert (judged.accountant, judged.filter_order) == ("rdp", entry.body["filter_order"])
    assert expected < judged.epsilon < expected + 1e-6  # The noise table's slack of the longest vector is taken off.
    admit(ledger, "a")
    ledger.release_allotment(name("a"))
    assert Ledger(tmp_path / "ledger.db").epsilon_spent("patients", DELTA) == stated


def test_a_statement_of_nothing_leaves_the_first_charter_first(ledger: Ledger, tmp_path: Path) -> None:
    fresh = Ledger(tmp_path / "fresh.db")
    fresh.open_namespace("patients", unit="patient")
    state_spent(fresh, "patients", [], runs=["lost-1"], delta=DELTA, cap=8.0)
    assert fresh.require_fits("patients", name("a"), [ALL], DELTA, 8.0).accountant == "pld"
    assert fresh.epsilon_spent("patients", DELTA) == 0.0


def test_a_statement_beside_charters_keeps_the_order_that_the_first_one_fixed(ledger: Ledger) -> None:
    state_spent(ledger, "patients", [ALL], runs=["lost-1"], delta=DELTA, cap=8.0)
    assert ledger.require_fits("patients", name("b"), [ALL], DELTA, 20.0).filter_order == 8.0


def test_a_statement_keeps_that_order_also_where_the_first_charter_ends_unspent(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it ends unspent may follow from results, which an order must not."""
    monkeypatch.setattr(accounting, "epsilon", lambda events, delta: 7.9)
    monkeypatch.setattr(accounting, "filter_order", lambda events, *, epsilon_cap, delta: 8.0)
    ledger = Ledger(tmp_path / "ledger.db", clock=clock)
    ledger.open_namespace("patients", unit="patient")
    admit(ledger, "a")
    state_spent(ledger, "patients", [ALL], runs=["lost-1"], delta=DELTA, cap=8.0)
    assert ledger.require_fits("patients", name("b"), [ALL], DELTA, 20.0).filter_order == 8.0
    ledger.release_allotment(name("a"), why="left")
    assert ledger.require_fits("patients", name("b"), [ALL], DELTA, 20.0).filter_order == 8.0


@pytest.mark.parametrize(("cap", "delta"), [(0.5, 1e-6), (8.0, 1e-5), (50.0, 1e-3)])
def test_the_stated_order_is_the_best_one_for_a_gaussian_that_costs_the_cap(cap: float, delta: float) -> None:
    from math import log

    from foedus_client.allotments import stated_order

    order = stated_order(cap, delta)
    rho = log(1 / delta) / (order - 1) ** 2
    cost = [rho * one + log(1 / delta) / (one - 1) for one in (order * 0.99 + 0.01, order, order * 1.01)]
    assert cost[1] == pytest.approx(cap)
    assert min(cost) == cost[1]


# --- Two transactions ------------------------------------------------------------------------------------------------


def test_the_accountant_is_asked_outside_the_transaction_and_again_where_somebody_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.db"
    ledger = Ledger(path)
    ledger.open_namespace("patients", unit="patient")
    asked = []

    def slow(events: object, delta: float) -> float:
        asked.append(events)
        if len(asked) == 1:  # The file is free meanwhile: another process signs a charter first.
            admit(Ledger(path), "b", cap=20.0)
        return 7.9

    monkeypatch.setattr(accounting, "epsilon", slow)
    monkeypatch.setattr(accounting, "filter_order", lambda events, *, epsilon_cap, delta: 8.0)
    admitted = ledger.admit("patients", name("a"), [ALL], DELTA, 20.0, expires=LATER, sign=lambda: "signature")
    assert admitted.accountant == "rdp"
    assert [one.charter for one in ledger.entries("patients")] == [None, name("b"), name("a")]
