"""Checkpoints in the released layout: open one without reading it into memory, write one that other tools read.

The files are memory-mapped safetensors; a tensor that nobody touches costs nothing. What a folder must contain, and
that it is unchanged, says its manifest (`foedus_protocols.manifest`); what the tensors must look like, the model they
are loaded into (`build.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from foedus_protocols.errors import CheckpointError
from foedus_protocols.manifest import (
    CONFIG_FILE,
    INDEX_FILE,
    TOKENIZER_FILE,
    Manifest,
    read_config,
    verify_manifest,
    write_manifest,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

SHARD_BYTES = 4 << 30


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint folder.

    Attributes:
        path: The folder.
        config: Its ``config.json``.
        manifest: Its verified manifest.
        digest: The base's identity, the digest of the manifest.
    """

    path: Path
    config: dict[str, Any]
    manifest: Manifest
    digest: str

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's file.

        Raises:
            CheckpointError: The base came without one.
        """
        if self.manifest.tokenizer_digest is None:
            raise CheckpointError(f"expected {TOKENIZER_FILE} in {self.path}, got a base without tokenizer")
        return self.path / TOKENIZER_FILE

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name, memory-mapped, in the types of the file. Keep them read-only.

        Raises:
            CheckpointError: A file is not valid safetensors, or two files hold one name.
        """
        found: dict[str, torch.Tensor] = {}
        for name in self.manifest.weight_files:
            with _opened(self.path / name) as file:
                for key in file.keys():  # noqa: SIM118 - safe_open is not iterable
                    if key in found:
                        raise CheckpointError(f"{self.path / name}: {key} is in another shard already")
                    found[key] = file.get_tensor(key)
        return found


def open_checkpoint(path: Path, expect_digest: str | None = None) -> Checkpoint:
    """Open a base model and verify all of its bytes.

    Args:
        path: The folder.
        expect_digest: The base that is wanted; None accepts any.

    Raises:
        CheckpointError: A missing, truncated or changed file, a pickle, an unknown quantisation, or another base.
    """
    manifest = verify_manifest(path, expect_digest)
    return Checkpoint(path=path, config=read_config(path), manifest=manifest, digest=manifest.digest)


def require_safetensors(path: Path) -> None:
    """Look at the header of every weight file of a folder that has no manifest yet.

    Raises:
        CheckpointError: A file is truncated, or something else under the name of safetensors.
    """
    for file in sorted(path.glob("*.safetensors")):
        with _opened(file):
            pass


def write_checkpoint(
    path: Path,
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    tokenizer_file: Path | None,
    provenance: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write a checkpoint in the released layout, the manifest last.

    Args:
        path: A folder that does not exist yet, or is empty.
        config: The ``config.json``; its ``quantization_config`` says what the expert tensors are.
        tensors: By released name, as `quantize.quantise` returns them.
        tokenizer_file: A ``tokenizer.json`` of the tokenizers library, copied; or None.
        provenance: Free JSON for the manifest.
        shard_bytes: Tensors are split into files of at most this size (or of one tensor).

    Returns:
        The base's digest.

    Raises:
        CheckpointError: The folder is not empty.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"expected a new or empty folder to write a model to, got {path}")
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / CONFIG_FILE, config)
    if tokenizer_file is not None:
        shutil.copyfile(tokenizer_file, path / TOKENIZER_FILE)
        _write_json(path / "tokenizer_config.json", _tokenizer_config(path / TOKENIZER_FILE, config))
    _write_shards(path, tensors, shard_bytes)
    return write_manifest(path, provenance=provenance).digest


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: expected a complete safetensors file ({error}); fetch it again") from error


def _write_shards(path: Path, tensors: Mapping[str, torch.Tensor], shard_bytes: int) -> None:
    """Write the tensors in name order, in as few files as the limit allows."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], path / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, path / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    _write_json(path / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _tokenizer_config(tokenizer_file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' `AutoTokenizer` needs beside ``tokenizer.json``; token names follow from the config's ids."""
    added = json.loads(tokenizer_file.read_bytes()).get("added_tokens", [])
    names = {token["id"]: token["content"] for token in added}
    described: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    for kind in ("bos", "eos", "pad"):
        name = names.get(config.get(f"{kind}_token_id"))
        if name is not None:
            described[f"{kind}_token"] = name
    return described


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
