"""Held-out units that another organisation trains on, which the comparison leaves out.

Each organisation splits its units under a key of its own, so a unit that lies in the files of two may be held out by
one and trained on by the other. Units are matched as text, whatever their fields are called: two organisations that
count their patients from 1 lose units that they do not share, which costs width of an interval and no truth.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from foedus_client.datasets import Dataset
from foedus_client.datasets.formats import RowError
from foedus_client.datasets.readers import Rejected, read_rows
from foedus_client.datasets.units import key_hash, unit_key

from foedus_local.federation import Organisation


def trained_elsewhere(organisations: Sequence[Organisation], data: Mapping[str, Dataset]) -> dict[str, frozenset[str]]:
    """Units of each organisation that another one trains on.

    Args:
        organisations: Whose files are read once more, for their units alone.
        data: By organisation, its units as they were split.

    Returns:
        By organisation the digests of such units under its own split key, held-out and training ones alike.
    """
    common = secrets.token_bytes(32)
    names = {one.org: _names(one, common) for one in organisations}
    trained = {org: {names[org][unit.key_hash] for unit in held.train} for org, held in data.items()}
    found = {}
    for org, mine in names.items():
        others = set[str]().union(*(units for other, units in trained.items() if other != org))
        found[org] = frozenset(own for own, shared in mine.items() if shared in others)
    return found


def _names(one: Organisation, common: bytes) -> dict[str, str]:
    """By the digest of a unit under the organisation's split key, that under the comparison's key."""
    names = {}
    for row in read_rows(one.file):
        if isinstance(row, Rejected):
            continue
        try:
            unit = unit_key(row.values, one.unit)
        except RowError:
            continue
        names[key_hash(one.split_key, unit)] = key_hash(common, unit)
    return names
