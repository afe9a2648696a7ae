"""What must be true after any amount of trouble, judged from databases and files alone, after every process has ended.

Nothing here asks the program: the tables are read with `sqlite3`, the ledger's chain and events are checked against the
charter's JSON, and every sum is added up again from words that a witness kept. Two helpers of the project are used,
`canonical_bytes` and `codec.add_packed_files`: their own tests hold them to checked-in vectors.

Each check returns the violations that it found, one line each; `Verdict` counts them.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from chaos.witness import Evidence
from foedus_protocols import codec
from foedus_protocols.charter import Charter

_OUTCOMES = ("complete", "failed", "refused", "stopped")


@dataclass(kw_only=True)
class Verdict:
    """Violations by kind, and how much there was to check.

    Attributes:
        lost: Acknowledged vectors that are not in their closed round, or whose sum is not the sum of its survivors.
        double_spent: Rounds that were spent twice, or on other words than those that left.
        unrecorded: Vectors that left without a reservation, and reservations without the charter's event.
        unnamed_failures: Runs that did not end, or ended without saying why; failed rounds that name nobody.
        different_bits: Rounds of mode `none` with one history and two results.
        checked: Name to count, so that an empty session cannot pass for a good one.
    """

    lost: list[str] = field(default_factory=list)
    double_spent: list[str] = field(default_factory=list)
    unrecorded: list[str] = field(default_factory=list)
    unnamed_failures: list[str] = field(default_factory=list)
    different_bits: list[str] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)

    @property
    def violations(self) -> list[str]:
        """All of them."""
        return [*self.lost, *self.double_spent, *self.unrecorded, *self.unnamed_failures, *self.different_bits]


@dataclass(frozen=True, kw_only=True)
class Vector:
    """One row of the coordinator's `vectors`."""

    run: str
    round: int
    org: str
    digest: str
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Round:
    """One row of the coordinator's `rounds`."""

    run: str
    number: int
    state: str
    survivors: tuple[str, ...]
    sum_digest: str | None
    adapter_digest: str | None
    reason: str | None


class Coordinator:
    """A coordinator's home, read after its end."""

    def __init__(self, home: Path) -> None:
        self.home = home
        with closing(sqlite3.connect(home / "coordinator.db")) as database:
            database.row_factory = sqlite3.Row
            self.runs = {row["id"]: dict(row) for row in database.execute("SELECT * FROM runs")}
            self.vectors = [
                Vector(**dict(row))
                for row in database.execute(
                    "SELECT run, round, org, digest, verdict FROM vectors ORDER BY run, round, org"
                )
            ]
            self.rounds = [
                Round(**{**dict(row), "survivors": tuple(json.loads(row["survivors"] or "[]"))})
                for row in database.execute(
                    "SELECT run, number, state, survivors, sum_digest, adapter_digest, reason FROM rounds "
                    "ORDER BY run, number"
                )
            ]

    @cached_property
    def charters(self) -> dict[str, Charter]:
        """Each run's charter."""
        return {
            run: Charter.parse((self.home / "files" / digest[:2] / digest).read_bytes())
            for run, digest in ((name, row["charter_digest"]) for name, row in self.runs.items())
        }


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One link of an organisation's ledger, as its stored bytes say."""

    namespace: str
    sequence: int
    content: bytes
    digest: str

    @cached_property
    def value(self) -> dict[str, Any]:
        """The entry."""
        value: dict[str, Any] = json.loads(self.content)
        return value


class Organisation:
    """An organisation's home, read after its end."""

    def __init__(self, org: str, home: Path) -> None:
        self.org = org
        with closing(sqlite3.connect(home / "ledger.db")) as database:
            rows = database.execute(
                "SELECT namespace, sequence, content, digest FROM entries ORDER BY namespace, sequence"
            )
            self.entries = [
                Entry(namespace=name, sequence=number, content=content, digest=digest)
                for name, number, content, digest in rows
            ]
        with closing(sqlite3.connect(home / "client.db")) as database:
            self.departed = {row[0] for row in database.execute("SELECT digest FROM departures WHERE kind = 'vector'")}
            receipts = database.execute("SELECT receipt FROM rounds WHERE receipt IS NOT NULL")
            self.receipts: list[dict[str, Any]] = [json.loads(row[0]) for row in receipts]
        committed = [entry.value["body"]["receipt"] for entry in self.entries if entry.value["kind"] == "commit"]
        self.receipts += [one for one in committed if one not in self.receipts]

    @property
    def reservations(self) -> list[dict[str, Any]]:
        """The `reserve` entries."""
        return [entry.value for entry in self.entries if entry.value["kind"] == "reserve"]


