"""A run is gone on with once: which other extension of it stands in the way, and which ones are out of it.

The ledger counts every event of every charter, so what it says of a namespace is right however many extensions a run
has. What an extension *promises* is not so safe: it covers the rounds since the first run that the extension counts as
spent (`charter.Extends.rounds_spent`). Two that went on from one run beside each other would each leave out what the
other one spends. So a second one is signed only when no more can be spent under the first (it failed, was refused by
somebody, expired, or a person here left it), and then it must count the rounds that the first one opened (check 8,
`replay.earlier`): with none of them its promise is the one that the first had made, with some it is the larger one that
covers them too. Of a first one that came to its end somebody has an adapter: that run is the one to extend.

Left out: extensions signed before the ledger noted what a charter extends.
"""

from __future__ import annotations

from collections.abc import Iterable

from foedus_protocols.errors import StateError

from foedus_client.allotments import Account, Allotment

_CAME_TO_ITS_END = frozenset({"complete", "stopped", "ended"})


def extensions(accounts: Iterable[Account], extended: str) -> dict[str, Allotment]:
    """The charters that were signed here and go on from the run of charter `extended`, with their shares."""
    return {
        charter: allotment
        for account in accounts
        for charter, allotment in account.allotments.items()
        if allotment.extends == extended
    }


def require_only_extension(accounts: Iterable[Account], charter: str, extended: str, *, now: float) -> None:
    """Check that no other charter goes on, or went on to its end, from the run that this one extends.

    Args:
        accounts: Every namespace: a policy may have moved the purpose to another one since.
        charter: The extension that is to be signed.
        extended: The charter of the run that it goes on from.
        now: Unix seconds. What has expired by then can spend nothing more.

    Raises:
        StateError: Another one does; it is named.
    """
    for other, allotment in extensions(accounts, extended).items():
        if other == charter:
            continue
        goes_on = allotment.open and allotment.expires >= now
        if goes_on or (not allotment.open and allotment.why in _CAME_TO_ITS_END):
            state = "is in force" if goes_on else "came to its end"
            raise StateError(
                f"expected a run that nobody has gone on with yet, that of charter {extended[:12]} goes on under "
                f"charter {other[:12]}, which was signed here and {state}: extend the run of that one, or wait until "
                "it has failed or expired"
            )
