"""A run is gone on with once: which other extension of it stands in the way, and which ones are out of it.

The ledger counts every event of every charter, so what it says of a namespace is right however many extensions a run
has. What an extension *promises* is not so safe: it covers the rounds since the first run that the extension counts as
spent (`charter.Extends.rounds_spent`). Two that went on from one run beside each other would each leave out what the
other one spends. So a second one is signed only when no more can be spent under the first (it failed, was refused by
somebody, expired, or a person here left it), and then it must count the rounds that the first one opened (check 8,
`replay.earlier`): with none of them its promise is the one that the first had made, with some it is the larger one that
covers them too. Of a first one that came to its end somebody has an adapter: that run is the one to extend.

What goes on from an extension goes on from the run that this one extends, too, and is looked for all the way down: else
two rounds of words could leave under a branch that hangs on a failed extension, and no other promise would count them.
Nor is a run that failed extended at all: it has no adapter to go on from.

Left out: extensions signed before the ledger noted what a charter extends.
"""

from __future__ import annotations

from collections.abc import Iterable

from foedus_protocols.errors import StateError

from foedus_client.allotments import Account, Allotment

_CAME_TO_ITS_END = frozenset({"complete", "stopped", "ended"})
_WITHOUT_RESULT = {"failed": "failed", "refused": "was refused"}


def extensions(accounts: Iterable[Account], extended: str) -> dict[str, Allotment]:
    """The charters that were signed here and go on from the run of charter `extended`, over any number of others."""
    signed = [pair for account in accounts for pair in account.allotments.items()]
    found: dict[str, Allotment] = {}
    parents = {extended}
    while parents:
        children = {charter: one for charter, one in signed if one.extends in parents and charter not in found}
        found |= children
        parents = set(children)
    return found


def require_only_extension(accounts: Iterable[Account], charter: str, extended: str, *, now: float) -> None:
    """Check that no other charter goes on, or went on to its end, from the run that this one extends.

    Args:
        accounts: Every namespace: a policy may have moved the purpose to another one since.
        charter: The extension that is to be signed.
        extended: The charter of the run that it goes on from.
        now: Unix seconds. What has expired by then can spend nothing more.

    Raises:
        StateError: Another one does; it is named. Or the run that would be extended failed.
    """
    accounts = list(accounts)
    ended = next((account.allotments[extended] for account in accounts if extended in account.allotments), None)
    if ended is not None and not ended.open and ended.why in _WITHOUT_RESULT:
        raise StateError(
            f"expected a run that came to its end to go on from, that of charter {extended[:12]} "
            f"{_WITHOUT_RESULT[ended.why]}: extend the run before it"
        )
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
