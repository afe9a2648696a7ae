"""What a demo will do: whose data, which terms, how much budget. Everything is decided here, before anything starts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foedus_client.datasets.formats import Chat, RowError, parse_row
from foedus_client.datasets.load import load_dataset
from foedus_client.datasets.readers import Rejected, Row, read_rows, stem
from foedus_client.datasets.units import check_names, parse_columns, parse_units, unit_field, unit_key
from foedus_protocols.charter import check_length
from foedus_protocols.charter_checks import MAX_PARAMETERS
from foedus_protocols.charter_draft import default_rank
from foedus_protocols.errors import ConfigError, DataError, UsageError
from foedus_protocols.layout import adapter_layout
from foedus_protocols.manifest import TOKENIZER_FILE

from foedus_local.federation import PURPOSE, Budget, Organisation
from foedus_local.text import DOMAINS, write_demo_text

_SPLIT_ATTEMPTS = 32
_SPLIT_UNIT = "unit"  # The field of the files that `plan_split` writes.
LEAST_ORGANISATIONS = 3
"""What a policy asks for that nobody changed: two other members (`minimum_members`). Fewer would refuse each other."""
DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz")


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The free terms of a demo's charter (units in the names; `docs/privacy.md` explains each).

    `adapter` and `layers` are the charter's `adapter.targets` and `adapter.layers`.
    """

    private: bool
    epsilon: float
    delta: float
    rounds: int
    seed: int
    max_tokens: int
    max_records_per_unit: int
    expected_units: int
    max_heldout_records: int
    rate: float
    l2_clip_norm: float
    evaluate_every: int
    round_seconds: float
    adapter: str = "attention"
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A demo, decided.

    Attributes:
        domain: What the card calls it.
        organisations: Who takes part, with what.
        unit: The privacy unit in words.
        terms: The charter's free terms.
    """

    domain: str
    organisations: tuple[Organisation, ...]
    unit: str
    terms: Terms

    def budget(self) -> Budget:
        """What each organisation must grant for it: on this machine one person is all of them."""
        terms = self.terms
        return Budget(
            epsilon_cap=terms.epsilon,
            delta=terms.delta,
            allow_unprotected=not terms.private,
            bounds={
                "max_tokens": terms.max_tokens,
                "max_records_per_unit": terms.max_records_per_unit,
                "max_rounds": terms.rounds,
                "max_rate": terms.rate,
            },
        )

    def charter(self) -> dict[str, Any]:
        """The charter as `foedus coordinator run start` takes it."""
        terms = self.terms
        privacy: dict[str, Any] = {
            "mode": "local" if terms.private else "none",
            "rounds": terms.rounds,
            "l2_clip_norm": terms.l2_clip_norm,
            "target_units": terms.expected_units,
        }
        if terms.private:
            privacy |= {"epsilon": terms.epsilon, "delta": terms.delta}
        return {
            "name": f"demo-{self.domain}",
            "purpose": PURPOSE,
            "domain": self.domain,
            # In private runs nothing takes a seed.
            **({} if terms.private else {"seed": terms.seed}),
            "participants": [
                {"id": one.org, "unit": one.unit, "units_at_most": one.units_at_most} for one in self.organisations
            ],
            "adapter": {"targets": terms.adapter} | ({} if terms.layers is None else {"layers": list(terms.layers)}),
            "recipe": {
                "max_tokens": terms.max_tokens,
                "max_records_per_unit": terms.max_records_per_unit,
                "optimiser": {"rate": terms.rate},
            },
            "privacy": privacy,
            "schedule": {"round_seconds": terms.round_seconds},
            "evaluation": {
                "term": "plain",
                "every": terms.evaluate_every,
                "max_records": terms.max_heldout_records,
            },
        }


def check_terms(terms: Terms, base_config: Mapping[str, Any]) -> None:
    """Accept what a base must have: the layers that are adapted, and positions for the longest record.

    Raises:
        ConfigError: It has not, or the adapter is larger than an organisation's policy allows.
    """
    rank = default_rank(terms.adapter, base_config)
    layout = adapter_layout(base_config, targets=terms.adapter, rank=rank, layers=terms.layers)
    if layout.length > MAX_PARAMETERS:
        raise ConfigError(
            f"expected an adapter of at most {MAX_PARAMETERS} trained coordinates, got {layout.length}: adapt fewer "
            "layers with --layers"
        )
    check_length(terms.max_tokens, base_config)


def check_domain(domain: str) -> None:
    """Accept a domain that text is invented for.

    Raises:
        UsageError: It is none.
    """
    if domain not in DOMAINS:
        raise UsageError(f"expected --domain {' or '.join(DOMAINS)}, got {domain!r}")


def plan_invented(folder: Path, domain: str, terms: Terms, *, units: int = 600) -> Plan:
    """A demo on invented text, written into `folder`; `units` are the first organisation's."""
    check_domain(domain)
    text = write_demo_text(folder, domain=domain, seed=terms.seed, units=units)
    organisations = tuple(
        Organisation(
            org=org,
            file=path,
            unit=text.unit,
            units_at_most=power_of_two(text.units[org]),
            split_key=_split_key(terms.seed, org),
        )
        for org, path in text.files.items()
    )
    return Plan(domain=domain, organisations=organisations, unit=text.unit, terms=terms)


