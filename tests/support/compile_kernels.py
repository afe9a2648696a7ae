"""Compile every kernel for every architecture without a card, and say what it takes: a program of its own.

The interpreter hides what a compiler finds: types that do not meet, layouts that do not exist, registers that spill to
memory. Triton compiles for a named target on any machine and brings NVIDIA's assembler; what it assembled says the
registers of a thread and what it spilled to its stack, Triton the shared memory of a program. Nothing of it is a time.
`test_compiles.py` runs this where Triton is not told to interpret; by hand::

    PYTHONPATH=kernels:tests python -m support.compile_kernels [words of a kernel's name]

To add a kernel, add a line to `cases`: its module and name, the values of its constants, the types of its pointers and
other arguments in order, warps and stages as its launcher has them. Shapes are gpt-oss's. What runs in float32 is for
tests, and is compiled for one architecture to save time.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
_MODULES = "foedus_kernels.device"


class Case(NamedTuple):
    """One kernel as a launcher would start it."""

    label: str
    kernel: str  # module.name in foedus_kernels.device
    types: str  # of the arguments that are not constants, in order: * for a pointer, all 16 bytes aligned
    constants: dict[str, Any]
    warps: int
    stages: int

    @property
    def architectures(self) -> tuple[int, ...]:
        """What it is compiled for."""
        return (90,) if self.label.endswith("fp32") else ARCHITECTURES


def cases() -> list[Case]:
    """Every kernel at gpt-oss's shapes."""
    return [*_experts(), *_mxfp4(), *_clip(), *_log_sparse()]


def _experts() -> list[Case]:
    from foedus_kernels.device.experts import blocks_of

    found = []
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        blocks = blocks_of(2880, dtype)
        tile = {"ROWS": blocks.rows, "COLUMNS": blocks.columns, "INNER": blocks.inner}
        how = (blocks.warps, blocks.stages)
        routed = "*i64 *i32 *i64 *i64"
        pairs = {"RANK": 8, "PADDED": 16, "SHARED": False}
        shape = {"E": 128, "N": 5760, "K": 2880, "CHOICES": 4}
        forward = f"*{name} *u8 *u8 *{name} *{name} *{name} {routed} *{name} *{name} fp32 fp32 fp32"
        adjoint = f"*{name} *u8 *u8 *{name} *{name} {routed} *{name} fp32"
        down = shape | {"N": 2880, "CHOICES": 0}
        found += [
            Case(
                f"gate_up, {name}",
                "experts_kernels.forward_kernel",
                forward,
                shape | pairs | {"ACTIVATED": True} | tile,
                *how,
            ),
            Case(
                f"down, {name}",
                "experts_kernels.forward_kernel",
                forward,
                down | pairs | {"ACTIVATED": False} | tile,
                *how,
            ),
            Case(
                f"adjoint of down, {name}",
                "experts_kernels.adjoint_kernel",
                adjoint,
                down | {"CHOICES": 4} | pairs | tile,
                *how,
            ),
            Case(
                f"adjoint of gate_up, {name}",
                "experts_kernels.adjoint_kernel",
                adjoint,
                shape | {"CHOICES": 0} | pairs | tile,
                *how,
            ),
            Case(
                f"narrow, {name}",
                "experts_kernels.narrow_kernel",
                f"*{name} *{name} {routed} *{name}",
                {"E": 128, "K": 2880, "CHOICES": 4, "ALONG": 1, "ACROSS": 2880, "ROWS": blocks.rows}
                | pairs
                | {"INNER": blocks.inner},
                *how,
            ),
            Case(
                f"combine, {name}",
                "experts_kernels.combine_kernel",
                f"*{name} *i64 *fp32 *{name}",
                {"K": 2880, "CHOICES": 4, "WEIGHTED": True, "COLUMNS": 1024},
                4,
                3,
            ),
            Case(
                f"slopes, {name}",
                "experts_kernels.slopes_kernel",
                f"*{name} *{name} *{name} *{name} *fp32 *i64 *i64 *{name} *{name} *fp32 fp32 fp32",
                {"N": 2880, "K": 2880, "CHOICES": 4, "KEPT": True, "COLUMNS": 1024},
                4,
                3,
            ),
        ]
    return found