def judge(
    coordinator: Coordinator, organisations: Mapping[str, Organisation], evidence: Evidence, scratch: Path
) -> Verdict:
    """Check everything. `scratch` is a folder for sums that are added up again."""
    verdict = Verdict()
    verdict.lost += _lost(coordinator, organisations, evidence, verdict.checked)
    verdict.lost += _wrong_sums(coordinator, evidence, scratch, verdict.checked)
    for one in organisations.values():
        verdict.double_spent += _double_spent(one, coordinator, verdict.checked)
        verdict.unrecorded += _unrecorded(one, coordinator, evidence, verdict.checked)
        verdict.unrecorded += _broken_chain(one)
    verdict.unnamed_failures += _unnamed(coordinator, verdict.checked)
    verdict.different_bits += _different_bits(coordinator, verdict.checked)
    return verdict


def _lost(
    coordinator: Coordinator, organisations: Mapping[str, Organisation], evidence: Evidence, checked: Counter[str]
) -> Iterator[str]:
    """Whatever was acknowledged is in the database, and in the survivor set of its round once that is closed."""
    yield from evidence.contradictions
    rows = {(one.run, one.round, one.org): one for one in coordinator.vectors}
    acknowledged = {
        (one["run"], one["round"], org): one["digest"]
        for org, owner in organisations.items()
        for one in owner.receipts
        if one["verdict"] == "included"
    } | evidence.acknowledged
    acknowledged |= {key: row.digest for key, row in rows.items() if row.verdict == "included"}
    rounds = {(one.run, one.number): one for one in coordinator.rounds}
    for (run, number, org), digest in sorted(acknowledged.items()):
        checked["acknowledged"] += 1
        row, place = rows.get((run, number, org)), rounds.get((run, number))
        name = f"{org}'s vector of round {number} of {run}"
        if row is None or row.digest != digest or row.verdict != "included":
            yield f"{name} was acknowledged and is not in the database"
        elif place is None:
            yield f"{name} was acknowledged in a round that is not in the database"
        elif place.state == "closed" and org not in place.survivors:
            yield f"{name} was acknowledged and is not in the closed round"
    for one in coordinator.rounds:
        for org in one.survivors:
            if (one.run, one.number, org) not in acknowledged:
                yield f"{org} is a survivor of round {one.number} of {one.run} without a receipt"


def _wrong_sums(coordinator: Coordinator, evidence: Evidence, scratch: Path, checked: Counter[str]) -> Iterator[str]:
    """A closed round's published sum is the sum of its survivors' words."""
    digests = {(one.run, one.round, one.org): one.digest for one in coordinator.vectors}
    for one in coordinator.rounds:
        if one.state != "closed":
            continue
        if not one.survivors:
            yield f"round {one.number} of {one.run} was closed with nobody in it"
            continue
        words = [evidence.words / digests.get((one.run, one.number, org), "?") for org in one.survivors]
        if not all(path.is_file() for path in words):
            checked["sums without all words"] += 1
            continue
        total = scratch / "sum"
        total.unlink(missing_ok=True)
        codec.add_packed_files(words, coding=coordinator.charters[one.run].coding(), out=total)
        checked["sums"] += 1
        if hashlib.sha256(total.read_bytes()).hexdigest() != one.sum_digest:
            yield f"the sum of round {one.number} of {one.run} is not that of its survivors' words"


