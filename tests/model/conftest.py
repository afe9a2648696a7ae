"""A small random base in the released layout, built once a session, and both ways to load it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foedus_model import presets
from foedus_model.checkpoint import write_checkpoint
from foedus_model.quantize import quantise
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config

CONTROLS = ["<|return|>", "<|end|>", "<|start|>", "<|message|>", "<|channel|>", "<|endoftext|>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def small_config(**changes: Any) -> dict[str, Any]:
    """The tiny preset at two layers, over a vocabulary of single bytes and six control tokens."""
    config = presets.tiny(
        vocab_size=len(BYTES) + len(CONTROLS), eos_token_id=len(BYTES), pad_token_id=len(BYTES) + len(CONTROLS) - 1
    )
    return config | {"num_hidden_layers": 2, "layer_types": config["layer_types"][:2], "sliding_window": 8} | changes


def random_state(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random dense weights in which no part is negligible."""
    generator = torch.Generator().manual_seed(seed)
    model = GptOssForCausalLM(GptOssConfig(**{k: v for k, v in config.items() if k != "quantization_config"}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            continue
        spread = 0.5 if "embed" in name else 0.1
        torch.nn.init.normal_(parameter, std=spread, generator=generator)
    return model.state_dict()


def byte_tokenizer(path: Path) -> Path:
    """A tokenizer of single bytes with the harmony control tokens."""
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(BYTES)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROLS)
    tokenizer.save(str(path))
    return path


@pytest.fixture
def write_base(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a fresh base, for tests that damage it."""

    def write(name: str = "base", **options: Any) -> Path:
        config = options.pop("config", small_config())
        tensors = options.pop("tensors", None) or quantise(random_state(config), config)
        tokenizer = byte_tokenizer(tmp_path / f"{name}-tokenizer.json")
        write_checkpoint(
            tmp_path / name, config=config, tensors=tensors, tokenizer_file=tokenizer, provenance={}, **options
        )
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One base for tests that only read it."""
    folder = tmp_path_factory.mktemp("base")
    config = small_config()
    write_checkpoint(
        folder / "model",
        config=config,
        tensors=quantise(random_state(config), config),
        tokenizer_file=byte_tokenizer(folder / "tokenizer.json"),
        provenance={"made": "for tests"},
    )
    return folder / "model"


@pytest.fixture(scope="session")
def dequantised() -> Callable[[Path], GptOssForCausalLM]:
    """transformers' own loader, decoding to float32: the reference. 5.17 leaves what it decoded in bfloat16."""

    def load(folder: Path) -> GptOssForCausalLM:
        model = GptOssForCausalLM.from_pretrained(
            folder,
            quantization_config=Mxfp4Config(dequantize=True),
            dtype=torch.float32,
            attn_implementation="eager",
        )
        return model.float().eval().requires_grad_(False)

    return load
