"""What OpenAI's reference program computes over the tensors of ``original/``, in our own words, in float32.

Written from the published description (openai/gpt-oss, ``torch/model.py`` and ``torch/weights.py``), without a line of
the package or of transformers: a reader and a writer that share a mistake agree with each other, but not with this.
One sequence, no cache, one token and one expert after the other.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
ALPHA = 1.702
EPSILON = 1e-5


class Program:
    """The model of one folder ``original/``."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.held = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        self.used: set[str] = set()

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Of each next token: [T, vocabulary]."""
        stream = self._read("embedding.weight")[torch.tensor(tokens)]
        for layer in range(self.config["num_hidden_layers"]):
            stream = stream + self._attention(layer, stream)
            stream = stream + self._experts(layer, stream)
        return self._normed("norm.scale", stream) @ self._read("unembedding.weight").T

    def _read(self, name: str) -> torch.Tensor:
        self.used.add(name)
        return self.held[name].float()

    def _normed(self, name: str, stream: torch.Tensor) -> torch.Tensor:
        return stream * torch.rsqrt(stream.pow(2).mean(dim=-1, keepdim=True) + EPSILON) * self._read(name)

    def _linear(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self._read(f"{name}.weight").T + self._read(f"{name}.bias")

    def _attention(self, layer: int, stream: torch.Tensor) -> torch.Tensor:
        config, block = self.config, f"block.{layer}.attn"
        length, width = len(stream), config["head_dim"]
        heads, shared = config["num_attention_heads"], config["num_attention_heads"] // config["num_key_value_heads"]
        fused = self._linear(f"{block}.qkv", self._normed(f"{block}.norm.scale", stream))
        first_key, first_value = heads * width, (heads + config["num_key_value_heads"]) * width
        queries = self._turned(fused[:, :first_key].reshape(length, heads, width))
        keys = self._turned(fused[:, first_key:first_value].reshape(length, -1, width))
        values = fused[:, first_value:].reshape(length, -1, width)
        sinks = self._read(f"{block}.sinks")
        out = torch.zeros(length, heads, width)
        for head in range(heads):
            for at in range(length):
                # Even layers look back over the window only.
                first = max(0, at + 1 - config["sliding_window"]) if layer % 2 == 0 else 0
                scores = keys[first : at + 1, head // shared] @ queries[at, head] / math.sqrt(width)
                weights = torch.softmax(torch.cat([scores, sinks[head : head + 1]]), dim=0)[:-1]
                out[at, head] = weights @ values[first : at + 1, head // shared]
        return self._linear(f"{block}.out", out.reshape(length, -1))

    def _turned(self, vectors: torch.Tensor) -> torch.Tensor:
        """Rotary positions by YaRN: slow turns are stretched, fast ones kept, between them a ramp without rounding."""
        config, width = self.config, vectors.shape[-1]
        theta, factor, context = config["rope_theta"], config["rope_scaling_factor"], config["initial_context_length"]
        turns, scale = theta ** (torch.arange(0, width, 2).float() / width), 1.0
        speeds = 1 / turns
        if factor > 1:
            scale = 0.1 * math.log(factor) + 1
            low, high = (
                width / 2 * math.log(context / (bound * 2 * math.pi)) / math.log(theta)
                for bound in (config["rope_ntk_beta"], config["rope_ntk_alpha"])
            )
            assert 0 < low < high < width / 2 - 1, "the program wants a context that is long enough for its bounds"
            ramp = ((torch.arange(width // 2).float() - low) / (high - low)).clamp(0, 1)
            speeds = ramp / (factor * turns) + (1 - ramp) / turns
        angles = torch.outer(torch.arange(len(vectors)).float(), speeds)[:, None]
        cos, sin = angles.cos() * scale, angles.sin() * scale
        left, right = vectors.chunk(2, dim=-1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)

    def _experts(self, layer: int, stream: torch.Tensor) -> torch.Tensor:
        block, limit = f"block.{layer}.mlp", self.config["swiglu_limit"]
        inputs = self._normed(f"{block}.norm.scale", stream)
        best = self._linear(f"{block}.gate", inputs).topk(self.config["experts_per_token"], dim=-1)
        first, second = self._decoded(f"{block}.mlp1_weight"), self._decoded(f"{block}.mlp2_weight")
        first_bias, second_bias = self._read(f"{block}.mlp1_bias"), self._read(f"{block}.mlp2_bias")
        out = torch.zeros_like(stream)
        for at, (values, experts) in enumerate(zip(best.values, best.indices, strict=True)):
            for share, expert in zip(torch.softmax(values, dim=0), experts.tolist(), strict=True):
                both = first[expert] @ inputs[at] + first_bias[expert]
                gate, linear = both[::2].clamp(max=limit), both[1::2].clamp(-limit, limit)
                inner = gate * torch.sigmoid(ALPHA * gate) * (linear + 1)
                out[at] += share * (second[expert] @ inner + second_bias[expert])
        return out

    def _decoded(self, name: str) -> torch.Tensor:
        """4-bit values, two a byte with the low half first, 32 of them under one power of two."""
        self.used |= {f"{name}.blocks", f"{name}.scales"}
        blocks, scales = self.held[f"{name}.blocks"], self.held[f"{name}.scales"]
        table = torch.tensor([*CODES, *(-code for code in CODES)])
        values = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], dim=-1).flatten(-2)
        return (values * torch.exp2(scales.float() - 127)[..., None]).flatten(-2)
