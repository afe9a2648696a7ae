"""A base model that is ready to write, alone or with a variant's adapter.

The decoding loop is in `decode.py`, prompts in `chat.py`. What is here is loading, and the refusal to mix: a variant
names its base by digest and is loaded on no other, and a variant that was trained without privacy says so in every
result. The environment's switches (`switches.py`) are those of a worker, as far as nothing is trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from foedus_protocols.errors import CheckpointError
from foedus_protocols.layout import vector_digest
from foedus_protocols.manifest import MANIFEST_FILE
from foedus_protocols.peft_folder import check_files, folder_layout, read_peft
from tokenizers import Tokenizer
from transformers import GptOssForCausalLM

from foedus_model import switches
from foedus_model.adapter import attach
from foedus_model.attention import fuse_attention
from foedus_model.build import build
from foedus_model.chat import TEMPLATE_FILE
from foedus_model.checkpoint import open_checkpoint
from foedus_model.experts import choose_path
from foedus_model.streaming import Streamer, stream_experts

# Rows of a step that writes a token for each request. A prompt's forward may have more; it is one of many.
_MOST_REQUESTS = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class Generator:
    """A model that is ready to continue text.

    Attributes:
        model: The base, with the variant's adapter where there is one.
        tokenizer: The base's tokenizer.
        base_digest: The base's identity.
        private: Whether the variant was trained with differential privacy; None without a variant.
        template: The base's chat template, where it carries one.
        streaming: What copies the layers to the device, where they stream.
    """

    model: GptOssForCausalLM
    tokenizer: Tokenizer
    base_digest: str
    private: bool | None
    template: str | None = None
    streaming: Streamer | None = None

    def close(self) -> None:
        """End the copies of what streams; any number of times."""
        if self.streaming is not None:
            self.streaming.close()


def load_as_switched(base: Path, variant: Path | None = None) -> Generator:
    """`load_generator` where and how the environment says (`switches.py`), which is read before anything is loaded.

    Raises:
        ConfigError: A switch that cannot be, or one that this base, variant or machine cannot follow.
        CheckpointError: As `load_generator`.
    """
    device, fused, experts = switches.default_device(), switches.fused_attention(), switches.experts_path()
    dtype, stream = switches.compute_type(device), switches.units_a_pass() is not None
    switches.prepare_process()
    return load_generator(base, variant, device=device, dtype=dtype, fused=fused, experts=experts, stream=stream)


def load_generator(
    base: Path,
    variant: Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    fused: bool = False,
    experts: str | None = None,
    stream: bool = False,
) -> Generator:
    """Load a base and, on top of it, a variant.

    Args:
        base: A checkpoint folder.
        variant: A variant folder: a PEFT adapter with a manifest that names its base.
        device: Where the model runs.
        dtype: The compute type, float32 or bfloat16.
        fused: Attention in memory linear in the tokens (`attention.fuse_attention`).
        experts: The path of the experts, as `experts.choose_path` takes it.
        stream: Layers stream from the host; a forward brings each of them once, so every new token does.

    Raises:
        CheckpointError: A folder is incomplete or damaged, the adapter is not the manifest's, or the variant belongs
            to another base.
        ConfigError: The experts' path cannot run here, or base or variant cannot stream.
    """
    manifest = read_variant_manifest(variant) if variant is not None else None
    checkpoint = open_checkpoint(base)
    if manifest is not None and manifest["base"] != checkpoint.digest:
        raise CheckpointError(
            f"the variant was trained on the base {manifest['base']}, {base} is {checkpoint.digest}; "
            "name the right one with --base"
        )
    model = build(checkpoint, device=device, dtype=dtype, stream=stream)
    if variant is not None and manifest is not None:
        check_files(variant, manifest)
        layout = folder_layout(variant, checkpoint.config, manifest)
        adapter = read_peft(variant, layout)
        if vector_digest(adapter.vector) != manifest["adapter"]:
            raise CheckpointError(f"{variant}: the adapter is not the one that its manifest names; fetch it again")
        attached = attach(model, layout, seed="", alpha=adapter.alpha, rank=adapter.rank, fixed=adapter.fixed)
        attached.load_vector(adapter.vector)
        model.requires_grad_(False)
    choose_path(model, rows=_MOST_REQUESTS, device=device, wanted=experts)
    if fused:
        fuse_attention(model)
    return Generator(
        model=model,
        tokenizer=Tokenizer.from_file(str(checkpoint.tokenizer_path)),
        base_digest=checkpoint.digest,
        private=manifest["private"] if manifest is not None else None,
        template=_template(base, checkpoint.manifest.files),
        streaming=stream_experts(model, (), units=1) if stream else None,
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


def _template(base: Path, files: Mapping[str, Any]) -> str | None:
    """The base's chat template, where its manifest names one."""
    if TEMPLATE_FILE not in files:
        return None
    try:
        return (base / TEMPLATE_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"expected UTF-8 text in {base / TEMPLATE_FILE}, got: {error}") from error
