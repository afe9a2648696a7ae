"""Which records belong to one privacy unit, and which units are held out.

A unit is the value of one field (a patient, a matter, a topic), or a single record. Both questions are answered from
the unit alone, under a key that stays in the organisation: nothing depends on how many other units there are, so that
adding one unit never moves another (``docs/privacy.md``, "Held-out units").
"""

from __future__ import annotations

import hashlib
import hmac
import json
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from foedus_protocols.canonical import digest
from foedus_protocols.errors import UsageError

from foedus_client.datasets.formats import COLUMN_ROLES, RowError
from foedus_client.datasets.readers import stem

RECORD = "record"
EVERY_FILE = "*"
_HELDOUT_ONE_IN = 5

Units = str | Mapping[str, str]
"""One field for all files, or a field by file name (`EVERY_FILE` for those not named); `RECORD` for single records."""

Columns = Mapping[str, Mapping[str, str]]
"""By file name, which column plays which role."""


def parse_units(options: Iterable[str]) -> str | dict[str, str]:
    """Read ``--unit FIELD``, ``--unit record`` and ``--unit NAME=FIELD`` options.

    Raises:
        UsageError: None was given, or two speak of the same files.
    """
    fields: dict[str, str] = {}
    for option in options:
        name, separator, field = option.partition("=")
        file, field = (stem(name), field) if separator else (EVERY_FILE, name)
        if not file or not field:
            raise UsageError(f"expected --unit FIELD, --unit NAME=FIELD or --unit record, got {option!r}")
        if file in fields:
            raise UsageError(f"--unit names a field for {'all files' if file == EVERY_FILE else file} twice")
        fields[file] = field
    if not fields:
        raise UsageError(
            "the privacy unit is missing: --unit FIELD names the column whose value is one person or matter, "
            "--unit record protects single records"
        )
    return fields[EVERY_FILE] if fields.keys() == {EVERY_FILE} else fields


def parse_columns(options: Iterable[str]) -> dict[str, dict[str, str]]:
    """Read ``--columns FILE:question=COLUMN,context=COLUMN,answer=COLUMN`` (or ``FILE:text=COLUMN``) options.

    Raises:
        UsageError: An option has another form, or lacks a role.
    """
    columns: dict[str, dict[str, str]] = {}
    for option in options:
        file, _, pairs = option.rpartition(":")
        roles = dict(pair.partition("=")[::2] for pair in pairs.split(","))
        wanted = roles.keys() == {"text"} or {"question", "answer"} <= roles.keys() <= set(COLUMN_ROLES) - {"text"}
        if not file or not wanted or not all(roles.values()):
            raise UsageError(
                "expected --columns FILE:question=COLUMN,context=COLUMN,answer=COLUMN or FILE:text=COLUMN, "
                f"got {option!r}"
            )
        columns[stem(file)] = roles
    return columns


def unit_field(units: Units, path: Path) -> str:
    """The field that holds a file's unit, or `RECORD`.

    Raises:
        UsageError: Nothing was said about this file.
    """
    if isinstance(units, str):
        return units
    field = units.get(stem(path), units.get(EVERY_FILE))
    if field is None:
        raise UsageError(f"the privacy unit of {path.name} is missing: add --unit {stem(path)}=FIELD")
    return field


def check_names(files: Iterable[Path], units: Units, columns: Columns) -> None:
    """Refuse settings for files that are not there: a misspelt name would be ignored in silence.

    Raises:
        UsageError: A name matches none of the files.
    """
    names = {stem(path) for path in files}
    named = set(columns) | (set() if isinstance(units, str) else set(units) - {EVERY_FILE})
    if unknown := sorted(named - names):
        raise UsageError(f"expected one of the files {', '.join(sorted(names))}, got {', '.join(unknown)}")


def unit_key(values: Mapping[str, Any], field: str) -> str:
    """The unit of a row, as text.

    Two spellings of one identifier (5 and "5", composed and decomposed letters, blanks around) are one unit. Under
    `RECORD` the row's content is the unit, so that two equal rows share one.

    Raises:
        RowError: The field is missing, empty, or neither text nor a whole number.
    """
    if field == RECORD:
        return digest(json.dumps(values, sort_keys=True).encode())
    value = values.get(field)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError(f"the unit field {field} is {'missing' if value is None else 'neither text nor a whole number'}")
    text = unicodedata.normalize("NFC", str(value)).strip()
    if not text:
        raise RowError(f"the unit field {field} is empty")
    return text


def key_hash(split_key: bytes, unit: str) -> str:
    """HMAC-SHA-256 of a unit under the namespace's key, in hexadecimal: the only name of a unit outside this module."""
    return hmac.new(split_key, unit.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def is_held_out(hashed: str) -> bool:
    """Whether a unit measures instead of training.

    Guarantees:
        A threshold on the unit's own keyed digest (a fifth of the range): independent of every other unit, and of how
        many there are.
    """
    return int(hashed, 16) * _HELDOUT_ONE_IN < 1 << 256
