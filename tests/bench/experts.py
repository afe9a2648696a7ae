"""A layer of experts over packed weights beside transformers' dense one, and MXFP4's decode beside its peers.

Three ways through one layer at the same weights and the same routing, forward and backward to the hidden states:

* ours over the packed matrices, decoded a few experts at a time and again in the backward;
* transformers' ``grouped_mm`` over matrices that were decoded once and stay (its default);
* transformers' ``eager``, a loop over the experts that tokens chose.

Times are core-seconds of one thread, medians of turns in which every way runs once, since only neighbours on a noisy
machine compare. Memory is the weights as they are held plus the most that tensors held at once in forward and backward,
counted at torch's allocator. The shape is gpt-oss-20b's layer (32 experts, 4 a token) at a sixth of its width, so
that two cores finish; ``--width 2880`` is the true one. Its decoded matrices then take 1.6 GB in bfloat16.

    make bench            or    PYTHONPATH=tests python tests/bench/experts.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes import functional as bitsandbytes
from foedus_kernels import mxfp4
from foedus_kernels.experts import Gate, PackedExperts, experts_torch
from support.attention import peak_bytes
from torch import nn
from transformers import GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

EXPERTS, TOP_K = 32, 4
WAYS = ("ours", "grouped_mm", "eager")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def packed_stack(outs: int, ins: int, generator: torch.Generator) -> mxfp4.Mxfp4Weights:
    """Random codes with scales as trained weights have them."""
    codes = torch.randint(0, 256, (EXPERTS, outs, ins // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(117, 124, (EXPERTS, outs, ins // 32), dtype=torch.uint8, generator=generator)
    return mxfp4.Mxfp4Weights(codes, scales)


def layers_of(width: int, dtype: torch.dtype) -> tuple[PackedExperts, GptOssExperts]:
    """One layer packed and dense."""
    generator = torch.Generator().manual_seed(1)
    packed = PackedExperts(
        packed_stack(2 * width, width, generator),
        torch.randn(EXPERTS, 2 * width, generator=generator).to(dtype),
        packed_stack(width, width, generator),
        torch.randn(EXPERTS, width, generator=generator).to(dtype),
    )
    with torch.device("meta"):
        dense = GptOssExperts(GptOssConfig(num_local_experts=EXPERTS, hidden_size=width, intermediate_size=width))
    every = list(range(EXPERTS))
    values = {
        "gate_up_proj": packed.gate_up.decode(every, dtype).mT.contiguous(),
        "gate_up_proj_bias": packed.gate_up_bias,
        "down_proj": packed.down.decode(every, dtype).mT.contiguous(),
        "down_proj_bias": packed.down_bias,
    }
    for name, value in values.items():
        setattr(dense, name, nn.Parameter(value, requires_grad=False))
    return packed, dense


def medians(repeats: int, jobs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Core-seconds of each job; the first turn warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            if turn:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(width: int, dtype: torch.dtype, tokens: int, repeats: int) -> dict[str, Any]:
    """Core-seconds and bytes of the three ways, whose outputs and gradients are compared first."""
    packed, dense = layers_of(width, dtype)
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices
    weights = torch.softmax(torch.randn(tokens, TOP_K, generator=generator), -1).to(dtype)
    upstream = torch.randn(tokens, width, generator=generator).to(dtype)

    def forward(way: str) -> torch.Tensor:
        if way == "ours":
            return experts_torch(hidden, ids, weights, packed, Gate())
        dense.config._experts_implementation = way
        result: torch.Tensor = dense(hidden, ids, weights)
        return result

    def step(way: str) -> tuple[torch.Tensor, torch.Tensor]:
        out = forward(way)
        return out.detach(), torch.autograd.grad(out, hidden, upstream)[0]

    want = step("grouped_mm")
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for ours, theirs in zip(step("ours"), want, strict=True):
        if float((ours - theirs).float().norm() / theirs.float().norm()) > tolerance:
            raise ValueError(f"expected the layers to agree within {tolerance:g} at {tokens} tokens")
    held = {way: sum(one.nbytes for one in dense.parameters()) for way in WAYS}
    held["ours"] = packed.gate_up.nbytes + packed.down.nbytes + packed.gate_up_bias.nbytes + packed.down_bias.nbytes
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "width": width,
        "tokens": tokens,
        "seconds": medians(repeats, {way: lambda way=way: step(way) for way in WAYS}),  # type: ignore[misc]
        "held_bytes": held,
        "bytes": {way: held[way] + peak_bytes(lambda way=way: step(way)) for way in WAYS},
    }


def decode_speed(width: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Decoded values in Gelem a core-second, of a stack of matrices."""
    stack = packed_stack(2 * width, width, torch.Generator().manual_seed(1))
    experts = list(range(max(1, min(EXPERTS, (1 << 23) // (2 * width * width)))))
    blocks, scales = (tensor[: len(experts)] for tensor in stack.tensors())
    dense = stack.decode(experts, dtype)
    nf4, state = bitsandbytes.quantize_4bit(dense, blocksize=64, quant_type="nf4")
    jobs = {
        "MXFP4, ours": lambda: stack.decode(experts, dtype),
        "MXFP4, transformers": lambda: convert_moe_packed_tensors(blocks, scales, dtype=dtype),
        "NF4, bitsandbytes": lambda: bitsandbytes.dequantize_4bit(nf4, state),
    }
    return {name: dense.numel() / 1e9 / seconds for name, seconds in medians(repeats, jobs).items()}


def main() -> None:
    """Print the tables as Markdown, and one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=int, default=480, help="hidden and expert width, a multiple of 32")
    parser.add_argument("--quick", action="store_true", help="16 and 128 tokens only, one turn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    repeats = 1 if arguments.quick else arguments.repeats
    rows = []
    print(
        f"A layer of {EXPERTS} experts, {TOP_K} a token, width {arguments.width}, forward and backward, one thread "
        f"({torch.backends.cpu.get_cpu_capability()})\n"
    )
    print("| type | tokens | " + " | ".join(f"{way} core-s" for way in WAYS), end="")
    print(" | " + " | ".join(f"{way} MB" for way in WAYS) + " | time / grouped_mm | memory / grouped_mm |")
    print("| --- | ---: " + "| ---: " * (2 * len(WAYS) + 2) + "|")
    for name, dtype in DTYPES.items():
        for tokens in (16, 128) if arguments.quick else (16, 128, 512, 2048):
            row = measure(arguments.width, dtype, tokens, repeats)
            rows.append(row)
            times, sizes = ([row[kind][way] for way in WAYS] for kind in ("seconds", "bytes"))
            print(f"| {name} | {tokens:,} | " + " | ".join(f"{one:.3f}" for one in times), end="")
            print(" | " + " | ".join(f"{one / 1e6:,.0f}" for one in sizes), end="")
            print(f" | {times[0] / times[1]:.2f} | {sizes[0] / sizes[1]:.2f} |", flush=True)
    decoded = {name: decode_speed(arguments.width, dtype, 3 * repeats) for name, dtype in DTYPES.items()}
    print("\n| decode, Gelem/core-s | " + " | ".join(DTYPES) + " |\n| --- | ---: | ---: |")
    for job in decoded["float32"]:
        print(f"| {job} | " + " | ".join(f"{decoded[name][job]:.2f}" for name in DTYPES) + " |")
    print(json.dumps({"experts": rows, "decode_gelem_per_core_s": decoded}))


if __name__ == "__main__":
    main()
