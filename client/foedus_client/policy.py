"""The organisation's own rules: what its daemon may sign, on which data, within which bounds.

One TOML file, `policy.toml`, deny by default: an empty one allows nothing. A person writes it; the commands that
register data, bases, coordinators and peers add to it in place and keep every comment. No charter can widen it, and
nothing in it is computed from data: `units_at_most` is a declaration, a power of two, as public as the organisation's
size.
"""

from __future__ import annotations

import fcntl
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomlkit
from foedus_protocols.charter_checks import MAX_PARAMETERS, Limits, UnitNamespace
from foedus_protocols.errors import ConfigError, PolicyRefused
from foedus_protocols.files import disk_errors, write_durably
from foedus_protocols.identity import human_fingerprint, parse_fingerprint
from foedus_protocols.messages import Digest, OrgId
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import AoT, Array, Table

Name = Annotated[str, Field(min_length=1, max_length=100)]
PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1)]

POLICY_TEMPLATE = """\
# What this organisation's Foedus daemon may do. Everything that is not allowed here is refused.
# `foedus client join`, `data add` and `peers --confirm` add entries; comments stay.

# Operators whose charters may be signed: their public keys, as `foedus client join` shows them.
coordinators = []

# What our data may be used for. A charter names one purpose; a data set below must serve it.
purposes = []

# A charter must name at least so many OTHER organisations, each confirmed under [peers].
minimum_members = 2

# true: sign a charter that passes every check without asking a person.
auto_sign = false

# true: take part in runs of mode "none", which protect nobody. For public data and comparisons only.
allow_unprotected = false

# Bounds on what a charter may ask for.
[bounds]
max_tokens = 1024               # of one record
max_records_per_unit = 16
max_rounds = 1000
max_rate = 1.0                  # of the optimiser
max_rank = 64                   # of the adapter
max_parameters = 134217728      # of the adapter: 512 MiB of fp32, and a step holds some six arrays of so many
min_survivors = 2               # a sum of fewer vectors is never published
evaluation = ["none"]           # add "plain" to let held-out scores leave without noise: epsilon does not cover them

# Fingerprints of other organisations' signing keys, compared with them over another channel.
[peers]

# Base models that may be trained on: the digest of manifest.json, and where our copy is.
#[[bases]]
#digest = "..."
#path = "/srv/models/gpt-oss-20b"

# Populations of privacy units, and the budget that belongs to each for ever, whatever is run on which of its data sets.
#[namespaces.patients]
#unit = "patient"               # what one unit of privacy is
#units_at_most = 4096           # a power of two that a person declares; never a count
#epsilon_cap = 8.0              # what one unit may lose, at most, over all runs together
#delta = 1e-5                   # at most 1/(10 x units_at_most)

# Data sets. One serves each purpose.
#[[datasets]]
#name = "letters"
#purposes = ["care-research"]
#namespace = "patients"
#files = ["/srv/data/letters.jsonl.gz"]
#units = "patient_id"           # a field; or {letters = "patient_id"}, one a file; or "record", each record a unit
#[datasets.columns.letters]     # only where the shape of a file is not recognised
#question = "subject"
#answer = "body"
"""


