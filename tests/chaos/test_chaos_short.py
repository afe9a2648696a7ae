"""Twenty troubles over real processes, and the harness's own parts: a judge that cannot convict proves nothing."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from chaos.invariants import Coordinator, Organisation, Verdict, judge
from chaos.troubles import draw
from chaos.witness import Evidence
from foedus_protocols.canonical import canonical_bytes

HERE = Path(__file__).parent
KILLS = 20
ORGS = ("ash", "birch", "cedar")


@pytest.mark.e2e
@pytest.mark.xdist_group("e2e")
def test_twenty_troubles_lose_nothing_and_spend_nothing_twice(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "chaos", "--kills", str(KILLS), "--folder", str(tmp_path / "chaos")],
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["kills"] == KILLS
    assert (figures["lost"], figures["double_spent"], figures["unnamed_failures"]) == (0, 0, 0)


# The troubles


def test_a_seed_decides_every_trouble_and_twenty_hold_each_kind() -> None:
    first = draw(4, KILLS, ORGS, deadline_seconds=10.0)
    assert first == draw(4, KILLS, ORGS, deadline_seconds=10.0)
    assert first != draw(5, KILLS, ORGS, deadline_seconds=10.0)
    assert {one.kind for one in first} == {"kill", "freeze", "cut", "hold", "torn", "full"}
    assert {one.part for one in first} == {"coordinator", "daemon", "worker", "everything"}
    assert all(one.seconds > 10.0 for one in first if one.kind == "freeze")
    assert draw(4, 2 * KILLS, ORGS, deadline_seconds=10.0)[:KILLS] == first


# The file layer

WRITER = """
import os, sqlite3, sys
from pathlib import Path
from foedus_protocols.files import write_durably
from foedus_protocols.store import FileStore
folder = Path(sys.argv[1])
with sqlite3.connect(folder / "some.db") as database:
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("CREATE TABLE IF NOT EXISTS t (x)")
for number in range(3):
    write_durably(folder / "file", b"%d" % number * 1000)
    database.execute("INSERT INTO t VALUES (?)", (number,))
    database.commit()
with FileStore(folder / "store").open_part("0" * 64, 100) as part:
    part.write(bytes(100))
print("lived")
"""


def faulty(folder: Path, fault: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WRITER, str(folder)],
        env=os.environ | {"PYTHONPATH": str(HERE / "faults"), "FOEDUS_FAULT": fault},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("fault", "content", "rows"),
    [
        ("die:fsync:3", "0", 1),  # Each write syncs the file and its folder: the third is the second file's.
        ("die:synced:3", "0", 1),
        ("die:commit:2", "1", 1),
        ("die:committed:2", "1", 2),
    ],
)
def test_a_process_dies_at_its_point_and_only_unsynced_bytes_are_gone(
    tmp_path: Path, fault: str, content: str, rows: int
) -> None:
    assert faulty(tmp_path, fault).returncode == -9
    assert (tmp_path / "file").read_text() == content * 1000
    with closing(sqlite3.connect(tmp_path / "some.db")) as database:
        assert database.execute("SELECT count(*) FROM t").fetchone() == (rows,)
    assert len(list(tmp_path.glob(".file.*.tmp"))) == (1 if "sync" in fault else 0)
    assert faulty(tmp_path, "").stdout == "lived\n"  # Whatever is left lying does not hinder the next start.


def test_a_chunk_is_written_by_half(tmp_path: Path) -> None:
    assert faulty(tmp_path, "die:part:1").returncode == -9
    assert (tmp_path / "store" / "parts" / f"{'0' * 64}.part").stat().st_size == 50


def test_a_full_disk_is_an_error_of_the_usual_kind_and_leaves_the_old_file(tmp_path: Path) -> None:
    done = faulty(tmp_path, "full:4:60")
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert (tmp_path / "file").read_text() == "0" * 1000


# The judge

RUN, CHARTER = "run-1", "c" * 64


class Homes:
    """A coordinator's and one organisation's home after a closed round; nothing is wrong until a test changes it."""

    def __init__(self, root: Path, charter_file: bytes) -> None:
        self.root = root
        self.words = root / "words"
        self.words.mkdir()
        self.coordinator, self.org = root / "coordinator", root / "ash"
        self.evidence = Evidence(words=self.words)
        digest = hashlib.sha256(charter_file).hexdigest()
        place = self.coordinator / "files" / digest[:2] / digest
        place.parent.mkdir(parents=True)
        place.write_bytes(charter_file)
        self.org.mkdir()
        self.charter = digest
        with closing(sqlite3.connect(self.coordinator / "coordinator.db")) as database:
            database.executescript(
                "CREATE TABLE runs (id, charter_digest, state, outcome, reason);"
                "CREATE TABLE rounds (run, number, state, survivors, sum_digest, adapter_digest, reason);"
                "CREATE TABLE vectors (run, round, org, digest, verdict);"
            )
            database.execute("INSERT INTO runs VALUES (?, ?, 'finished', 'complete', NULL)", (RUN, digest))
            row = (RUN, json.dumps(["ash"]), "5" * 64, "a" * 64)
            database.execute("INSERT INTO rounds VALUES (?, 1, 'closed', ?, ?, ?, NULL)", row)
            database.execute("INSERT INTO vectors VALUES (?, 1, 'ash', ?, 'included')", (RUN, "d" * 64))
            database.commit()
        with closing(sqlite3.connect(self.org / "client.db")) as database:
            database.executescript("CREATE TABLE departures (kind, digest); CREATE TABLE rounds (receipt);")
            database.execute("INSERT INTO departures VALUES ('vector', ?)", ("d" * 64,))
            receipt = {"run": RUN, "round": 1, "org": "ash", "digest": "d" * 64, "verdict": "included"}
            database.execute("INSERT INTO rounds VALUES (?)", (json.dumps(receipt),))
            database.commit()
        with closing(sqlite3.connect(self.org / "ledger.db")) as database:
            database.execute("CREATE TABLE entries (namespace, sequence, content, digest)")
            database.commit()
        self.reserve()

    def reserve(self, *, words: str = "d" * 64, event: dict[str, float] | None = None) -> None:
        """Append a reservation of round 1."""
        with closing(sqlite3.connect(self.org / "ledger.db")) as database:
            rows = database.execute("SELECT sequence, digest FROM entries ORDER BY sequence").fetchall()
            sequence, previous = rows[-1] if rows else (-1, "0" * 64)
            value = {
                "kind": "reserve", "charter": self.charter, "run": RUN, "round": 1, "previous": previous,
                "body": {"words": words, "event": event},
            }  # fmt: skip
            content = canonical_bytes(value)
            row = ("units", sequence + 1, content, hashlib.sha256(content).hexdigest())
            database.execute("INSERT INTO entries VALUES (?, ?, ?, ?)", row)
            database.commit()

    def change(self, statement: str) -> None:
        """Spoil the coordinator's database."""
        with closing(sqlite3.connect(self.coordinator / "coordinator.db")) as database:
            database.execute(statement)
            database.commit()

    def change_org(self, file: str, statement: str) -> None:
        """Spoil one of the organisation's."""
        with closing(sqlite3.connect(self.org / file)) as database:
            database.execute(statement)
            database.commit()

    def judge(self) -> Verdict:
        return judge(Coordinator(self.coordinator), {"ash": Organisation("ash", self.org)}, self.evidence, self.root)