def _mxfp4() -> list[Case]:
    import triton.language as tl

    return [
        Case("decode, bf16", "mxfp4._decode_kernel", "*u8 *u8 *bf16 i32", {"GROUPS": 64, "DTYPE": tl.bfloat16}, 4, 3),
        Case("decode, fp32", "mxfp4._decode_kernel", "*u8 *u8 *fp32 i32", {"GROUPS": 64, "DTYPE": tl.float32}, 4, 3),
    ]


def _clip() -> list[Case]:
    from foedus_kernels.device.clip import GROUP, SEGMENTS, tiles_of

    found = []
    # B of gate_up, A of down, a rank that is no power of two, and both sides wide: every tile that there is.
    shapes = ((5760, 16), (16, 2880), (2880, 24), (512, 512))
    for name, outs, ins in (*(("bf16", *shape) for shape in shapes), ("fp32", *shapes[0]), ("fp32", *shapes[3])):
        tiles = tiles_of(outs, ins)
        shape = {"N": outs, "R": ins, "ROWS": tiles.rows, "OUTS": tiles.outs, "INS": tiles.ins}
        given = f"*{name} *{name} *fp32 *i64 *{name} i32 i32"
        found += [
            Case(label, f"clip.{kernel}", types, shape | more, tiles.warps, tiles.stages)
            for label, kernel, types, more in (
                (f"gradients {outs} x {ins}, {name}", "_gradients_kernel", given, {"SCALED": False}),
                (f"clipped {outs} x {ins}, {name}", "_gradients_kernel", given, {"SCALED": True}),
                (
                    f"norms {outs} x {ins}, {name}",
                    "_partial_norms_kernel",
                    f"*{name} *{name} *i64 *fp64 i32 i32",
                    {"GROUP": GROUP},
                ),
            )
        ]
    return [
        *found,
        Case("norms' sums", "clip._sum_kernel", "*fp64 *fp64 i32", {"GROUPS": 12, "SEGMENTS": SEGMENTS}, 4, 3),
    ]


def _log_sparse() -> list[Case]:
    """In bfloat16; float32, of tests, spills: its products are not the tensor cores'."""
    from foedus_kernels.device import log_sparse

    q, k = (torch.empty(1, heads, 1, 64, dtype=torch.bfloat16, device="meta") for heads in (64, 8))
    numbers, strides = "i32 i32 i32", " i32 i32 i32"
    kernels = (
        ("forward", f"{'*bf16 ' * 5}*fp32 *i64 *i32 {numbers} fp32{strides * 3} i32", {"COUNT": False}),
        (
            "queries",
            f"{'*bf16 ' * 5}*fp32 *fp32 *bf16 *i64 *i32 {numbers} fp32 fp32{strides * 4} i32",
            {"COUNT": False},
        ),
        ("keys", _KEYS.format(numbers=numbers, strides=strides * 4), {"COUNT": False, "SPLIT": 16, "CHUNKS": False}),
        ("keys", _KEYS.format(numbers=numbers, strides=strides * 4), {"COUNT": False, "SPLIT": 16, "CHUNKS": True}),
        ("decode", f"{'*bf16 ' * 5}*i64 i32 fp32 i32 i32{strides * 2}", {"TILE_GROUP": 16}),
    )
    found = []
    for kernel, types, more in kernels:
        constants = log_sparse.compiled_for(kernel, q, k, 64, 3, 1) | {"WIDE": False} | more
        how = constants.pop("num_warps"), constants.pop("num_stages")
        if kernel == "decode":
            del constants["FOLD"]
        label = f"log-sparse {kernel}{', chunks' if more.get('CHUNKS') else ''}, bf16"
        found.append(Case(label, f"log_sparse_kernels.{kernel}_kernel", types, constants, *how))
    shape = {"BLOCK": 64, "TILE": 64, "FIRST": 1, "SPLIT": 16, "WIDTH": 64, "TILE_WIDTH": 64}
    chunks = Case(
        "log-sparse sums, bf16", "log_sparse_kernels.chunks_kernel", "*bf16 *bf16 *fp32 *i64 i32 i32 fp32", shape, 4, 3
    )
    return [*found, chunks]


_KEYS = "*bf16 *bf16 *bf16 *bf16 *fp32 *fp32 *bf16 *bf16 *fp32 *i64 *i32 {numbers} fp32 fp32{strides} i32"