class Section(BaseModel):
    """Base of every part of a policy: frozen, strict, and without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class BaseEntry(Section):
    """A base model that may be trained on, and where our copy is."""

    digest: Digest
    path: str


class Namespace(Section):
    """A population of privacy units and its budget."""

    unit: Name
    units_at_most: Count
    epsilon_cap: Annotated[FiniteFloat, Field(gt=0, le=100)]
    delta: Annotated[FiniteFloat, Field(gt=0, lt=1)] = 1e-5

    @model_validator(mode="after")
    def _declared(self) -> Self:
        if self.units_at_most & (self.units_at_most - 1):
            raise ValueError(f"units_at_most must be a power of two, got {self.units_at_most}: round it up to one")
        if self.delta * 10 * self.units_at_most > 1:
            raise ValueError(f"delta must be at most 1/(10 x {self.units_at_most}), got {self.delta:g}: lower it")
        return self


class DatasetEntry(Section):
    """One data set: its files, what it may be used for, and how its records group into units.

    Attributes:
        units: The field that names a record's unit; a map from file stem to field; or ``record``.
        columns: File stem to a map from role (question, context, answer, ...) to the file's column.
    """

    name: Name
    purposes: Annotated[list[Name], Field(min_length=1)]
    namespace: Name
    files: Annotated[list[str], Field(min_length=1)]
    units: dict[str, str] | Name
    columns: dict[str, dict[str, str]] = {}


class Bounds(Section):
    """What a charter may ask for at most (`min_survivors`: at least)."""

    max_tokens: Count = 1024
    max_records_per_unit: Count = 16
    max_rounds: Count = 1000
    max_rate: Annotated[FiniteFloat, Field(gt=0)] = 1.0
    max_rank: Count = 64
    max_parameters: Count = MAX_PARAMETERS
    min_survivors: Count = 2
    evaluation: list[Literal["none", "plain"]] = ["none"]


class Policy(Section):
    """The whole file."""

    coordinators: list[PublicKey] = []
    purposes: list[Name] = []
    minimum_members: Count = 2
    auto_sign: bool = False
    allow_unprotected: bool = False
    bounds: Bounds = Bounds()
    peers: dict[OrgId, Digest] = {}
    bases: list[BaseEntry] = []
    namespaces: dict[Name, Namespace] = {}
    datasets: list[DatasetEntry] = []

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        served: dict[str, str] = {}
        drawn: dict[str, DatasetEntry] = {}
        names = [dataset.name for dataset in self.datasets]
        if len(set(names)) != len(names):
            raise ValueError("two data sets have the same name")
        for dataset in self.datasets:
            if dataset.namespace not in self.namespaces:
                raise ValueError(
                    f"data set {dataset.name!r} draws on {dataset.namespace!r}, which is no namespace here"
                )
            for purpose in dataset.purposes:
                if purpose in served:
                    raise ValueError(f"data sets {served[purpose]!r} and {dataset.name!r} both serve {purpose!r}")
                served[purpose] = dataset.name
            for file in dataset.files:
                other = drawn.setdefault(os.path.realpath(file), dataset)
                if other.namespace != dataset.namespace:
                    raise ValueError(
                        f"file {file} is in data set {other.name!r} of namespace {other.namespace!r} and in "
                        f"{dataset.name!r} of {dataset.namespace!r}: its units would have two budgets; keep one"
                    )
        return self

    def dataset_for(self, purpose: str) -> DatasetEntry:
        """The data set that serves a purpose.

        Raises:
            PolicyRefused: The purpose is not allowed, or no data set serves it (check 9).
        """
        found = [dataset for dataset in self.datasets if purpose in dataset.purposes]
        if purpose not in self.purposes or not found:
            raise PolicyRefused(
                9,
                f"expected a purpose that our policy allows and a data set serves, got {purpose!r}: "
                "see `purposes` and `datasets` in policy.toml",
            )
        return found[0]

    def base_path(self, digest: str) -> Path:
        """Where our copy of a base is.

        Raises:
            PolicyRefused: The base is not allowed (check 7).
        """
        for base in self.bases:
            if base.digest == digest:
                return Path(base.path)
        raise PolicyRefused(7, f"expected a base of our policy, got {digest[:12]}: add it to `bases` in policy.toml")

    def limits(self) -> Limits:
        """The policy as the charter checks take it."""
        served = {
            purpose: self.namespaces[dataset.namespace].model_dump() | {"name": dataset.namespace}
            for dataset in self.datasets
            for purpose in dataset.purposes
            if purpose in self.purposes
        }
        return Limits(
            coordinators=frozenset(self.coordinators),
            minimum_members=self.minimum_members,
            peers=self.peers,
            namespaces={purpose: UnitNamespace(**namespace) for purpose, namespace in served.items()},
            allow_unprotected=self.allow_unprotected,
            evaluation=frozenset(self.bounds.evaluation),
            max_tokens=self.bounds.max_tokens,
            max_records_per_unit=self.bounds.max_records_per_unit,
            max_rounds=self.bounds.max_rounds,
            max_rate=self.bounds.max_rate,
            max_rank=self.bounds.max_rank,
            max_parameters=self.bounds.max_parameters,
            min_survivors=self.bounds.min_survivors,
        )


def load(path: Path) -> Policy:
    """Read a policy.

    Raises:
        ConfigError: No such file, not UTF-8, not TOML, or a field is unknown, missing or of the wrong type. The text
            names fields.
    """
    try:
        return _parse(path, path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"expected a policy in {path}, got: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"expected UTF-8 in {path}, got: {error.reason} at byte {error.start}") from error


def write_template(path: Path) -> None:
    """Write the commented default policy, which allows nothing; an existing file is left as it is."""
    if not path.exists():
        write_durably(path, POLICY_TEMPLATE.encode(), mode=0o600, overwrite=False)


def add_dataset(path: Path, dataset: DatasetEntry, namespace: Namespace) -> None:
    """Register a data set, its namespace and its purposes.

    Raises:
        ConfigError: The name or a purpose is taken, or the namespace exists with other terms: a budget is declared
            once.
    """

    def change(document: tomlkit.TOMLDocument) -> None:
        namespaces = _table(document, "namespaces")
        terms = namespace.model_dump()
        if dataset.namespace not in namespaces:
            namespaces[dataset.namespace] = terms
        elif Namespace.model_validate(namespaces[dataset.namespace].unwrap()) != namespace:
            raise ConfigError(
                f"expected the terms that namespace {dataset.namespace!r} was declared with, got others: "
                f"edit [namespaces.{dataset.namespace}] in {path}, or use another name"
            )
        _tables(document, "datasets").append(_item(dataset.model_dump(exclude_defaults=True)))
        for purpose in dataset.purposes:
            _add_once(_array(document, "purposes"), purpose)

    _edit(path, change)


def add_base(path: Path, base: BaseEntry) -> None:
    """Allow a base model; a base that is there gets the new path."""

    def change(document: tomlkit.TOMLDocument) -> None:
        tables = _tables(document, "bases")
        for table in tables:
            if table.get("digest") == base.digest:
                table["path"] = base.path
                return
        tables.append(_item(base.model_dump()))

    _edit(path, change)


def add_coordinator(path: Path, operator_key: str) -> None:
    """Allow an operator's charters to be signed."""
    _edit(path, lambda document: _add_once(_array(document, "coordinators"), operator_key))


