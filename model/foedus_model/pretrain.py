"""Pretrain `tiny`, the small base that demos and tests run on, from the corpus of ``corpus.py``.

One file, one loop, after karpathy/nanoGPT: AdamW, a cosine, windows of one long token stream. Three things differ:

* The draw of a step is a function of (seed, step), so an interrupted run continues with the same batches.
* One row in eight is a chat in the harmony format, so that the special tokens have been seen.
* In the last quarter the experts are rounded to MXFP4 in every forward pass while the optimiser keeps the exact
  weights (straight-through estimation, https://arxiv.org/abs/1308.3432), so that what is shipped is what was
  trained. Rounding a finished model once cost 0.09 bits a byte in a prototype.

The shipped run: 1,500 steps, 3.1 M tokens (4 epochs); 1.835 bits a byte on held-out documents against
1.43 on documents it was trained on, so more text would help it more than more steps.

Left out: mixed precision (bf16 on a CPU without matrix units gains 10 %) and every form of parallelism.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from foedus_kernels import mxfp4
from foedus_protocols.canonical import digest_json
from foedus_protocols.errors import StateError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

from foedus_model import presets
from foedus_model.checkpoint import write_checkpoint
from foedus_model.corpus import Corpus, Document, read_corpus
from foedus_model.measure import bits_per_byte, xz_bits_per_byte
from foedus_model.quantize import quantise
from foedus_model.switches import prepare_process
from foedus_model.tokenizer import SPECIAL_TOKENS, VOCABULARY, Tokens, encode, train_tokenizer

_CHAT_ROWS_ONE_IN = 8
# Weight of the router's load-balancing loss. It couples the rows of a batch, which is harmless on public text and
# forbidden in private training.
_BALANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """How `tiny` is trained; the defaults made the shipped one.

    Attributes:
        steps: Optimiser steps in all.
        rows: Windows a step.
        length: Tokens a window.
        rate: Peak learning rate; a linear warm-up of ``warmup`` steps, then a cosine down to a tenth.
        round_from: Share of the steps after which the experts are rounded in the forward pass.
        seed: Of the initial weights and of every draw.
        save_every: Steps between two saved states.
        evaluate_every: Steps between two measurements on the held-out documents.
    """

    steps: int = 1500
    rows: int = 8
    length: int = 256
    rate: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.1
    round_from: float = 0.75
    seed: int = 0
    save_every: int = 50
    evaluate_every: int = 150


@dataclass(frozen=True, kw_only=True)
class Streams:
    """The two token streams that batches are cut from."""

    text: Tokens  # (T,)
    chat: Tokens  # (T',)


def token_streams(tokenizer: Tokenizer, documents: tuple[Document, ...]) -> Streams:
    """The training documents as text and as questions with answers."""
    chats = [
        f"<|start|>user<|message|>What is {entry.name}?<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{entry.text}<|return|>"
        for document in documents
        for entry in document.entries
        if entry.name
    ]
    return Streams(
        text=encode(tokenizer, [f"<|endoftext|>{document.text}" for document in documents]),
        chat=encode(tokenizer, chats),
    )


def pretrain(
    work: Path,
    *,
    config: Mapping[str, Any] | None = None,
    settings: PretrainSettings | None = None,
    device: str = "cpu",
    quiet: bool = False,
) -> GptOssForCausalLM:
    """Train, or continue training, the base whose state is kept in ``work``.

    Args:
        work: Folder of the run: tokenizer, newest state and the figures measured so far.
        config: A gpt-oss ``config.json``, that of `tiny` if left out; the model is built dense.
        settings: How to train; a run continued with other settings is refused.
        device: Where to train.
        quiet: No progress bar.

    Returns:
        The trained model, dense, its experts already on the MXFP4 grid.

    Raises:
        ConfigError: FOEDUS_THREADS is no number of threads.
        StateError: ``work`` holds a run of another corpus, configuration or settings.
    """
    prepare_process()
    settings = settings or PretrainSettings()
    config = tiny_config() if config is None else config
    corpus = read_corpus()
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(work, corpus, vocabulary=int(config["vocab_size"]))
    model = _fresh_model(config, seed=settings.seed).to(device)
    optimiser = _optimiser(model, settings)
    run = {"corpus": corpus.digest, "config": digest_json(dict(config)), "settings": asdict(settings)}
    step, history = _resume(work, run, model, optimiser)
    streams = token_streams(tokenizer, corpus.train)
    texts = [document.text for document in corpus.heldout]
    with _progress(quiet) as progress:
        bar = progress.add_task("pretraining", total=settings.steps, completed=step, bits="-")
        while step < settings.steps:
            rounding = step >= settings.round_from * settings.steps
            _train_step(model, optimiser, _batch(streams, settings, step).to(device), settings, step, rounding=rounding)
            step += 1
            if step % settings.evaluate_every == 0 or step == settings.steps:
                with _rounded_experts(model, active=rounding):
                    history[str(step)] = bits_per_byte(model, tokenizer, texts, length=settings.length)
                progress.update(bar, bits=f"{history[str(step)]:.3f}")
            if step % settings.save_every == 0 or step == settings.steps:
                _save(work, run, step, history, model, optimiser)
            progress.update(bar, completed=step)
    round_experts_(model)
    return model


def tiny_config() -> dict[str, Any]:
    """The preset `tiny` with the token ids of the tokenizer that `train_tokenizer` makes."""
    ids = {name: VOCABULARY - len(SPECIAL_TOKENS) + index for index, name in enumerate(SPECIAL_TOKENS)}
    return presets.tiny(
        vocab_size=VOCABULARY,
        bos_token_id=ids["<|startoftext|>"],
        eos_token_id=ids["<|return|>"],
        pad_token_id=ids["<|endoftext|>"],
    )


def ship(model: GptOssForCausalLM, work: Path, out: Path, *, settings: PretrainSettings | None = None) -> str:
    """Quantise a trained model, measure it, and write it as a checkpoint in the released layout.

    Args:
        model: What `pretrain` returned.
        work: The run's folder, for its tokenizer.
        out: A new or empty folder.
        settings: What it was trained with.

    Returns:
        The base's digest.
    """
    corpus = read_corpus()
    config = tiny_config()
    tensors = quantise(model.state_dict(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in tensors:
                parameter.copy_(tensors[name])  # Measure what is stored: bfloat16 outside the experts.
    round_experts_(model)
    tokenizer_file = work / "tokenizer.json"
    bits = bits_per_byte(
        model.eval(), Tokenizer.from_file(str(tokenizer_file)), [document.text for document in corpus.heldout]
    )
    return write_checkpoint(
        out,
        config=config,
        tensors=tensors,
        tokenizer_file=tokenizer_file,
        provenance=provenance(corpus, bits=bits, settings=settings or PretrainSettings()),
    )


def provenance(corpus: Corpus, *, bits: float, settings: PretrainSettings) -> dict[str, Any]:
    """What the shipped manifest says about how the base was made and how good it is."""
    return {
        "corpus": "docstrings and comments of the Python standard library, pydoc topics",
        "python": platform.python_version(),
        "corpus_bytes": len(bytes(corpus)),
        "corpus_digest": corpus.digest,
        "heldout_digest": corpus.heldout_digest,
        "heldout_bits_per_byte": round(bits, 4),
        "xz_corpus_bits_per_byte": round(xz_bits_per_byte(bytes(corpus)), 4),
        "settings": asdict(settings),
    }


def _tokenizer(work: Path, corpus: Corpus, *, vocabulary: int) -> Tokenizer:
    path = work / "tokenizer.json"
    if not path.exists():
        train_tokenizer(corpus.train, vocabulary=vocabulary).save(str(path))
    return Tokenizer.from_file(str(path))


def _fresh_model(config: Mapping[str, Any], *, seed: int) -> GptOssForCausalLM:
    """A dense model with its weights drawn from the seed alone."""
    settings = GptOssConfig(**{key: value for key, value in config.items() if key != "quantization_config"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GptOssForCausalLM._from_config(settings, attn_implementation="eager", experts_implementation="eager")
    return model.float().train()


def _optimiser(model: nn.Module, settings: PretrainSettings) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.95), fused=True)


def _batch(streams: Streams, settings: PretrainSettings, step: int) -> torch.Tensor:
    """The windows of one step: a function of (seed, step) alone."""
    random = np.random.default_rng((settings.seed, step))
    chats = settings.rows // _CHAT_ROWS_ONE_IN
    rows = []
    for row in range(settings.rows):
        stream = streams.chat if row < chats else streams.text
        start = int(random.integers(0, len(stream) - settings.length))
        rows.append(stream[start : start + settings.length + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))  # (rows, length + 1)


def _train_step(
    model: GptOssForCausalLM,
    optimiser: torch.optim.Optimizer,
    batch: torch.Tensor,
    settings: PretrainSettings,
    step: int,
    *,
    rounding: bool,
) -> None:
    for group in optimiser.param_groups:
        group["lr"] = _rate(settings, step)
    with _rounded_experts(model, active=rounding):
        output = model(input_ids=batch[:, :-1], output_router_logits=True)
        loss = nn.functional.cross_entropy(output.logits.flatten(0, 1), batch[:, 1:].flatten())
        (loss + _BALANCE * output.aux_loss).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()


def _rate(settings: PretrainSettings, step: int) -> float:
    if step < settings.warmup:
        return settings.rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.rate * (0.55 + 0.45 * math.cos(math.pi * done))


@contextmanager
def _rounded_experts(model: nn.Module, *, active: bool) -> Iterator[None]:
    """Inside, the experts hold their MXFP4 values; outside, the exact ones again."""
    if not active:
        yield
        return
    exact = [weight.detach().clone() for weight in _expert_weights(model)]
    round_experts_(model)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(_expert_weights(model), exact, strict=True):
                weight.copy_(value)


def round_experts_(model: nn.Module) -> None:
    """Round every expert weight to its MXFP4 value, in place."""
    with torch.no_grad():
        for weight in _expert_weights(model):
            rows = weight.transpose(1, 2)  # (E, N, K): groups run along the inputs
            weight.copy_(mxfp4.decode(*mxfp4.encode(rows)).transpose(1, 2))


def _expert_weights(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]


def _resume(
    work: Path, run: Mapping[str, Any], model: nn.Module, optimiser: torch.optim.Optimizer
) -> tuple[int, dict[str, float]]:
    """Load the newest saved state, if there is one."""
    pointer = work / "state.json"
    if not pointer.exists():
        return 0, {}
    state = json.loads(pointer.read_text(encoding="utf-8"))
    for key, value in run.items():
        if state["run"][key] != value:
            raise StateError(
                f"{work} holds a pretraining run with another {key} than this one: "
                "continue it as it was started, or choose an empty folder"
            )
    tensors = load_file(str(work / state["file"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model/{name}"])
    for index, parameter in enumerate(_parameters(optimiser)):
        optimiser.state[parameter] = {
            "step": torch.tensor(float(state["step"])),
            "exp_avg": tensors[f"mean/{index}"].to(parameter.device),
            "exp_avg_sq": tensors[f"square/{index}"].to(parameter.device),
        }
    return int(state["step"]), dict(state["history"])


def _save(
    work: Path,
    run: Mapping[str, Any],
    step: int,
    history: Mapping[str, float],
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
) -> None:
    """Write the state beside the old one, then point to it; a kill at any moment leaves one of the two."""
    tensors = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for index, parameter in enumerate(_parameters(optimiser)):
        tensors[f"mean/{index}"] = optimiser.state[parameter]["exp_avg"]
        tensors[f"square/{index}"] = optimiser.state[parameter]["exp_avg_sq"]
    file = f"state-{step}.safetensors"
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, str(work / file))
    pointer = work / "state.json"
    part = work / "state.json.part"
    part.write_text(json.dumps({"run": run, "step": step, "history": history, "file": file}), encoding="utf-8")
    os.replace(part, pointer)
    for old in work.glob("state-*.safetensors"):
        if old.name != file:
            old.unlink()


def _parameters(optimiser: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def _progress(quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("held-out {task.fields[bits]} bits/byte"),
        TimeRemainingColumn(),
        disable=quiet,
    )