def plan_data(folder: Path, units: Sequence[str], columns: Sequence[str], base: Path, terms: Terms) -> Plan:
    """A demo on the user's own files: one file, one organisation.

    Raises:
        DataError: No such folder, or fewer than three files in it.
        UsageError: A file's unit is not given, an option names no file, or two files give one name.
    """
    if not folder.is_dir():
        raise DataError(f"expected a folder with one data file for each organisation, got {folder}")
    files = sorted(path for path in folder.iterdir() if path.name.endswith(DATA_SUFFIXES))
    if len(files) < LEAST_ORGANISATIONS:
        raise DataError(
            f"expected at least {LEAST_ORGANISATIONS} data files ({', '.join(DATA_SUFFIXES)}) in {folder}, got "
            f"{len(files)}: a demo's organisation signs with two others at least"
        )
    chosen, mapped = parse_units(units), parse_columns(columns)
    check_names(files, chosen, mapped)
    organisations = tuple(
        _organisation(path, unit_field(chosen, path), mapped.get(stem(path), {}), base, terms) for path in files
    )
    names = [one.org for one in organisations]
    if len(set(names)) != len(names):
        raise UsageError(f"expected file names that give different organisations, got {', '.join(names)}")
    unit = "/".join(dict.fromkeys(one.unit for one in organisations))
    return Plan(domain=_org_id(folder.resolve().name), organisations=organisations, unit=unit, terms=terms)


@dataclass(frozen=True, kw_only=True)
class Deal:
    """Data that was read and can be dealt out.

    Attributes:
        lines: By unit, its records as one line each.
        unit: The privacy unit in words.
        domain: What the card calls it.
    """

    lines: dict[str, list[str]]
    unit: str
    domain: str


def read_deal(files: Sequence[Path], orgs: int, units: Sequence[str], columns: Sequence[str]) -> Deal:
    """Read what a simulation deals out; nothing is written.

    Args:
        files: The data, all of one population.
        orgs: How many organisations.
        units: ``--unit`` options.
        columns: ``--columns`` options.

    Raises:
        UsageError: Fewer than three organisations.
        DataError: Fewer than two units for each of them, or a file cannot be read.
    """
    if orgs < LEAST_ORGANISATIONS:
        raise UsageError(
            f"expected at least {LEAST_ORGANISATIONS} organisations, got {orgs}: each signs with two others at least"
        )
    chosen, mapped = parse_units(units), parse_columns(columns)
    check_names(files, chosen, mapped)
    lines: dict[str, list[str]] = {}
    unusable: list[str] = []
    for path in files:
        field = unit_field(chosen, path)
        for row in read_rows(path):
            try:
                unit, line = _normalised(row, field, mapped.get(stem(path), {}))
            except RowError as error:
                unusable.append(f"{path.name} line {row.line}: {error}")
            else:
                lines.setdefault(unit, []).append(line)
    if len(lines) < 2 * orgs:
        why = f"; {len(unusable)} rows are unusable, the first is {unusable[0]}" if unusable else ""
        raise DataError(f"expected at least {2 * orgs} units for {orgs} organisations, got {len(lines)}{why}")
    unit = chosen if isinstance(chosen, str) else "/".join(sorted(set(chosen.values())))
    return Deal(lines=lines, unit=unit, domain=_org_id(stem(files[0])))


