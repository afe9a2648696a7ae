"""What more than one package's tests need: three organisations, a tiny base's configuration, and a charter for them.

Two rules of the whole suite are kept here: a test of no other kind is `unit`, and a test may skip only for a reason
that stands in ``skips.txt``; any other reason fails the run, and the reasons that were used are printed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from foedus_protocols import identity, memory
from foedus_protocols.charter import Charter, sign_charter
from foedus_protocols.charter_draft import draft
from foedus_protocols.messages import Agreement
from foedus_protocols.roster import Roster

# Where there is no GPU, Triton interprets the kernels. It looks at this when it is first imported, and other libraries
# import it too.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def _malloc_as_it_was() -> Iterator[None]:
    """No test changes what its process does with freed memory: fuzzing sees no parser's peak within what is kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_set", lambda *_: False)
        yield


SKIPS = Path(__file__).parent / "skips.txt"
OTHER_KINDS = ("gpu", "e2e", "slow")


@pytest.hookimpl(tryfirst=True)  # Before `-m` selects.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is of no other kind as `unit`."""
    for item in items:
        if not any(item.get_closest_marker(kind) for kind in (*OTHER_KINDS, "unit")):
            item.add_marker(pytest.mark.unit)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run in which a test skipped for a reason that is not listed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not hasattr(session.config, "workerinput"):  # xdist's workers report to their parent.
        if unlisted := set(_skip_reasons(reporter.stats.get("skipped", []))) - _listed():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        session.config.stash[_UNLISTED] = unlisted


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which listed reasons were used, and which are not listed."""
    reasons = _skip_reasons(terminalreporter.stats.get("skipped", []))
    unlisted = config.stash.get(_UNLISTED, set())
    terminalreporter.section("reasons for skipping")
    for reason, count in reasons.items():
        verdict = "NOT LISTED in tests/skips.txt" if reason in unlisted else "listed"
        terminalreporter.line(f"{verdict}, {count} tests: {reason}")
    if not reasons:
        terminalreporter.line("none: no test skipped")


_UNLISTED = pytest.StashKey[set[str]]()


def _listed() -> set[str]:
    return set(SKIPS.read_text(encoding="utf-8").splitlines()) - {""}


def _skip_reasons(reports: Iterable[Any]) -> Counter[str]:
    """How many tests (or modules) skipped for each reason."""
    return Counter(str(report.longrepr[-1]).removeprefix("Skipped: ") for report in reports)


LEAGUE_NOW = 1_800_000_000

TINY_CONFIG: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass
class League:
    """Three members with keys, and what a draft needs."""

    name: str = "test-league"
    now: int = LEAGUE_NOW
    base: str = "b" * 64
    config: dict[str, Any] = field(default_factory=lambda: dict(TINY_CONFIG))
    operator: Ed25519PrivateKey = field(default_factory=identity.generate_signing_key)
    keys: dict[str, Ed25519PrivateKey] = field(
        default_factory=lambda: {org: identity.generate_signing_key() for org in ("ash", "birch", "cedar")}
    )

    def __post_init__(self) -> None:
        self.rosters = [Roster.genesis(self.name)]
        for org in self.keys:
            self.rosters.append(self.rosters[-1].add(org, self.public(org), since=self.now))

    def public(self, org: str) -> str:
        return identity.public_hex(self.keys[org])

    @property
    def operator_key(self) -> str:
        return identity.public_hex(self.operator)

    def toml(self, **changes: Any) -> dict[str, Any]:
        """A small private run; `changes` replace whole sections."""
        terms: dict[str, Any] = {
            "name": "first",
            "purpose": "research",
            "domain": "medical",
            "participants": [
                {"id": org, "unit": "patient", "units_at_most": units}
                for org, units in zip(self.keys, (64, 256, 512), strict=True)
            ],
            "adapter": {"rank": 4},
            "privacy": {"epsilon": 8, "delta": 1e-5, "rounds": 4},
        }
        return terms | changes

    def draft(self, **changes: Any) -> Charter:
        return draft(
            self.toml(**changes),
            federation=self.name,
            roster=self.rosters[-1],
            base_digest=self.base,
            base_config=self.config,
            base_name="tiny",
            now=self.now,
        )

    def signature(self, charter: Charter) -> str:
        """The operator's."""
        return sign_charter(self.operator, charter.digest)

    def agreement(self, charter: Charter) -> Agreement:
        """Everybody's."""
        return Agreement(
            charter_digest=charter.digest,
            operator_signature=self.signature(charter),
            signatures={org: sign_charter(key, charter.digest) for org, key in self.keys.items()},
        )


@pytest.fixture
def league() -> League:
    return League()
