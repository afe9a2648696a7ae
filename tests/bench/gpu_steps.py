"""Whole training steps at the true shapes: a model of synthetic weights made on the device, attention LoRA, A frozen.

Routing is not the random router's: every layer's choices are replaced by those of `gpu_routing`, since random routing
misstates speed. Weights are random, so losses mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_routing import routed


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """A row of the steps' table.

    Attributes:
        name: Of the row.
        preset: Whose shape.
        tokens: Of a step.
        goal: In words.
        streamed: Units whose passes share each layer; 0 keeps the weights on the device.
    """

    name: str
    preset: str
    tokens: int
    goal: str
    streamed: int = 0


STEPS = (
    StepCase(name="20b, 2,048 tokens", preset="gpt-oss-20b", tokens=2048, goal=">= 10K tokens/s, <= 17 GB"),
    StepCase(name="120b, 2,048 tokens", preset="gpt-oss-120b", tokens=2048, goal=">= 8K tokens/s"),
    StepCase(name="120b, 8,192 tokens", preset="gpt-oss-120b", tokens=8192, goal=">= 8K tokens/s"),
    StepCase(name="120b, 32,768 tokens", preset="gpt-oss-120b", tokens=32768, goal="<= 80 GB"),
    StepCase(
        name="120b streamed, 8,192 tokens",
        preset="gpt-oss-120b",
        tokens=8192,
        goal="<= 6 GB, >= 60 % of the link's bound",
        streamed=4,
    ),
)


def synthetic_model(described: dict[str, Any], device: torch.device, dtype: torch.dtype, *, streamed: bool) -> Any:
    """A frozen model of a configuration with random weights, made where they stay; experts on the host if streamed."""
    from foedus_model.build import empty_model
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    model = empty_model(described, dtype)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    stored = tensor.dtype == torch.uint8
                    tensors[name] = _drawn(name, tensor, torch.device("cpu") if stored and streamed else device, module)
    model.tie_weights()
    model.model.rotary_emb = GptOssRotaryEmbedding(config=model.config).to(device)
    return model.requires_grad_(False).eval()


def _drawn(name: str, like: torch.Tensor, device: torch.device, module: torch.nn.Module) -> torch.Tensor:
    """Values as `foedus model synthesise` draws them, but by the device."""
    made = torch.empty(like.shape, dtype=like.dtype, device=device)
    if like.dtype == torch.uint8:
        made.random_(117, 124) if name.endswith("_scales") else made.random_(0, 256)
    elif type(module).__name__.endswith("RMSNorm"):
        made.fill_(1.0)
    else:
        made.normal_(0.0, 0.02)
    return torch.nn.Parameter(made, requires_grad=False) if isinstance(like, torch.nn.Parameter) else made


def route(model: Any, tokens: int, seed: int) -> None:
    """Have every router choose by the histogram of this many tokens; weights stay the router's.

    A forward of several units of so many tokens repeats the choices: a unit has its own alone and among others.
    """
    config = model.config
    for number, layer in enumerate(model.model.layers):
        ids = torch.from_numpy(routed(tokens, config.num_local_experts, config.num_experts_per_tok, seed + number))
        ids = ids.to(layer.mlp.router.weight.device)
        layer.mlp.router.register_forward_hook(
            lambda _module, _inputs, out, ids=ids: (*out[:-1], ids.repeat(len(out[-1]) // len(ids), 1))
        )


class Step:
    """One step's forward and backward, over resident or streamed weights.

    Attributes:
        path: What `choose_path` said.
    """

    def __init__(
        self, described: dict[str, Any], tokens: int, *, device: torch.device, dtype: torch.dtype, streamed: int = 0
    ) -> None:
        """Make the model, its adapter and a record; `streamed` units of a pass split the tokens."""
        from foedus_model.adapter import attach
        from foedus_model.attention import fuse_attention
        from foedus_model.experts import choose_path
        from foedus_model.recompute import recompute_layers
        from foedus_protocols.layout import adapter_layout

        length = tokens // max(1, streamed)
        model = synthetic_model(described, device, dtype, streamed=streamed > 0)
        layout = adapter_layout(described, targets="attention", rank=16)
        self._trained = attach(model, layout, seed="0" * 64, alpha=16, rank=16).trained
        choice = choose_path(model, rows=length)
        self.path = "" if choice is None else f"{choice.path}, since {choice.why}"
        fuse_attention(model)
        route(model, length, seed=0)
        self._model, self._length = model, length
        self._ids = torch.randint(0, int(described["vocab_size"]), (1, length)).to(device)
        self._streamer = None
        if streamed:
            from foedus_model.streaming import stream_experts

            self._streamer = stream_experts(model, self._trained, units=streamed)
            self._units = streamed
        else:
            recompute_layers(model)

    def run(self) -> None:
        """The gradients of the trained matrices."""
        if self._streamer is not None:
            from foedus_model.loss import Batch

            batch = Batch(tokens=self._ids, answers=torch.ones_like(self._ids[:, 1:], dtype=torch.bool))
            self._streamer.gradients([batch] * self._units, lambda losses, _owners, _records: losses.mean())
            return
        from foedus_model.loss import losses_at

        places = torch.arange(self._length - 1, device=self._ids.device)
        losses = losses_at(self._model, self._ids, torch.zeros_like(places), places)
        torch.autograd.grad(losses.mean(), self._trained)

    def close(self) -> None:
        """End the copies."""
        if self._streamer is not None:
            self._streamer.close()


def link_bound(link: float, described_bytes: int, tokens: int) -> float:
    """Tokens a second at which every expert comes over the link twice a step."""
    return tokens / (2 * described_bytes / link)


def median_of(run: Callable[[], object], repeats: int, synchronise: Callable[[], None]) -> float:
    """Median seconds of a step by the wall clock, after one that warms up."""
    seconds = []
    for turn in range(repeats + 1):
        synchronise()
        begun = time.perf_counter()
        run()
        synchronise()
        if turn:
            seconds.append(time.perf_counter() - begun)
    return sorted(seconds)[len(seconds) // 2]