def plan_split(deal: Deal, orgs: int, folder: Path, base: Path, terms: Terms) -> Plan:
    """A federation of many organisations on a few files: whole units are dealt out, as the seed shuffles them.

    Args:
        deal: What was read.
        orgs: How many organisations.
        folder: Where each organisation's file is written.
        base: The base model's folder.
        terms: The charter's free terms.
    """
    lines = deal.lines
    dealt = sorted(lines, key=lambda unit: hashlib.sha256(f"foedus/deal/{terms.seed}/{unit}".encode()).digest())
    folder.mkdir(parents=True, exist_ok=True)
    organisations = []
    for number in range(orgs):
        path = folder / f"org-{number:0{len(str(orgs - 1))}}.jsonl"
        own = [line for unit in dealt[number::orgs] for line in lines[unit]]
        path.write_text("\n".join(own) + "\n", encoding="utf-8")
        organisations.append(_organisation(path, _SPLIT_UNIT, {}, base, terms))
    return Plan(domain=deal.domain, organisations=tuple(organisations), unit=deal.unit, terms=terms)


def _normalised(row: Row | Rejected, field: str, columns: dict[str, str]) -> tuple[str, str]:
    """A row's unit, and the row as one line that every organisation's reader takes.

    Raises:
        RowError: It is not usable.
    """
    if isinstance(row, Rejected):
        raise RowError(row.reason)
    unit, record = unit_key(row.values, field), parse_row(row.values, columns)
    values: dict[str, Any] = {_SPLIT_UNIT: unit}
    if isinstance(record, Chat):
        values["messages"] = [vars(message) for message in record.messages]
    else:
        values["text"] = record.text
    return unit, json.dumps(values, ensure_ascii=False)


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`: what a person at an organisation would declare."""
    return 1 << max(0, count - 1).bit_length()


def _organisation(path: Path, unit: str, columns: dict[str, str], base: Path, terms: Terms) -> Organisation:
    """Read one file: how many units to declare, and a split key under which at least one unit is held out."""
    org = _org_id(stem(path))
    for attempt in range(_SPLIT_ATTEMPTS):
        split_key = _split_key(terms.seed, org, attempt)
        found = load_dataset(
            [path],
            units=unit,
            columns={stem(path): columns} if columns else {},
            tokenizer_path=base / TOKENIZER_FILE,
            max_tokens=terms.max_tokens,
            max_records_per_unit=terms.max_records_per_unit,
            split_key=split_key,
        )
        if found.heldout and found.train:
            return Organisation(
                org=org,
                file=path,
                unit=unit,
                units_at_most=power_of_two(found.report.units),
                split_key=split_key,
                columns=columns,
            )
    raise DataError(
        f"expected several units in {path.name}, got {found.report.units}: one is held out, one is trained on"
    )


def _split_key(seed: int, org: str, attempt: int = 0) -> bytes:
    return hashlib.sha256(f"foedus/demo/split/{seed}/{org}/{attempt}".encode()).digest()


def _org_id(name: str) -> str:
    cleaned = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not cleaned:
        raise UsageError(f"expected a file or folder name with letters or digits, got {name!r}: rename it")
    return cleaned[:63]
