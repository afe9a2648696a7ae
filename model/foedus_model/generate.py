"""Text from a base model, alone or with a variant's adapter.

The decoding loop and its key-value cache are transformers'. What is ours is the refusal to mix: a variant names its
base by digest and is loaded on no other, and a variant that was trained without privacy says so in every result.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from foedus_protocols.errors import CheckpointError, UsageError
from foedus_protocols.layout import attention_layout, read_peft, read_peft_config, vector_digest
from foedus_protocols.manifest import MANIFEST_FILE
from tokenizers import Tokenizer
from transformers import GptOssForCausalLM

from foedus_model.adapter import attach
from foedus_model.build import build
from foedus_model.checkpoint import open_checkpoint

_END_TOKENS = ("<|return|>", "<|end|>", "<|endoftext|>")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to continue a prompt.

    Attributes:
        max_new_tokens: At most this many tokens.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        seed: Makes drawn tokens repeatable; None draws anew.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"expected at least 1 new token, got {self.max_new_tokens}")
        if not 0.0 <= self.temperature < float("inf"):
            raise UsageError(f"expected a temperature of 0 or more, got {self.temperature}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Generator:
    """A model that is ready to continue text.

    Attributes:
        model: The base, with the variant's adapter where there is one.
        tokenizer: The base's tokenizer.
        base_digest: The base's identity.
        private: Whether the variant was trained with differential privacy; None without a variant.
    """

    model: GptOssForCausalLM
    tokenizer: Tokenizer
    base_digest: str
    private: bool | None


def load_generator(base: Path, variant: Path | None = None, *, device: str | torch.device = "cpu") -> Generator:
    """Load a base and, on top of it, a variant.

    Args:
        base: A checkpoint folder.
        variant: A variant folder: a PEFT adapter with a manifest that names its base.
        device: Where the model runs, in float32 on a CPU and bfloat16 elsewhere.

    Raises:
        CheckpointError: A folder is incomplete or damaged, the adapter is not the manifest's, or the variant belongs
            to another base.
    """
    manifest = read_variant_manifest(variant) if variant is not None else None
    checkpoint = open_checkpoint(base)
    if manifest is not None and manifest["base"] != checkpoint.digest:
        raise CheckpointError(
            f"the variant was trained on the base {manifest['base']}, {base} is {checkpoint.digest}; "
            "name the right one with --base"
        )
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    model = build(checkpoint, device=device, dtype=dtype)
    if variant is not None and manifest is not None:
        described = read_peft_config(variant)
        layout = attention_layout(checkpoint.config, rank=described.rank)
        adapter = read_peft(variant, layout)
        if vector_digest(adapter.vector) != manifest["adapter"]:
            raise CheckpointError(f"{variant}: the adapter is not the one that its manifest names; fetch it again")
        attached = attach(model, layout, seed="", alpha=adapter.alpha, rank=adapter.rank, fixed=adapter.fixed)
        attached.load_vector(adapter.vector)
        model.requires_grad_(False)
    return Generator(
        model=model,
        tokenizer=Tokenizer.from_file(str(checkpoint.tokenizer_path)),
        base_digest=checkpoint.digest,
        private=manifest["private"] if manifest is not None else None,
    )


def read_variant_manifest(variant: Path) -> dict[str, Any]:
    """What a variant says about itself: at least the digests ``base`` and ``adapter``, and whether it is ``private``.

    The manifest's signature is for those who know the operator's key; it is not checked here.

    Raises:
        CheckpointError: No manifest, or one without these fields.
    """
    path = variant / MANIFEST_FILE
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"expected a variant with {MANIFEST_FILE} in {variant}, got: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: expected JSON, got something else ({error})") from error
    if isinstance(value, dict) and isinstance(value.get("manifest"), dict):
        value = value["manifest"]  # The signed form: {"manifest": ..., "signature": ...}.
    wanted = {"base": str, "adapter": str, "private": bool}
    if not isinstance(value, dict) or any(not isinstance(value.get(name), kind) for name, kind in wanted.items()):
        raise CheckpointError(f"{path}: expected a variant's manifest with {', '.join(wanted)}, got something else")
    return value


def encode_prompt(tokenizer: Tokenizer, prompt: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt; a control token that is spelt out in the prompt's text stays text.

    Args:
        tokenizer: The base's tokenizer.
        prompt: Plain text.
        chat: Wrap the prompt as a user's message in the harmony format, with the answer's header open.

    Raises:
        UsageError: The prompt has no tokens.
        CheckpointError: The tokenizer has no control tokens to wrap it with.
    """
    if not prompt:
        raise UsageError("expected a prompt, got empty text")
    if not chat:
        return _text_ids(tokenizer, prompt)
    ids: list[int] = []
    for control, text in (
        ("<|start|>", "user"),
        ("<|message|>", prompt),
        ("<|end|>", ""),
        ("<|start|>", "assistant"),
        ("<|channel|>", "final"),
        ("<|message|>", ""),
    ):
        control_id = tokenizer.token_to_id(control)
        if control_id is None:
            raise CheckpointError(f"the base's tokenizer has no {control}; use --raw to continue plain text")
        ids += [control_id, *_text_ids(tokenizer, text)]
    return ids


def generate(generator: Generator, prompt_ids: list[int], sampling: Sampling) -> list[int]:
    """Continue a prompt.

    Returns:
        The new token ids, without the one that ended the text.

    Raises:
        UsageError: Prompt and new tokens together are longer than the model's context.
    """
    model, tokenizer = generator.model, generator.tokenizer
    longest = model.config.max_position_embeddings
    if len(prompt_ids) + sampling.max_new_tokens > longest:
        raise UsageError(
            f"expected at most {longest} tokens together, got {len(prompt_ids)} of prompt and "
            f"{sampling.max_new_tokens} to generate; shorten one"
        )
    ends = [tokenizer.token_to_id(name) for name in _END_TOKENS]
    ends = [end for end in ends if end is not None]
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if sampling.temperature > 0:
        options |= {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    inputs = torch.tensor([prompt_ids], device=model.device)  # (1, T)
    # transformers draws from the global generator; the fork keeps a seed from reaching anything else.
    with torch.inference_mode(), torch.random.fork_rng(enabled=sampling.seed is not None):
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            **options,
        )
    new = output[0, len(prompt_ids) :].tolist()
    return new[:-1] if new and new[-1] in ends else new


def _text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of text in which control tokens are spelt, not obeyed."""
    previous = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    finally:
        tokenizer.encode_special_tokens = previous
