"""Valid inputs made wrong: bytes, JSON, protobuf messages, TOML and lines of text.

A random string dies in a parser's first branch. Here each mutation starts from something valid and keeps its outer form
where it can (canonical JSON stays canonical, a file's header length stays right), so that what is wrong is reached deep
inside. Everything is drawn from one `random.Random`, so a seed names an input.
"""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from foedus_protocols.canonical import canonical_bytes
from google.protobuf.message import DecodeError

Mutator = Callable[[random.Random, Sequence[bytes]], bytes]
"""(randomness, valid inputs) -> an input that is probably not valid."""

NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 12, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53 - 1, 2**53, 2**63, 2**64, 10**30, 10**400, -(2**63),
    0.0, -0.0, 0.5, 1e-300, 1e300, 5e-324, math.inf, -math.inf, math.nan,
)  # fmt: skip
STRINGS = (
    "", " ", "0", "-1", "a", "coordinator", "record", "text", "none", "../../etc/passwd", "/", "\x00", "\n", "\r",
    "\u2028", "\ufeff", "\udc80", "\U0001f600", "é", "e\u0301", "a" * 63, "a" * 64, "f" * 64, "0" * 128, "x" * 5000,
    "spiffe://test-league/org/ash", "%s%n", "{}", "[]", "null", "<|end|>", "<|start|>assistant", "=1+1",
)  # fmt: skip
_DEEP = (10, 100, 3000)
_NEST = "@nested-"  # Stands for so many lists in each other until the text is there: Python cannot copy them either.
_NESTED = re.compile(rb'"@nested-(\d{2,4})"')


def bytewise(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Flip, cut, insert, repeat and splice bytes."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(8):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at % len(data)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x22, 0x2C, 0x5B, 0x7B))
            case 2:
                del data[at : at + rng.choice((1, 2, 8, 64, 1 << 16))]
            case 3:
                data[at:at] = rng.randbytes(rng.choice((1, 4, 32)))
            case 4:
                piece = data[at : at + rng.choice((1, 8, 64))]
                data[at:at] = piece * rng.choice((2, 30, 300))
            case 5:
                other = rng.choice(seeds)
                data[at:] = other[rng.randrange(len(other) + 1) :]
            case 6:
                width = rng.choice((1, 2, 4, 8))
                data[at : at + width] = rng.choice((0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1))).to_bytes(
                    width, rng.choice(("little", "big"))
                )
            case _:
                data = data[:at]
    return bytes(data)


def changed(rng: random.Random, value: Any) -> Any:
    """A JSON value with one to four places changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = _change_one(rng, value)
    return value


def json_bytes(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """JSON with places changed, in a spelling that a parser may not like; sometimes only its bytes are changed."""
    if rng.random() < 0.25:
        return bytewise(rng, seeds)
    try:
        value = json.loads(rng.choice(seeds))
    except (ValueError, RecursionError):  # Wrong already.
        return bytewise(rng, seeds)
    return _spelled(changed(rng, value), rng)


def canonical(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """JSON with places changed, in canonical form where it has one."""
    if rng.random() < 0.2:
        return bytewise(rng, seeds)
    try:
        value = json.loads(rng.choice(seeds))
    except (ValueError, RecursionError):  # Wrong already.
        return bytewise(rng, seeds)
    value = changed(rng, value)
    try:
        return _nest(canonical_bytes(value))
    except ValueError:  # Has no canonical form.
        return _spelled(value, rng)


def json_lines(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Lines of JSON of which one or two are changed."""
    if rng.random() < 0.25:
        return bytewise(rng, seeds)
    lines = rng.choice(seeds).split(b"\n")
    for _ in range(rng.choice((1, 2))):
        at = rng.randrange(len(lines))
        try:
            lines[at] = _spelled(changed(rng, json.loads(lines[at])), rng)
        except (ValueError, RecursionError):  # Wrong already.
            lines[at] = bytewise(rng, [lines[at]])
    return rng.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(lines)


def table(separator: str) -> Mutator:
    """Rows of separated values with cells, quotes and row lengths changed."""

    def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        if rng.random() < 0.3:
            return bytewise(rng, seeds)
        rows = [line.split(separator) for line in rng.choice(seeds).decode().split("\n")]
        for _ in range(rng.choice((1, 2, 4))):
            row = rng.choice(rows)
            at = rng.randrange(len(row))
            match rng.randrange(6):
                case 0:
                    row[at] = rng.choice(STRINGS)
                case 1:
                    row[at] = '"' + rng.choice(STRINGS).replace('"', '""') + '"'
                case 2:
                    row[at] = '"' + row[at]
                case 3:
                    row.insert(at, row[at])
                case 4:
                    del row[at : at + 1]
                    row or row.append("")
                case _:
                    row[at] += rng.choice(('"', "\r", "\x00", '""', separator * 50))
        return "\n".join(separator.join(row) for row in rows).encode("utf-8", "surrogatepass")

    return mutate