class Compiled(NamedTuple):
    """What a kernel takes on one architecture."""

    label: str
    architecture: int
    registers: int  # of a thread
    shared: int  # bytes of a program
    spilled: int  # bytes of a thread that lie in memory instead: its stack
    narrow: list[str]  # 32-bit numbers that could pass 2^31 on their way to a pointer: `narrow_offsets`


def compiled(case: Case, architecture: int) -> Compiled:
    """Compile for an architecture and read what came of it."""
    module, name = case.kernel.split(".")
    function = getattr(importlib.import_module(f"{_MODULES}.{module}"), name)
    given = iter(case.types.split())
    signature = {one: "constexpr" if one in case.constants else next(given) for one in function.arg_names}
    if (left := list(given)) or case.constants.keys() - set(function.arg_names):
        raise ValueError(f"{case.label}: expected types and constants of {function.arg_names}, got {left} too many")
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, one in enumerate(function.arg_names)
        if signature[one].startswith("*")
    }
    source = ASTSource(function, signature, constexprs=case.constants, attrs=aligned)
    target = GPUTarget("cuda", architecture, 32)
    built = triton.compile(source, target=target, options={"num_warps": case.warps, "num_stages": case.stages})
    used = _resources(built.asm["cubin"])
    return Compiled(
        case.label,
        architecture,
        registers=used["REG"],
        shared=built.metadata.shared,
        spilled=used["STACK"] + used["LOCAL"],
        narrow=narrow_offsets(built.asm["ttir"]),
    )


def _resources(binary: bytes) -> dict[str, int]:
    """What a compiled kernel says that it takes."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout)}


def narrow_offsets(ttir: str) -> list[str]:
    """The lines of a kernel in Triton's own form in which a 32-bit number may pass 2^31 and then move a pointer.

    Every 32-bit number gets a bound: a constant its value, a range its end, a remainder its divisor, a loop's counter
    the loop's end, a program's number and a loaded value 2^31 - 1; sums and products follow. A sum or a product beyond
    2^31 - 1 is a fault, and so is a 32-bit offset of which nothing is known.
    """
    most = 2**31 - 1
    bounds: dict[str, float] = {}
    faults = []
    for line in ttir.splitlines():
        line = line.split(" loc(")[0].strip()
        if loop := re.match(r".*scf\.for (%\S+) = \S+ to (%\S+) step", line):
            bounds[loop.group(1)] = bounds.get(loop.group(2), math.inf)
        found = re.match(r"(%\S+) = (\S+) (.*)", line)
        if found is None:
            continue
        name, operation, rest = found.groups()
        operands = [bounds.get(one, math.inf) for one in re.findall(r"%[\w#.]+", rest)]
        narrow = bool(re.search(r"(?:x|: |, |> )i32>?$", rest))
        if operation == "arith.constant":
            value = re.match(r"(?:dense<)?(-?\d+)>? :", rest)
            bounds[name] = abs(int(value.group(1))) if value else math.inf
        elif operation == "tt.make_range":
            bounds[name] = int(re.search(r"end = (\d+)", rest).group(1))
        elif operation in ("tt.get_program_id", "tt.load"):
            bounds[name] = most
        elif operation in ("arith.remsi", "arith.andi"):
            bounds[name] = min(operands)
        elif operation in ("arith.addi", "arith.muli"):
            bounds[name] = sum(operands) if operation == "arith.addi" else math.prod(operands)
            if narrow and most < bounds[name] < math.inf:
                faults.append(line)
        elif operation in ("tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "arith.extsi", "arith.divsi"):
            bounds[name] = operands[0]
        elif operation == "tt.addptr" and narrow and operands[1] > most:
            faults.append(line)
    return faults


def main() -> None:
    """Print a line for each kernel and architecture, as text or, with --json, as one list."""
    wanted = [one for one in sys.argv[1:] if one != "--json"]
    found = [
        compiled(case, architecture)
        for case in cases()
        if not wanted or any(one in f"{case.kernel} {case.label}" for one in wanted)
        for architecture in case.architectures
    ]
    if "--json" in sys.argv:
        print(json.dumps([one._asdict() for one in found]))
        return
    print(f"{'kernel':24} {'sm':>4} {'registers':>9} {'shared':>8} {'spilled':>8}")
    for one in found:
        print(f"{one.label:24} {one.architecture:4} {one.registers:9} {one.shared:8} {one.spilled:8}")


if __name__ == "__main__":
    main()