@pytest.fixture
def homes(tmp_path: Path, league) -> Homes:  # type: ignore[no-untyped-def]
    charter = league.draft(privacy={"mode": "none", "rounds": 4}, seed=7)
    return Homes(tmp_path, canonical_bytes(charter.model_dump(mode="json", exclude_none=True)))


def test_what_is_in_order_is_not_convicted(homes: Homes) -> None:
    verdict = homes.judge()
    assert verdict.violations == []
    assert verdict.checked["acknowledged"] == verdict.checked["reservations"] == 1


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("DELETE FROM vectors", "lost"),
        ("UPDATE rounds SET survivors = '[]'", "lost"),
        ("""UPDATE rounds SET survivors = '["ash", "birch"]'""", "lost"),
        ("UPDATE vectors SET verdict = 'late'", "lost"),
        ("UPDATE vectors SET digest = 'e'", "double_spent"),
        ("UPDATE runs SET state = 'running'", "unnamed_failures"),
        ("UPDATE runs SET outcome = 'failed'", "unnamed_failures"),
        ("UPDATE rounds SET state = 'failed'", "unnamed_failures"),
    ],
)
def test_a_spoiled_coordinator_is_convicted(homes: Homes, statement: str, kind: str) -> None:
    homes.change(statement)
    assert getattr(homes.judge(), kind), statement


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("ledger.db", "DELETE FROM entries"),
        ("ledger.db", "UPDATE entries SET digest = 'e'"),
        ("client.db", "INSERT INTO departures VALUES ('vector', 'e')"),
    ],
)
def test_an_organisation_that_forgot_spending_is_convicted(homes: Homes, file: str, statement: str) -> None:
    homes.change_org(file, statement)
    assert homes.judge().unrecorded, statement


def test_a_round_that_was_reserved_twice_or_under_another_event_is_convicted(homes: Homes) -> None:
    homes.reserve(event={"noise_multiplier": 1.0, "sampling_prob": 1.0, "steps": 1})
    verdict = homes.judge()
    assert len(verdict.double_spent) == 1
    assert len(verdict.unrecorded) == 1


def test_an_acknowledgement_that_was_seen_and_is_gone_is_convicted(homes: Homes) -> None:
    homes.evidence.acknowledged[RUN, 2, "ash"] = "f" * 64
    assert len(homes.judge().lost) == 1


def test_a_sum_that_is_not_that_of_its_survivors_is_convicted(homes: Homes) -> None:
    coding = Coordinator(homes.coordinator).charters[RUN].coding()
    words = bytes(coding.packed_bytes)
    (homes.words / ("d" * 64)).write_bytes(words)
    assert len(homes.judge().lost) == 1
    homes.change(f"UPDATE rounds SET sum_digest = '{hashlib.sha256(words).hexdigest()}'")
    assert homes.judge().lost == []  # One vector's sum is the vector.


def test_two_results_of_one_history_are_convicted(homes: Homes) -> None:
    homes.change(
        f"INSERT INTO runs SELECT 'run-2', charter_digest, state, outcome, reason FROM runs WHERE id = '{RUN}'"
    )
    homes.change("INSERT INTO rounds SELECT 'run-2', number, state, survivors, sum_digest, 'b', reason FROM rounds")
    assert len(homes.judge().different_bits) == 1
    homes.change("UPDATE rounds SET adapter_digest = 'b'")
    assert homes.judge().different_bits == []
