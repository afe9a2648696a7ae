"""The daemon's log: one line an event on standard error. No record, key or token is ever in it."""

from __future__ import annotations

import logging
import sys


def log_to_stderr() -> None:
    """Show our own events from INFO, and other libraries' from WARNING."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("foedus").setLevel(logging.INFO)
