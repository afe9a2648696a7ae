"""Whether an organisation's daemon does its work, for whoever watches it: a list of problems, each with an exit code.

It reads files beside the running daemon, connects nowhere and changes nothing. The codes are those of the errors that
the problem would be in a command (``docs/exit-codes.md``); the command leaves with the first one's.
"""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime

from foedus_protocols.certificates import parse_certificate
from foedus_protocols.errors import (
    BudgetExhausted,
    ConnectError,
    FoedusError,
    PolicyRefused,
    StateError,
    VerificationError,
)
from foedus_protocols.files import disk_errors

from foedus_client import policy
from foedus_client.config import Home
from foedus_client.ledger import Ledger
from foedus_client.life import Life, life_of
from foedus_client.lock import HomeLock
from foedus_client.state import ClientState

OUT_OF_TOUCH_SECONDS = 120.0
_SPENT_SHARE = 0.99
_LEAST_FREE_BYTES = 256 << 20
_RECENT_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that keeps the daemon from its work: the exit code that stands for it, and what to do."""

    code: int
    text: str


def problems_of(home: Home) -> list[Problem]:
    """Everything that is wrong, the gravest first: not running, damaged files, out of touch, no budget.

    Raises:
        StateError: Nobody has joined from this home.
    """
    home.membership()
    return [*_process(home), *_files(home), *_contact(home), *_certificate(home), *_budgets(home)]


def _process(home: Home) -> Iterator[Problem]:
    if not HomeLock.held(home.lock):
        yield Problem(code=StateError.exit_code, text=f"no daemon runs on {home.root}: start `foedus client up`")
    free = shutil.disk_usage(home.root).free
    if free < _LEAST_FREE_BYTES:
        yield Problem(code=StateError.exit_code, text=f"{free >> 20} MiB are free under {home.root}: free some space")


def _files(home: Home) -> Iterator[Problem]:
    """The daemon's memory and the ledger, as far as the files themselves can tell."""
    try:
        policy.load(home.policy)
        if home.state.exists():
            _quick_check(home)
        if home.ledger.exists():
            Ledger(home.ledger, read_only=True).verify_chain()
    except FoedusError as error:
        yield Problem(code=error.exit_code, text=str(error))


def _quick_check(home: Home) -> None:
    with disk_errors(home.state), closing(sqlite3.connect(f"{home.state.as_uri()}?mode=ro", uri=True)) as database:
        (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise VerificationError(f"expected a sound {home.state}, it is damaged ({found}): restore the newest backup")


def _contact(home: Home) -> Iterator[Problem]:
    if not home.state.exists() or not HomeLock.held(home.lock):
        return
    try:
        with ClientState(home.state) as state:
            life = life_of(state)
    except FoedusError:
        return  # What cannot be read is a problem of `_files`.
    last = life.last_contact or life.started_at
    if last is None or life.sending:
        return
    silent = time.time() - last
    if silent > OUT_OF_TOUCH_SECONDS:
        text = f"the coordinator has not answered for {silent:.0f} s"
        yield Problem(code=ConnectError.exit_code, text=f"{text}: {_recent(life) or 'see the log of the daemon'}")


def _recent(life: Life) -> str | None:
    recent = life.last_error_at is not None and time.time() - life.last_error_at < _RECENT_SECONDS
    return life.last_error if recent else None


def _certificate(home: Home) -> Iterator[Problem]:
    try:
        certificate = parse_certificate(home.tls.certificate.read_bytes())
    except (OSError, VerificationError) as error:
        yield Problem(code=VerificationError.exit_code, text=f"our certificate cannot be read: {error}")
        return
    now, ends = datetime.now(UTC), certificate.not_valid_after_utc
    if now > ends:
        text = f"our certificate ran out on {ends:%Y-%m-%d %H:%M} UTC: `foedus client join --again`"
        yield Problem(code=ConnectError.exit_code, text=text)
    elif (ends - now) * 4 < ends - certificate.not_valid_before_utc:
        text = (
            f"our certificate runs out on {ends:%Y-%m-%d %H:%M} UTC and was not renewed: is the coordinator in reach?"
        )
        yield Problem(code=ConnectError.exit_code, text=text)


def _budgets(home: Home) -> Iterator[Problem]:
    """Namespaces in which no further charter fits, and charters that were refused for their budget."""
    try:
        namespaces = policy.load(home.policy).namespaces
        if not home.ledger.exists():
            return
        ledger = Ledger(home.ledger, read_only=True)
        opened = set(ledger.namespaces())
        for name, terms in namespaces.items():
            if name not in opened:
                continue
            spent = ledger.epsilon_spent(name, terms.delta)
            if spent >= _SPENT_SHARE * terms.epsilon_cap:
                text = f"namespace {name!r} has spent epsilon {spent:.4g} of {terms.epsilon_cap:g}: no further run fits"
                yield Problem(code=BudgetExhausted.exit_code, text=text)
    except PolicyRefused as error:
        yield Problem(code=error.exit_code, text=str(error))
    except FoedusError:
        return  # A policy or ledger that cannot be read is a problem of `_files`.
