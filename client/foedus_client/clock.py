"""The coordinator's clock, as an organisation follows it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

_LOG = logging.getLogger("foedus.client")

MAX_SKEW_SECONDS = 86_400.0


@dataclass(kw_only=True)
class Clock:
    """The coordinator's clock as measured in hello. A skew is tolerated, and never a reason to end.

    It is followed for a day and no further: a coordinator that lies about the time must not keep a charter alive.
    """

    offset: float = 0.0

    def follow(self, theirs: float, ours: float) -> None:
        """Take over a measured skew."""
        skew = theirs - ours
        followed = min(max(skew, -MAX_SKEW_SECONDS), MAX_SKEW_SECONDS)
        if followed != skew and followed != self.offset:  # Once, and not at each hello.
            _LOG.error("the coordinator's clock and ours differ by %.1f days, which is not followed", skew / 86_400.0)
        self.offset = followed

    def __call__(self) -> float:
        """Unix seconds."""
        return time.time() + self.offset
