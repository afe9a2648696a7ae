"""What an organisation is told again at hello: every receipt that it was ever given here.

An organisation whose ledger was restored from an older copy, or was lost, learns from this what it has spent
(`foedus_client.receipts`). Receipts are counted per organisation, from 1, over all runs, in the order in which they
were given, and are told in pages: whoever has accounted for the first so many asks for the next.
"""

from __future__ import annotations

from foedus_protocols.hello import RECEIPTS_PER_HELLO, ToldReceipt
from foedus_protocols.receipt import Receipt
from sqlalchemy import Connection, func, select

from foedus_coordinator.tables import runs, vectors


def page(connection: Connection, org: str, start: int) -> tuple[list[ToldReceipt], int]:
    """An organisation's receipts after the first `start`, oldest first, and how many there are in all.

    Args:
        connection: A transaction; page and total are of one state.
        org: Whose receipts. They belong to the organisation's id: they stay where it enrolled again with new keys.
        start: How many it has accounted for. Beyond the last one the page is empty.

    Returns:
        At most `RECEIPTS_PER_HELLO` receipts as they were signed, each with the charter of its run; the total.
    """
    total = connection.execute(select(func.max(vectors.c.number)).where(vectors.c.org == org)).scalar() or 0
    found = connection.execute(
        select(runs.c.charter_digest, vectors.c.receipt)
        .join(runs, runs.c.id == vectors.c.run)
        .where(vectors.c.org == org, vectors.c.number > start)
        .order_by(vectors.c.number)
        .limit(RECEIPTS_PER_HELLO)
    )
    return [ToldReceipt(charter=row.charter_digest, receipt=Receipt.decode(bytes(row.receipt))) for row in found], total