def confirm_peers(path: Path, fingerprints: Mapping[str, str]) -> None:
    """Write down that a person compared the fingerprints of some organisations' signing keys; all of them or none.

    Args:
        path: The policy.
        fingerprints: By organisation.

    Raises:
        ConfigError: Another key was confirmed for one of them before.
    """
    confirmed = {org: parse_fingerprint(fingerprint) for org, fingerprint in fingerprints.items()}

    def change(document: tomlkit.TOMLDocument) -> None:
        peers = _table(document, "peers")
        for org, fingerprint in confirmed.items():
            if peers.get(org, fingerprint) != fingerprint:
                raise ConfigError(
                    f"expected the key of {org!r} that was confirmed before, got {human_fingerprint(fingerprint)}: "
                    f"if it really has a new key, remove its line under [peers] in {path} first"
                )
            peers[org] = fingerprint

    _edit(path, change)


# --- TOML ------------------------------------------------------------------------------------------------------------


def _parse(path: Path, text: str) -> Policy:
    try:
        return Policy.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"expected TOML in {path}, got: {error}") from error
    except ValidationError as error:
        found = "; ".join((".".join(map(str, item["loc"])) or "policy") + ": " + item["msg"] for item in error.errors())
        raise ConfigError(f"expected a policy in {path}, got: {found}") from None


def _edit(path: Path, change: Callable[[tomlkit.TOMLDocument], None]) -> None:
    """Change a policy in place, atomically; the file stays as it was if the result is no valid policy.

    Commands that change it at the same time wait for each other, so that neither loses the other's entry.
    """
    with _sole_editor(path):
        _edit_alone(path, change)


@contextmanager
def _sole_editor(path: Path) -> Iterator[None]:
    """Hold a lock beside the policy, which itself is replaced by each edit."""
    with disk_errors(path):
        descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _edit_alone(path: Path, change: Callable[[tomlkit.TOMLDocument], None]) -> None:
    load(path)
    try:
        document = tomlkit.parse(path.read_text(encoding="utf-8"))
        change(document)
        text = tomlkit.dumps(document)
    except TOMLKitError as error:
        raise ConfigError(f"expected a policy that can be edited in {path}, got: {error}") from error
    _parse(path, text)
    write_durably(path, text.encode(), mode=0o600)


def _table(document: tomlkit.TOMLDocument, name: str) -> Table:
    if name not in document:
        document[name] = tomlkit.table(is_super_table=name == "namespaces")
    found = document[name]
    if not isinstance(found, Table):
        raise ConfigError(f"expected a table [{name}], got another form of it: write it as [{name}]")
    return found


def _tables(document: tomlkit.TOMLDocument, name: str) -> AoT:
    if name not in document:
        document[name] = tomlkit.aot()
    found = document[name]
    if not isinstance(found, AoT):
        raise ConfigError(f"expected blocks [[{name}]], got another form of them: write them as [[{name}]]")
    return found


def _array(document: tomlkit.TOMLDocument, name: str) -> Array:
    if name not in document:
        document[name] = tomlkit.array()
    found = document[name]
    if not isinstance(found, Array):
        raise ConfigError(f"expected a list {name} = [...], got something else")
    return found


def _add_once(array: Array, value: str) -> None:
    if value not in array:
        array.append(value)


def _item(values: dict[str, Any]) -> Table:
    table = tomlkit.table()
    for key, value in values.items():
        table[key] = value
    return table