def _double_spent(one: Organisation, coordinator: Coordinator, checked: Counter[str]) -> Iterator[str]:
    """A round of a run is reserved once, and what the coordinator has of it are the reserved words."""
    reserved: dict[tuple[str, str, int], str] = {}
    for entry in one.reservations:
        checked["reservations"] += 1
        key = (entry["charter"], entry["run"], entry["round"])
        if key in reserved:
            yield f"{one.org} reserved round {entry['round']} of {entry['run']} twice"
        if entry["body"].get("restored"):
            yield f"{one.org} took its ledger for an older copy in round {entry['round']} of {entry['run']}"
        reserved[key] = entry["body"]["words"]
    for vector in coordinator.vectors:
        charter = coordinator.runs[vector.run]["charter_digest"]
        words = reserved.get((charter, vector.run, vector.round))
        if vector.org == one.org and words is not None and words != vector.digest:
            yield f"{one.org} reserved other words than it sent in round {vector.round} of {vector.run}"


def _unrecorded(
    one: Organisation, coordinator: Coordinator, evidence: Evidence, checked: Counter[str]
) -> Iterator[str]:
    """Whatever left, or was at the coordinator in part, is reserved, and under the event that the charter says."""
    reserved = {entry["body"]["words"] for entry in one.reservations}
    left = one.departed | {vector.digest for vector in coordinator.vectors if vector.org == one.org}
    checked["vectors that left"] += len(left)
    for digest in sorted(left - reserved):
        yield f"words {digest[:12]} left {one.org} without a reservation"
    charters = {row["charter_digest"]: coordinator.charters[run] for run, row in coordinator.runs.items()}
    for entry in one.reservations:
        if (charter := charters.get(entry["charter"])) is None:
            yield f"{one.org} reserved round {entry['round']} under a charter that nobody knows"
            continue
        me = charter.participant(one.org)
        expected = None
        if charter.private:
            expected = {
                "noise_multiplier": me.noise_multiplier,
                "sampling_prob": me.sampling_prob,
                "steps": charter.privacy.steps_per_round,
            }
        if entry["body"]["event"] != expected:
            yield f"{one.org} reserved {entry['body']['event']} for round {entry['round']}, the charter says {expected}"


def _broken_chain(one: Organisation) -> Iterator[str]:
    """Every entry names the digest of the one before it."""
    previous: dict[str, str] = {}
    for entry in one.entries:
        expected = previous.get(entry.namespace, "0" * 64)
        if hashlib.sha256(entry.content).hexdigest() != entry.digest or entry.value["previous"] != expected:
            yield f"entry {entry.sequence} of {one.org}'s ledger does not follow the one before it"
        previous[entry.namespace] = entry.digest


def _unnamed(coordinator: Coordinator, checked: Counter[str]) -> Iterator[str]:
    """Every run ended complete or with a reason, and every failed round says why."""
    for run, row in coordinator.runs.items():
        checked["runs"] += 1
        checked[f"runs {row['outcome']}"] += 1
        if row["state"] != "finished" or row["outcome"] not in _OUTCOMES:
            yield f"{run} did not end: it is {row['state']}"
        elif row["outcome"] != "complete" and not row["reason"]:
            yield f"{run} ended {row['outcome']} without a reason"
    for one in coordinator.rounds:
        checked[f"rounds {one.state}"] += 1
        if one.state == "failed" and not one.reason:
            yield f"round {one.number} of {one.run} failed without a reason"


def _different_bits(coordinator: Coordinator, checked: Counter[str]) -> Iterator[str]:
    """In mode `none` the same rounds with the same survivors lead to the same sums and adapters, in whatever run."""
    seen: dict[tuple[object, ...], tuple[str | None, str | None, str]] = {}
    for run, charter in coordinator.charters.items():
        if charter.private:
            continue
        history: tuple[object, ...] = (charter.seed, charter.privacy.rounds, charter.recipe.model_dump_json())
        for one in coordinator.rounds:
            if one.run != run or one.state != "closed":
                continue
            history = (*history, (one.number, one.survivors))
            first = seen.setdefault(history, (one.sum_digest, one.adapter_digest, run))
            if first[2] == run:
                continue
            checked["rounds compared with another run's"] += 1
            if first[:2] != (one.sum_digest, one.adapter_digest):
                yield f"round {one.number} of {run} differs from that of {first[2]}, which had the same survivors"
