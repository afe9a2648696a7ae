"""Registering a data set: what it is for, what one unit of privacy is, and what may ever be lost about one.

These are declarations of a person, not statistics. The files are read once, here, to show what training would see and
to refuse a bound on the number of units that is already passed; nothing of that leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from foedus_protocols.errors import ConfigError
from foedus_protocols.manifest import TOKENIZER_FILE, read_manifest
from pydantic import ValidationError

from foedus_client import policy
from foedus_client.config import Home
from foedus_client.datasets.load import Dataset, load_dataset
from foedus_client.datasets.units import parse_columns, parse_units
from foedus_client.policy import BaseEntry, DatasetEntry, Namespace


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What a person says about some files.

    Attributes:
        units: ``--unit`` options: FIELD, NAME=FIELD or record.
        columns: ``--columns`` options.
        base: Folder of the base model that will be trained; it is allowed in the policy.
    """

    files: tuple[Path, ...]
    name: str
    purposes: tuple[str, ...]
    namespace: str
    units: tuple[str, ...]
    columns: tuple[str, ...]
    units_at_most: int
    epsilon_cap: float
    delta: float
    max_tokens: int
    max_records_per_unit: int
    base: Path


def register(home: Home, declared: Declaration) -> tuple[Dataset, str]:
    """Read the files, then write data set, namespace, purposes and base into the policy.

    Returns:
        What was read, and the lines that the operator puts into the charter.

    Raises:
        DataError: A file cannot be read or holds no usable row.
        ConfigError: More units than declared, or the policy has other terms for this name or namespace.
        CheckpointError: The base's folder is not a base.

    Guarantees:
        The policy changes only when everything was found right.
    """
    base = BaseEntry(digest=read_manifest(declared.base).digest, path=str(declared.base.absolute()))
    entry, namespace = _entries(declared)
    found = load_dataset(
        declared.files,
        units=entry.units,
        columns=entry.columns,
        tokenizer_path=declared.base / TOKENIZER_FILE,
        max_tokens=declared.max_tokens,
        max_records_per_unit=declared.max_records_per_unit,
        split_key=bytes.fromhex(home.split_key(declared.namespace)),
    )
    if found.report.units > declared.units_at_most:
        raise ConfigError(
            f"expected at most {declared.units_at_most} units as declared, the files hold more; "
            f"declare the next power of two that covers them and what is to come"
        )
    policy.add_dataset(home.policy, entry, namespace)
    policy.add_base(home.policy, base)
    return found, participant_lines(home.load().org, namespace)


def _entries(declared: Declaration) -> tuple[DatasetEntry, Namespace]:
    """The declaration as the policy has it; a ConfigError where the policy would not take it."""
    units = parse_units(declared.units)
    try:
        namespace = Namespace(
            unit=unit_name(units),
            units_at_most=declared.units_at_most,
            epsilon_cap=declared.epsilon_cap,
            delta=declared.delta,
        )
        entry = DatasetEntry(
            name=declared.name,
            purposes=list(declared.purposes),
            namespace=declared.namespace,
            files=[str(path.absolute()) for path in declared.files],
            units=units,
            columns=parse_columns(declared.columns),
        )
    except ValidationError as error:
        found = "; ".join((".".join(map(str, item["loc"])) or "") + " " + item["msg"] for item in error.errors())
        raise ConfigError(f"expected a declaration that the policy can hold, got: {found.strip()}") from None
    return entry, namespace


def unit_name(units: str | dict[str, str]) -> str:
    """What one unit of privacy is called in charters: the field's name, or the fields' where files differ."""
    return units if isinstance(units, str) else "/".join(sorted(set(units.values())))


def participant_lines(org: str, namespace: Namespace) -> str:
    """What the operator copies into the charter's TOML."""
    return f'[[participants]]\nid = "{org}"\nunit = "{namespace.unit}"\nunits_at_most = {namespace.units_at_most}\n'
