"""Checkpoints on disk: open one without reading it into memory, write one that other tools read.

The files are memory-mapped safetensors; a tensor that nobody touches costs nothing. A folder is in the released layout
or in OpenAI's own (``original/``); either way tensors are asked for by their released names. What a folder must
contain, and that it is unchanged, says its manifest (`foedus_protocols.manifest`); what the tensors must look like, the
model they are loaded into (`build.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from foedus_protocols import original as original_config
from foedus_protocols.errors import CheckpointError
from foedus_protocols.manifest import (
    CONFIG_FILE,
    INDEX_FILE,
    TOKENIZER_FILE,
    Manifest,
    layout_of,
    read_config,
    read_index,
    verify_manifest,
    write_manifest,
)

from foedus_model.original import Piece, piece_spec, pieces, to_original
from foedus_model.shards import SHARD_BYTES, Make, TensorSpec, opened, plan_shards, read_specs, write_file


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What the weight files of a folder hold, by their headers.

    Attributes:
        specs: Type and shape of each tensor, by released name.
        files: The file of each tensor, by its name there.
        pieces: Where each released tensor lies.
    """

    specs: dict[str, TensorSpec]
    files: dict[str, str]
    pieces: dict[str, Piece]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint folder.

    Attributes:
        path: The folder.
        config: Its ``config.json``, in transformers' field names.
        manifest: Its verified manifest.
        digest: The base's identity, the digest of the manifest.
        layout: Whose names its files use, ``released`` or ``original``.
    """

    path: Path
    config: dict[str, Any]
    manifest: Manifest
    digest: str
    layout: str

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's file.

        Raises:
            CheckpointError: The base came without one.
        """
        if self.manifest.tokenizer_digest is None:
            raise CheckpointError(
                f"expected {TOKENIZER_FILE} in {self.path}, got a base without tokenizer; copy the release's "
                "tokenizer.json there and write the manifest again"
            )
        return self.path / TOKENIZER_FILE

    @cached_property
    def contents(self) -> Contents:
        """What the files hold; only their headers are read.

        Raises:
            CheckpointError: A file is not valid safetensors, two files hold one name, or the index says otherwise.
        """
        return read_contents(self.path, self.manifest.weight_files, self.config, self.layout)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by released name, memory-mapped, in the types of the file. Keep them read-only.

        Raises:
            CheckpointError: As `contents`.
        """
        held = self.contents
        sources: dict[str, torch.Tensor] = {}
        for file_name in self.manifest.weight_files:
            with opened(self.path / file_name) as file:
                sources |= {name: file.get_tensor(name) for name, holder in held.files.items() if holder == file_name}
        return {name: piece.of(sources[piece.source]) for name, piece in held.pieces.items()}


def open_checkpoint(path: Path, expect_digest: str | None = None) -> Checkpoint:
    """Open a base model and verify all of its bytes.

    Args:
        path: The folder.
        expect_digest: The base that is wanted; None accepts any.

    Raises:
        CheckpointError: A missing, truncated or changed file, a pickle, an unknown quantisation, or another base.
    """
    manifest = verify_manifest(path, expect_digest)
    return Checkpoint(
        path=path, config=read_config(path), manifest=manifest, digest=manifest.digest, layout=layout_of(path)
    )


def read_contents(path: Path, file_names: list[str], config: Mapping[str, Any], layout: str) -> Contents:
    """What the weight files of a folder hold, by their headers; `Checkpoint.contents` says more.

    Raises:
        CheckpointError: A file is not valid safetensors, two files hold one name, or the index says otherwise.
    """
    found: dict[str, TensorSpec] = {}
    files: dict[str, str] = {}
    for file_name in file_names:
        for name, spec in read_specs(path / file_name).items():
            if name in found:
                raise CheckpointError(f"{path / file_name}: {name} is in another shard already, {files[name]}")
            found[name], files[name] = spec, file_name
    _check_index(path, files)
    where = pieces(found, config) if layout == "original" else {name: Piece(name) for name in found}
    return Contents(specs={name: piece_spec(piece, found) for name, piece in where.items()}, files=files, pieces=where)


def write_checkpoint(
    path: Path,
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    tokenizer_file: Path | None,
    provenance: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    layout: str = "released",
) -> str:
    """Write a checkpoint whose tensors are at hand; `write_streamed` says more.

    Args:
        path: A folder that does not exist yet, or is empty.
        config: The ``config.json``; its ``quantization_config`` says what the expert tensors are.
        tensors: By released name, as `quantize.quantise` returns them.
        tokenizer_file: A ``tokenizer.json`` of the tokenizers library, copied; or None.
        provenance: Free JSON for the manifest.
        shard_bytes: Tensors are split into files of at most this size (or of one tensor).
        layout: ``released``, or ``original`` for OpenAI's names.

    Returns:
        The base's digest.

    Raises:
        CheckpointError: The folder is not empty, or the layout cannot hold this model.
    """
    specs = {name: TensorSpec.of(tensors[name]) for name in sorted(tensors)}
    return write_streamed(
        path,
        config=config,
        specs=specs,
        make=tensors.__getitem__,
        tokenizer_file=tokenizer_file,
        provenance=provenance,
        shard_bytes=shard_bytes,
        layout=layout,
    )


def write_streamed(
    path: Path,
    *,
    config: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    make: Make,
    tokenizer_file: Path | None,
    provenance: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    layout: str = "released",
    companions: Sequence[Path] = (),
) -> str:
    """Write a checkpoint of any size with one tensor in memory at a time, the manifest last.

    Args:
        path: A folder that does not exist yet, or is empty.
        config: The ``config.json``, in transformers' field names.
        specs: Every tensor's type and shape, in the order in which they fill the files.
        make: Returns a tensor by its released name; called once for each (a name that is part of a fused matrix, too).
        tokenizer_file: A ``tokenizer.json`` of the tokenizers library, copied; or None.
        provenance: Free JSON for the manifest.
        shard_bytes: The most that a file holds.
        layout: ``released``, or ``original`` for OpenAI's names.
        companions: Further files to copy, such as those of a tokenizer with all that came beside it.

    Returns:
        The base's digest.

    Raises:
        CheckpointError: The folder is not empty, or the layout cannot hold this model.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"expected a new or empty folder to write a model to, got {path}")
    described = dict(config)
    if layout == "original":
        described = original_config.to_original(config)
        specs, make = to_original(specs, make)
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / CONFIG_FILE, described)
    if tokenizer_file is not None:
        shutil.copyfile(tokenizer_file, path / TOKENIZER_FILE)
        _write_json(path / "tokenizer_config.json", _tokenizer_config(path / TOKENIZER_FILE, config))
    for companion in companions:
        shutil.copyfile(companion, path / companion.name)
    shards = plan_shards(specs, shard_bytes, layout)
    for file_name, names in shards.items():
        write_file(path / file_name, {name: specs[name] for name in names}, make)
    if len(shards) > 1:
        weight_map = {name: file_name for file_name, names in shards.items() for name in names}
        total = sum(spec.nbytes for spec in specs.values())
        _write_json(path / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return write_manifest(path, provenance=provenance).digest


def _check_index(path: Path, files: Mapping[str, str]) -> None:
    """The index must say of every tensor the shard that holds it, and of no other."""
    index = read_index(path)
    for name, shard in index.items():
        if files.get(name) != shard:
            raise CheckpointError(
                f"{INDEX_FILE} in {path} says that {shard} holds {name}, which it does not; fetch both again"
            )
    unnamed = sorted(files.keys() - index.keys()) if index else []
    if unnamed:
        raise CheckpointError(
            f"{path / files[unnamed[0]]} holds {unnamed[0]}, which {INDEX_FILE} does not name; fetch both again"
        )


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
