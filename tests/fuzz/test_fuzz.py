"""A few inputs for every parser, the same each time, and every input that once did harm; ``make fuzz`` does more."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from foedus_protocols.errors import FoedusError, VerificationError
from fuzz import mutate
from fuzz.targets import GROUPS, KEPT, NAMES, Group
from fuzz.watch import MARKER, Target, inputs, judge

pytestmark = pytest.mark.xdist_group("fuzz")

_INPUTS = 50
_SEED = 20


class Parsers:
    """All parsers, each group made when its first is asked for: what reads documents runs before ports are open."""

    def __init__(self, scratch: Path, stack: ExitStack) -> None:
        self._scratch, self._stack = scratch, stack
        self._made: dict[Group, dict[str, Target]] = {}

    def __getitem__(self, name: str) -> Target:
        return self.of(next(group for names, group in GROUPS.items() if name in names))[name]

    def of(self, group: Group) -> dict[str, Target]:
        """A group's parsers by name."""
        if group not in self._made:
            scratch = self._scratch / group.__module__.rpartition(".")[2]
            self._made[group] = {target.name: target for target in group(scratch, self._stack)}
        return self._made[group]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parsers]:
    """All parsers; what they opened is closed at the end."""
    with ExitStack() as stack:
        yield Parsers(tmp_path_factory.mktemp("fuzz"), stack)


@pytest.mark.parametrize("name", NAMES)
def test_a_valid_input_passes_and_a_wrong_one_is_refused_by_an_error_of_ours(targets: Parsers, name: str) -> None:
    target = targets[name]
    passed = [_passes(target, seed) for seed in target.seeds]
    assert any(passed), "no seed reaches beyond a refusal"
    for number, data in enumerate(inputs(target, _SEED, _INPUTS)):
        assert judge(target, data) is None, f"input {number} of seed {_SEED}"


@pytest.mark.parametrize("path", sorted(KEPT.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_once_did_harm_is_refused(targets: Parsers, path: Path) -> None:
    assert judge(targets[path.parent.name], path.read_bytes()) is None


def test_every_parser_is_listed(targets: Parsers) -> None:
    for names, group in GROUPS.items():
        assert tuple(targets.of(group)) == names


def _passes(target: Target, data: bytes) -> bool:
    try:
        target.parse(data)
    except FoedusError:
        return False
    return True


# The watch itself


def crash(data: bytes) -> None:
    raise IndexError("list index out of range")


def leak(data: bytes) -> None:
    raise VerificationError(f"expected a row, got {MARKER}")


def hang(data: bytes) -> None:
    while True:
        pass


def grow(data: bytes) -> None:
    bytearray(96 << 20)[:: 1 << 12] = bytes(96 << 8)


@pytest.mark.parametrize(("parse", "kind"), [(crash, "crash"), (leak, "leak"), (hang, "hang"), (grow, "memory")])
def test_the_watch_sees_what_a_parser_must_not_do(parse: Callable[[bytes], None], kind: str) -> None:
    target = Target(name="bad", seeds=[b"x"], mutate=mutate.bytewise, parse=parse, hang_seconds=0.2)
    if kind == "memory" and judge(target, b"x") is None:
        pytest.skip("this kernel does not tell a process's peak of memory")
    found = judge(target, b"x")
    assert found is not None
    assert found.kind == kind


def test_an_error_of_ours_is_no_finding() -> None:
    def refuse(data: bytes) -> None:
        raise VerificationError("expected something else")

    assert judge(Target(name="good", seeds=[b"x"], mutate=mutate.bytewise, parse=refuse), b"x") is None


@pytest.mark.parametrize(
    "change", [mutate.bytewise, mutate.json_bytes, mutate.canonical, mutate.json_lines, mutate.toml]
)
def test_a_seed_names_its_inputs_and_most_are_changed(change: mutate.Mutator) -> None:
    seeds = [b'{"a": [1, 2, {"b": "text"}], "c": 0.5}']
    made = [change(random.Random(number), seeds) for number in range(200)]
    assert made == [change(random.Random(number), seeds) for number in range(200)]
    assert sum(data != seeds[0] for data in made) > 120
    assert len(set(made)) > 60
