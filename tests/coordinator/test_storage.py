"""The database: its schema, what freezes, what is acknowledged once, what is erased."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from foedus_coordinator import figures
from foedus_coordinator.database import SCHEMA_VERSION
from foedus_coordinator.storage import Storage, open_storage
from foedus_coordinator.tables import messages, metadata
from foedus_protocols.errors import StateError
from foedus_protocols.messages import Scores
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

A, B = "a" * 64, "b" * 64


@pytest.fixture
def storage(tmp_path: Path) -> Any:
    opened = open_storage(f"sqlite:///{tmp_path / 'test.db'}")
    opened.add_run("r", charter_digest=A, operator_signature="0" * 128, base_config=b"{}", orgs=["x", "y"], files=[A])
    opened.add_round("r", 1, deadline=1.0, start_digest=A, history_digest=B)
    yield opened
    opened.close()


def accept(storage: Storage, org: str, digest: str = A, number: int = 1) -> bytes:
    return storage.accept_vector(
        run="r", number=number, org=org, digest=digest, size=10, receipt=lambda verdict: verdict.encode()
    )


def test_the_migrations_build_exactly_the_tables(storage: Storage) -> None:
    with storage.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_sqlite_is_as_durable_as_promised(storage: Storage) -> None:
    with storage.engine.connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 2  # FULL


def test_an_errors_text_holds_no_values(storage: Storage) -> None:
    add = messages.insert().values(digest="d", run="r", answer=b"scores of somebody")
    with pytest.raises(SQLAlchemyError) as error, storage.write() as connection:
        connection.execute(add)
    assert "somebody" not in str(error.value)


def test_a_database_of_a_newer_version_is_refused(storage: Storage, tmp_path: Path) -> None:
    with storage.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StateError, match=f"version {SCHEMA_VERSION}, found 9999"):
        open_storage(f"sqlite:///{tmp_path / 'test.db'}")


def test_a_run_of_the_same_name_is_refused(storage: Storage) -> None:
    with pytest.raises(StateError, match="r exists"):
        storage.add_run("r", charter_digest=A, operator_signature="", base_config=b"", orgs=["x"], files=[])
    with pytest.raises(StateError, match="none named 'other'"):
        storage.run("other")


def test_vectors_before_the_freeze_are_included_and_later_ones_late(storage: Storage) -> None:
    assert accept(storage, "x") == b"included"
    assert storage.freeze("r", 1, at_least=2, short=None) is False
    assert storage.round("r", 1).state == "offered"
    assert storage.freeze("r", 1, at_least=1, short=None) is True
    assert accept(storage, "y", B) == b"late"
    assert storage.round("r", 1).survivors == ("x",)
    # Once frozen the set never changes, whatever is asked.
    assert storage.freeze("r", 1, at_least=2, short="short") is True
    assert storage.round("r", 1).survivors == ("x",)


def test_a_short_round_fails_where_that_is_asked(storage: Storage) -> None:
    accept(storage, "x")
    assert storage.freeze("r", 1, at_least=2, short="no vector from y") is True
    assert (storage.round("r", 1).state, storage.round("r", 1).reason) == ("failed", "no vector from y")


def test_a_receipt_is_given_once(storage: Storage) -> None:
    first = accept(storage, "x")
    storage.freeze("r", 1, at_least=1, short=None)
    assert accept(storage, "x") == first == b"included"
    with pytest.raises(StateError, match="one round has one vector"):
        accept(storage, "x", B)
    with storage.read() as connection:
        assert figures.bytes_of(connection, "r") == (10, 0)


def test_every_included_receipt_is_in_the_frozen_set_under_concurrency(storage: Storage) -> None:
    """Vectors arrive in threads while the round freezes; included and survivors must be the same set."""
    orgs = [f"org-{number}" for number in range(24)]
    given: dict[str, bytes] = {}
    start = threading.Barrier(len(orgs) + 1)

    def push(org: str) -> None:
        start.wait()
        given[org] = accept(storage, org, digest=f"{orgs.index(org):064x}")

    threads = [threading.Thread(target=push, args=(org,)) for org in orgs]
    for thread in threads:
        thread.start()
    start.wait()
    while not storage.freeze("r", 1, at_least=5, short=None):
        pass
    for thread in threads:
        thread.join()
    included = {org for org, verdict in given.items() if verdict == b"included"}
    assert set(storage.round("r", 1).survivors) == included
    assert len(included) >= 5


def test_erasing_spares_a_file_that_another_round_needs(storage: Storage) -> None:
    storage.add_round("r", 2, deadline=1.0, start_digest=A, history_digest=B)
    accept(storage, "x", A)
    accept(storage, "y", B)
    accept(storage, "x", A, number=2)
    erased: list[str] = []
    storage.erase_vectors("r", 1, erased.append)
    assert erased == [B]
    storage.erase_vectors("r", 2, erased.append)
    assert erased == [B, A]
    storage.erase_vectors("r", 2, erased.append)
    assert erased == [B, A]


def test_files_are_for_participants_or_for_everybody(storage: Storage) -> None:
    with storage.write() as connection:
        figures.publish(connection, B)
        figures.publish(connection, B)
    with storage.read() as connection:
        assert figures.run_of_file(connection, A, "x") == "r"
        assert figures.run_of_file(connection, A, "stranger") is None
        assert figures.run_of_file(connection, B, "stranger") == ""
        assert figures.run_of_file(connection, "c" * 64, "x") is None


def test_the_first_report_of_a_score_stands(storage: Storage) -> None:
    with storage.write() as connection:
        figures.add_scores(connection, "r", 0, "x", Scores(loss_sum=3.0, tokens=2, units=1))
        figures.add_scores(connection, "r", 0, "x", Scores(loss_sum=9.0, tokens=2, units=1))
    with storage.read() as connection:
        assert figures.scores_of(connection, "r")[0]["x"].loss_sum == 3.0


def test_a_resumed_phase_adds_up(storage: Storage) -> None:
    with storage.write() as connection:
        figures.add_seconds(connection, "r", 1, "train", 1.5)
        figures.add_seconds(connection, "r", 1, "train", 0.5)
    with storage.read() as connection:
        assert figures.seconds_of(connection, "r") == {1: {"train": 2.0}}


def test_a_failed_write_changes_nothing_and_wakes_nobody(storage: Storage) -> None:
    before = storage.generation

    def fail() -> None:
        with storage.write() as connection:
            figures.add_seconds(connection, "r", 1, "train", 1.0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert storage.generation == before
    with storage.read() as connection:
        assert figures.seconds_of(connection, "r") == {}
