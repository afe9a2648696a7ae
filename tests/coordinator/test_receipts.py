"""What an organisation is told again: every receipt of its own, in order, in pages, also those of an old database."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from cryptography import x509
from foedus_coordinator import certificates
from foedus_coordinator.receipts import page
from foedus_coordinator.storage import Storage, open_storage
from foedus_coordinator.tables import metadata
from foedus_protocols.hello import RECEIPTS_PER_HELLO
from foedus_protocols.identity import generate_signing_key, public_hex
from foedus_protocols.receipt import sign_receipt, verify_told_receipt

OPERATOR = generate_signing_key()
CHARTERS = {"one": "a" * 64, "two": "b" * 64}
OLD = Path(__file__).parent.parent / "vectors" / "coordinator-0001.db"


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    opened = open_storage(f"sqlite:///{tmp_path / 'test.db'}")
    for run, charter in CHARTERS.items():
        opened.add_run(
            run, charter_digest=charter, operator_signature="0" * 128, base_config=b"{}", orgs=["x", "y"], files=[]
        )
    yield opened
    opened.close()


def accept(storage: Storage, run: str, number: int, org: str = "x") -> None:
    digest = f"{number:064x}"
    storage.add_round(run, number, deadline=1.0, start_digest="c" * 64, history_digest="d" * 64)
    storage.accept_vector(
        run=run,
        number=number,
        org=org,
        digest=digest,
        size=10,
        receipt=lambda verdict: sign_receipt(
            OPERATOR,
            federation="test",
            run=run,
            round=number,
            org=org,
            digest=digest,
            size=10,
            verdict=verdict,
            time=1,
        ).encode(),
    )


def told(storage: Storage, org: str, start: int) -> tuple[list[tuple[str, str, int]], int]:
    with storage.read() as connection:
        found, total = page(connection, org, start)
    for one in found:
        verify_told_receipt(one.receipt, operator_key=public_hex(OPERATOR), federation="test", org=org)
    return [(one.charter, one.receipt.run, one.receipt.round) for one in found], total


def test_receipts_are_told_in_the_order_in_which_they_were_given_with_their_charters(storage: Storage) -> None:
    accept(storage, "two", 1)
    accept(storage, "one", 1, org="y")
    accept(storage, "one", 1)
    accept(storage, "two", 2)
    accept(storage, "two", 2)  # Sent a second time: one receipt.
    assert told(storage, "x", 0) == ([("b" * 64, "two", 1), ("a" * 64, "one", 1), ("b" * 64, "two", 2)], 3)
    assert told(storage, "x", 2) == ([("b" * 64, "two", 2)], 3)
    assert told(storage, "y", 0) == ([("a" * 64, "one", 1)], 1)


def test_nothing_is_told_beyond_the_last_and_to_strangers(storage: Storage) -> None:
    accept(storage, "one", 1)
    assert told(storage, "x", 1) == ([], 1)
    assert told(storage, "x", 9) == ([], 1)
    assert told(storage, "stranger", 0) == ([], 0)


def test_pages_together_tell_everything_once(storage: Storage) -> None:
    count = 2 * RECEIPTS_PER_HELLO + 3
    for number in range(1, count + 1):
        accept(storage, "one", number)
    pages: list[list[tuple[str, str, int]]] = []
    while sum(map(len, pages)) < count:
        found, total = told(storage, "x", sum(map(len, pages)))
        assert found
        assert total == count
        pages.append(found)
    assert [len(one) for one in pages] == [RECEIPTS_PER_HELLO, RECEIPTS_PER_HELLO, 3]
    assert [number for one in pages for _, _, number in one] == list(range(1, count + 1))


# --- A database that version 0001 wrote ------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Storage]:
    path = Path(shutil.copy(OLD, tmp_path / "coordinator.db"))
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT version_num FROM alembic_version").fetchone() == ("0001",)
    opened = open_storage(f"sqlite:///{path}")
    yield opened
    opened.close()


def test_an_old_database_gets_the_tables_of_today_and_keeps_what_it_had(old: Storage) -> None:
    with old.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    assert [run.id for run in old.runs()] == ["first", "a-later-one"]
    assert [run.wish for run in old.runs()] == [None, None]
    assert [one.digest for one in old.vectors("first", 2)] == ["2" * 64]


def test_an_old_databases_receipts_are_counted_by_run_and_round(old: Storage) -> None:
    with old.read() as connection:
        found, total = page(connection, "alpha", 0)
    assert [(one.charter, one.receipt.run, one.receipt.round) for one in found] == [
        ("a" * 64, "first", 1),
        ("a" * 64, "first", 2),
        ("b" * 64, "a-later-one", 1),
    ]
    assert total == 3
    accept_alpha = old.accept_vector(
        run="a-later-one", number=2, org="alpha", digest="9" * 64, size=10, receipt=lambda verdict: b"{}"
    )
    assert accept_alpha == b"{}"
    assert [one.number for one in old.vectors("a-later-one", 2)] == [4]


def test_the_certificate_of_an_old_databases_member_still_opens_the_link(old: Storage) -> None:
    with old.read() as connection:
        pem = connection.exec_driver_sql("SELECT certificate_pem FROM requests WHERE org = 'alpha'").scalar_one()
        serial = f"{x509.load_pem_x509_certificate(bytes(pem)).serial_number:x}"
        issued = certificates.find(connection, serial)
        assert issued is not None
        assert (issued.org, issued.revoked_at) == ("alpha", None)
        assert certificates.find(connection, "abc") is None
