"""One full layer of gpt-oss-20b at its true shape: our logits beside transformers', and what either holds in memory.

The weights are random (`foedus model synthesise`), in the released layout; the vocabulary is cut to 1,024 tokens, since
embedding and head are no part of a layer. Each side runs in a process of its own, one after the other, which says its
own high-water mark (VmHWM, mapped files included). transformers' side is its own model, attention and expert loop, with
the experts decoded by its own function, one at a time: its `from_pretrained` of this folder passes 8 GB, for which
``--their-loader`` asks.

    make bench            or    python tests/bench/layer20b.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from foedus_model.build import load
from foedus_model.synthesise import shaped, synthesise
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

TOLERANCE = 1e-5
SIDES = {
    "Foedus, float32": ("ours", torch.float32),
    "Foedus, bfloat16": ("ours", torch.bfloat16),
    "transformers, float32": ("theirs", torch.float32),
}
THEIR_LOADER = {"transformers, float32, from_pretrained": ("their-loader", torch.float32)}


def status(field: str) -> int:
    """Bytes by /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def ours(folder: Path, dtype: torch.dtype) -> GptOssForCausalLM:
    """As a daemon loads it: digests verified, experts packed."""
    return load(folder, dtype=dtype).model


def theirs(folder: Path, dtype: torch.dtype) -> GptOssForCausalLM:
    """transformers' modules, their experts decoded by transformers, one at a time to stay small."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    fields.pop("quantization_config")
    config = GptOssConfig(**fields)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    held = load_file(folder / "model.safetensors")
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
    state = {}
    for name, empty in model.state_dict().items():
        if name in held:
            state[name] = held[name].to(dtype)
            continue
        state[name] = torch.empty(empty.shape, dtype=dtype)
        for expert in range(len(empty)):
            blocks, scales = (held[f"{name}_{kind}"][expert : expert + 1] for kind in ("blocks", "scales"))
            state[name][expert] = convert_moe_packed_tensors(blocks, scales)[0]
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = GptOssRotaryEmbedding(config=config)
    return model.eval()


def their_loader(folder: Path, dtype: torch.dtype) -> GptOssForCausalLM:
    """What transformers' documentation says to do."""
    return GptOssForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=dtype, attn_implementation="eager"
    ).eval()


LOADERS = {"ours": ours, "theirs": theirs, "their-loader": their_loader}


def measure(side: str, folder: Path, tokens: int, out: Path) -> dict[str, Any]:
    """Load and run once, in this process: bytes, core-seconds, and the logits to a file."""
    loader, dtype = (SIDES | THEIR_LOADER)[side]
    before, begun = status("VmRSS"), time.process_time()
    model = LOADERS[loader](folder, dtype)
    loaded, loaded_peak, ready = status("VmRSS"), status("VmHWM"), time.process_time()
    experts: dict[str, torch.Tensor] = {}
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _i, result: experts.update(out=result[0]))
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
    done = time.process_time()
    save_file({"logits": logits.float().contiguous(), "experts": experts["out"].float().contiguous()}, out)
    return {
        "side": side,
        "imports": before,
        "loaded": loaded,
        "load_peak": loaded_peak,
        "peak": status("VmHWM"),
        "mapped": status("RssFile"),
        "load_seconds": ready - begun,
        "forward_seconds": done - ready,
    }


def apart(side: str, folder: Path, tokens: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """`measure` in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.safetensors"
        command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--tokens", str(tokens)]
        run = subprocess.run([*command, "--out", str(out)], stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(run.stdout.splitlines()[-1]), {name: t.clone() for name, t in load_file(out).items()}


def main() -> None:
    """Make the layer, run every side, print tables, and fail where the logits differ."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4 experts instead of 32")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument(
        "--their-loader", action="store_true", help="also transformers' from_pretrained: 9 GB of memory"
    )
    parser.add_argument("--side", choices=[*SIDES, *THEIR_LOADER], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.folder, arguments.tokens, arguments.out)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "gpt-oss-20b-layer"
        config = shaped("gpt-oss-20b", layers=1, experts=4 if arguments.quick else 32, vocabulary=1024)
        synthesise(folder, config, seed=0)
        size = (folder / "model.safetensors").stat().st_size
        sides = SIDES | (THEIR_LOADER if arguments.their_loader else {})
        results = {side: apart(side, folder, arguments.tokens) for side in sides}
    reference = results["transformers, float32"][1]
    rows = [measured | _differences(held, reference) for measured, held in results.values()]
    print(
        f"One layer of gpt-oss-20b, {config['num_local_experts']} experts, {arguments.tokens} tokens, {size:,} bytes\n"
    )
    _print(rows, float(reference["experts"].std()), float(reference["logits"].std()))
    print(json.dumps({"layer20b": rows, "file_bytes": size, "tokens": arguments.tokens}))
    far = [row["side"] for row in rows if "float32" in row["side"] and row["logits_apart"] > TOLERANCE]
    if far:
        sys.exit(f"logits differ by more than {TOLERANCE}: {', '.join(far)}")


def _differences(held: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict[str, float]:
    return {f"{name}_apart": float((held[name] - reference[name]).abs().max()) for name in ("logits", "experts")}


def _print(rows: list[dict[str, Any]], experts: float, logits: float) -> None:
    kinds = ("imports", "loaded", "load_peak", "peak", "mapped")
    columns = ("imports", "loaded", "peak of loading", "peak", "mapped of it")
    print("| | " + " | ".join([*columns, "load core-s", "forward core-s", "logits apart", "experts apart"]) + " |")
    print("| --- |" + " ---: |" * 9)
    for row in rows:
        sizes = " | ".join(f"{row[key] / 1e9:.2f} GB" for key in kinds)
        times = f"{row['load_seconds']:.1f} | {row['forward_seconds']:.1f}"
        print(f"| {row['side']} | {sizes} | {times} | {row['logits_apart']:.1e} | {row['experts_apart']:.1e} |")
    print(f"\nStandard deviation of the reference: experts' output {experts:.2f}, logits {logits:.2f}.")
    print("In bfloat16 the random router sends some tokens to other experts; its last two columns show one of them.\n")


if __name__ == "__main__":
    main()
