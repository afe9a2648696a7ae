"""Records inside a batch: where each begins, and which of its tokens are queries.

Attention never crosses a record's boundary. A batch of rows is one stream of rows * keys tokens; ascending offsets cut
it into records, and the rows' own boundaries always count. Packed sequences, left padding (a record of pads before the
real one) and plain batches are the same thing to a kernel. With a cache the queries are the last tokens of each row.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch


class Record(NamedTuple):
    """A record's place.

    Attributes:
        row: Of the batch.
        start: Its first key in the row.
        stop: One past its last key.
        first_query: Its first key in the row that is also a query; `stop` where it has none.
    """

    row: int
    start: int
    stop: int
    first_query: int

    @property
    def length(self) -> int:
        """Its tokens."""
        return self.stop - self.start


def records_of(offsets: torch.Tensor | None, *, rows: int, keys: int, queries: int) -> tuple[Record, ...]:
    """The records of a batch in order.

    Args:
        offsets: Integers [records + 1], from 0 to rows * keys; None where every row is one record.
        rows: Rows of the batch.
        keys: Tokens of a row.
        queries: How many of them, the last ones, are queries.

    Raises:
        ValueError: Offsets that do not ascend from 0 to rows * keys, or more queries than keys.
    """
    if not 1 <= queries <= keys:
        raise ValueError(f"expected 1 to {keys} queries (the last of each row's {keys} keys), got {queries}")
    inner: list[int] = [] if offsets is None else offsets.tolist()
    if inner and (inner[0] != 0 or inner[-1] != rows * keys or any(a >= b for a, b in pairwise(inner))):
        raise ValueError(
            f"expected record offsets that ascend from 0 to {rows * keys} ({rows} rows of {keys} tokens), got {inner}"
        )
    cuts = sorted({*inner, *range(0, rows * keys + 1, keys)})
    found = []
    for begin, end in pairwise(cuts):
        row = begin // keys
        start, stop = begin - row * keys, end - row * keys
        found.append(Record(row, start, stop, min(stop, max(start, keys - queries))))
    return tuple(found)


def offsets_of_padding(present: torch.Tensor) -> torch.Tensor:
    """Offsets that make the real tokens of each row one record, and the padding before or after it others.

    Args:
        present: bool [rows, keys], False where a token is padding.

    Returns:
        int64 [records + 1].

    Raises:
        ValueError: A row with padding between its tokens.
    """
    rows, keys = present.shape
    change = torch.ones_like(present)  # A row's first token always begins a record.
    change[:, 1:] = present[:, 1:] != present[:, :-1]
    runs = (change & present).sum(1)  # (rows,) runs of real tokens
    if bool((runs > 1).any()):
        row = int((runs > 1).nonzero()[0, 0])
        raise ValueError(
            f"expected padding before or after a row's tokens, got {int(runs[row])} separate runs of tokens in row "
            f"{row}; pad on one side only"
        )
    starts = change.flatten().nonzero().squeeze(1)
    return torch.cat([starts, starts.new_tensor([rows * keys])])