def toml(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """TOML with a value, a key or a header changed, or nested deeply."""
    if rng.random() < 0.2:
        return bytewise(rng, seeds)
    lines = rng.choice(seeds).decode().split("\n")
    for _ in range(rng.choice((1, 2, 3))):
        at = rng.randrange(len(lines))
        key, equals, _ = lines[at].partition("=")
        match rng.randrange(5):
            case 0 | 1 if equals:
                lines[at] = f"{key}= {_toml_value(rng)}"
            case 2:
                lines.insert(at, lines[rng.randrange(len(lines))])
            case 3:
                del lines[at : at + 1]
                lines = lines or [""]
            case _:
                lines[at] = rng.choice(("[x]", "[[participants]]", "[a.b.c]", "x = 1", "= 1", '"" = 1', "[", "#\x00"))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def message(kind: Any, fields: dict[str, Mutator]) -> Mutator:
    """A protobuf message whose `bytes` fields are themselves mutated, or whose encoding is.

    Args:
        kind: The generated class.
        fields: How each field that holds a document is mutated.
    """

    def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        if rng.random() < 0.25:
            return bytewise(rng, seeds)
        try:
            built = kind.FromString(rng.choice(seeds))
        except DecodeError:  # Wrong already.
            return bytewise(rng, seeds)
        for descriptor, value in list(built.ListFields()):
            if rng.random() < 0.5:
                continue
            _set(rng, built, descriptor, value, fields)
        encoded: bytes = built.SerializeToString()
        return encoded

    return mutate


def _set(rng: random.Random, built: Any, descriptor: Any, value: Any, fields: dict[str, Mutator]) -> None:
    name = descriptor.name
    if descriptor.type == descriptor.TYPE_BYTES:
        setattr(built, name, fields.get(name, bytewise)(rng, [value or b"{}"]))
    elif descriptor.type == descriptor.TYPE_STRING:
        setattr(built, name, _text(rng, value).encode("utf-8", "replace").decode())
    elif descriptor.type == descriptor.TYPE_DOUBLE:
        setattr(built, name, rng.choice((0.0, -1.0, 0.01, math.nan, math.inf, -math.inf, 1e308)))
    elif descriptor.type in (descriptor.TYPE_UINT64, descriptor.TYPE_INT64):
        setattr(built, name, rng.choice((0, 1, 2**20, 2**31, 2**32, 2**63 - 1)))
    elif descriptor.type == descriptor.TYPE_MESSAGE and rng.random() < 0.3:
        built.ClearField(name)
    elif descriptor.type == descriptor.TYPE_MESSAGE:
        for inner, inside in list(value.ListFields()):
            _set(rng, getattr(built, name), inner, inside, fields)


def _change_one(rng: random.Random, value: Any) -> Any:
    """Walk to a random place and change what is there."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(sorted(value))
        match rng.randrange(8):
            case 0:
                del value[key]
            case 1:
                value[rng.choice((*STRINGS, key + "x", key.upper()))] = value[key]
            case _:
                value[key] = _change_one(rng, value[key])
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        match rng.randrange(8):
            case 0:
                del value[at]
            case 1:
                value[at:at] = [copy.deepcopy(value[at])] * rng.choice((1, 2, 300))
            case 2:
                value.reverse()
            case _:
                value[at] = _change_one(rng, value[at])
        return value
    return _other(rng, value)


def _other(rng: random.Random, value: Any) -> Any:
    """Another value for one place, near what was there or far from it."""
    if isinstance(value, str) and rng.random() < 0.5:
        return _text(rng, value)
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice(
            (value + 1, value - 1, -value, value * 2, float(value) if abs(value) < 1e300 else 0, str(value))
        )
    match rng.randrange(6):
        case 0:
            return rng.choice(NUMBERS)
        case 1:
            return rng.choice(STRINGS)
        case 2:
            return rng.choice((None, True, False, [], {}, [None], {"": None}, [[]], [{}]))
        case 3:
            return [value]
        case 4:
            return f"{_NEST}{rng.choice(_DEEP)}"
        case _:
            return {"a": value}


def _text(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    match rng.randrange(6):
        case 0:
            return text[:at]
        case 1:
            return text[:at] + rng.choice(STRINGS) + text[at:]
        case 2:
            return text.upper()
        case 3:
            return text + text
        case 4 if text:
            at %= len(text)
            return text[:at] + rng.choice("0f9z/\x00é\n") + text[at + 1 :]
        case _:
            return rng.choice(STRINGS)


def _spelled(value: Any, rng: random.Random) -> bytes:
    """JSON as Python writes it, with the signs that JSON does not have."""
    try:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    except ValueError:  # An integer of more digits than Python writes.
        text = "[" + "9" * 5000 + "]"
    return _nest(text.encode("utf-8", "surrogatepass"))


def _nest(text: bytes) -> bytes:
    return _NESTED.sub(lambda found: b"[" * int(found[1]) + b"]" * int(found[1]), text)


def _toml_value(rng: random.Random) -> str:
    depth = rng.choice(_DEEP)
    return rng.choice(
        (
            *(str(number) for number in NUMBERS if not isinstance(number, float)),
            *(json.dumps(text) for text in STRINGS),
            "nan",
            "inf",
            "-inf",
            "1e400",
            "true",
            "[]",
            "{}",
            "1979-05-27T07:32:00Z",
            "'''x",
            '"\\ud800"',
            "0x",
            "[1,",
            "[" * depth + "]" * depth,
            "{a=" * depth + "1" + "}" * depth,
            "[{}, 1]",
            "99:99:99",
        )
    )
