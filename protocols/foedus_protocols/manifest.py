"""The identity of a base model: one manifest that names every file of a checkpoint folder by digest.

A charter names the base by the SHA-256 of ``manifest.json``; the manifest names the files; so one digest fixes weights,
configuration and tokenizer. The folder is the released layout of gpt-oss (``config.json``, safetensors in one file or
in shards with an index, ``tokenizer.json``), or the folder ``original/`` of a release, with the manifest beside them.

Only standard library and canonical JSON here: the coordinator verifies a base without torch. What the tensors must look
like is `foedus_model.checkpoint`'s job.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from foedus_protocols.canonical import canonical_bytes, digest, digest_file, parse_canonical
from foedus_protocols.errors import CheckpointError, VerificationError
from foedus_protocols.original import is_original, to_released
from foedus_protocols.progress import Advance, byte_progress

MANIFEST_FILE = "manifest.json"
CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILE = "tokenizer.json"
FORMAT = "foedus/base/1"

_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_COMPANIONS = (
    CONFIG_FILE,
    INDEX_FILE,
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "dtypes.json",
)
_DIGEST_LENGTH = 64
_METHODS = {"mxfp4": "mxfp4", "foedus_nf4": "nf4", "foedus_int8": "int8"}
"""Names of quantisations by the `quant_method` of a ``config.json``."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint: its digest and its length in bytes."""

    digest: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        files: Every file that belongs to the base, by name, without the manifest itself.
        quantisation: How the large matrices are stored: ``mxfp4``, ``nf4``, ``int8`` or ``dense``.
        provenance: Free JSON about where the weights come from; part of the identity.
    """

    files: Mapping[str, FileEntry]
    quantisation: str
    provenance: Mapping[str, Any]

    @property
    def config_digest(self) -> str:
        """Digest of ``config.json``."""
        return self.files[CONFIG_FILE].digest

    @property
    def tokenizer_digest(self) -> str | None:
        """Digest of ``tokenizer.json``, or None where the folder has no tokenizer."""
        entry = self.files.get(TOKENIZER_FILE)
        return entry.digest if entry else None

    @property
    def weight_files(self) -> list[str]:
        """The safetensors files, sorted by name."""
        return sorted(name for name in self.files if name.endswith(".safetensors"))

    @property
    def digest(self) -> str:
        """The base's identity: the digest of the manifest's bytes."""
        return digest(self.encode())

    def encode(self) -> bytes:
        """The canonical bytes, as they stand in ``manifest.json``."""
        return canonical_bytes(
            {
                "format": FORMAT,
                "files": {name: {"digest": entry.digest, "size": entry.size} for name, entry in self.files.items()},
                "config_digest": self.config_digest,
                "tokenizer_digest": self.tokenizer_digest,
                "quantisation": self.quantisation,
                "provenance": dict(self.provenance),
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Parse a manifest.

        Raises:
            CheckpointError: Not canonical JSON, not of this format, or inconsistent with itself.
        """
        try:
            value = parse_canonical(data)
        except VerificationError as error:
            raise CheckpointError(f"{MANIFEST_FILE}: {error}") from error
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise CheckpointError(f"{MANIFEST_FILE}: expected the format {FORMAT!r}; it was written by another program")
        try:
            manifest = cls(
                files={name: _file_entry(name, entry) for name, entry in value["files"].items()},
                quantisation=str(value["quantisation"]),
                provenance=dict(value["provenance"]),
            )
            again = manifest.encode()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{MANIFEST_FILE}: a field is missing or has a wrong type ({error})") from error
        if again != data:
            raise CheckpointError(f"{MANIFEST_FILE}: its fields contradict each other or are not the expected ones")
        return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read ``manifest.json`` of a checkpoint folder, without looking at the other files.

    Raises:
        CheckpointError: No such folder or manifest, or not a manifest.
    """
    path = folder / MANIFEST_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"expected a base model with {MANIFEST_FILE} in {folder}, got: {error.strerror}; "
            "write one for a downloaded checkpoint with `foedus model manifest DIR`"
        ) from error
    return Manifest.decode(data)


def verify_config(folder: Path, expect_digest: str | None = None) -> Manifest:
    """Read a manifest and check the configuration against it, but not yet the weights: for what is cheap to know first.

    Raises:
        CheckpointError: Another base than expected, no manifest, or a changed configuration.
    """
    manifest = _expected_manifest(folder, expect_digest)
    _verify_file(folder / CONFIG_FILE, manifest.files[CONFIG_FILE])
    return manifest


def verify_manifest(folder: Path, expect_digest: str | None = None) -> Manifest:
    """Read a manifest and check every file against it, with a progress bar where that takes long.

    Args:
        folder: The checkpoint folder.
        expect_digest: The base that a charter or variant names; None accepts any.

    Raises:
        CheckpointError: Another base than expected, a missing, truncated or changed file, a pickle, or weights that
            the manifest does not name.
    """
    manifest = _expected_manifest(folder, expect_digest)
    refuse_pickles(folder)
    unnamed = sorted({path.name for path in folder.glob("*.safetensors")} - set(manifest.files))
    if unnamed:
        raise CheckpointError(f"{folder} holds weights that {MANIFEST_FILE} does not name: {', '.join(unnamed)}")
    with byte_progress(f"verifying {folder.name}", sum(entry.size for entry in manifest.files.values())) as advance:
        for name, entry in manifest.files.items():
            _verify_file(folder / name, entry, advance)
    if quantisation_of(read_config(folder)) != manifest.quantisation:
        raise CheckpointError(f"{MANIFEST_FILE} says {manifest.quantisation!r}, {CONFIG_FILE} says something else")
    return manifest


def write_manifest(folder: Path, *, provenance: Mapping[str, Any]) -> Manifest:
    """Digest a checkpoint folder and write its ``manifest.json``, last and atomically.

    Raises:
        CheckpointError: As `base_files`.
    """
    names, quantisation = base_files(folder), quantisation_of(read_config(folder))
    sizes = {name: (folder / name).stat().st_size for name in names}
    with byte_progress(f"digesting {folder.name}", sum(sizes.values())) as advance:
        digests = {name: digest_file(folder / name, advance) for name in names}
    manifest = Manifest(
        files={name: FileEntry(digest=digests[name], size=sizes[name]) for name in names},
        quantisation=quantisation,
        provenance=provenance,
    )
    part = folder / f"{MANIFEST_FILE}.part"
    part.write_bytes(manifest.encode())
    os.replace(part, folder / MANIFEST_FILE)
    return manifest


def base_files(folder: Path) -> list[str]:
    """The files of a folder that make a base, sorted: weights, configuration, and what came with them.

    Raises:
        CheckpointError: No configuration or weights, a shard that the index names is missing, or a pickle.
    """
    refuse_pickles(folder)
    read_config(folder)
    names = sorted(
        path.name for path in folder.iterdir() if path.name in _COMPANIONS or path.name.endswith(".safetensors")
    )
    if not any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(f"expected safetensors files in {folder}, got none")
    for shard in sorted(set(read_index(folder).values())):
        if shard not in names:
            raise CheckpointError(f"{INDEX_FILE} names {shard}, which is not in {folder}; fetch it again")
    return names


def read_config(folder: Path) -> dict[str, Any]:
    """The model's ``config.json`` as a dictionary, in transformers' field names whatever layout the folder has.

    Raises:
        CheckpointError: Missing, not a JSON object, or in OpenAI's names and incomplete.
    """
    config = _read_object(folder / CONFIG_FILE)
    return to_released(config) if is_original(config) else config


def layout_of(folder: Path) -> str:
    """Whose names a folder's configuration and tensors have: ``released`` (transformers') or ``original`` (OpenAI's).

    Raises:
        CheckpointError: No configuration.
    """
    return "original" if is_original(_read_object(folder / CONFIG_FILE)) else "released"


def quantisation_of(config: Mapping[str, Any]) -> str:
    """How a configuration says that its large matrices are stored: ``mxfp4``, ``nf4``, ``int8`` or ``dense``.

    The last two have method names of our own in the file: bitsandbytes' 4 bits lie in other tensors.

    Raises:
        CheckpointError: Another method, which this version cannot run.
    """
    described = config.get("quantization_config")
    if described is None:
        return "dense"
    method = described.get("quant_method") if isinstance(described, dict) else described
    if not isinstance(method, str) or method not in _METHODS:
        raise CheckpointError(
            f"expected weights in {', '.join(_METHODS)} or without quantisation, got {method!r}: not supported"
        )
    return _METHODS[method]


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder that holds weights in a format that can run code when it is read.

    Raises:
        CheckpointError: Such a file is there. Its name is told; it is never opened.
    """
    if not folder.is_dir():
        raise CheckpointError(f"expected a folder with a model, got {folder}: not a folder")
    found = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in _PICKLES)
    if found:
        raise CheckpointError(
            f"expected safetensors only, got {', '.join(found)} in {folder}: pickles can run code; "
            "convert them elsewhere and remove them"
        )


def _expected_manifest(folder: Path, expect_digest: str | None) -> Manifest:
    manifest = read_manifest(folder)
    if expect_digest is not None and manifest.digest != expect_digest:
        raise CheckpointError(
            f"expected the base {expect_digest}, got {manifest.digest} in {folder}; "
            "use the checkpoint that was agreed on"
        )
    return manifest


def _file_entry(name: str, value: Mapping[str, Any]) -> FileEntry:
    if Path(name).name != name or name in ("", ".", "..", MANIFEST_FILE):
        raise ValueError(f"{name!r} is not the name of a file beside the manifest")
    entry_digest, size = value["digest"], value["size"]
    if not isinstance(entry_digest, str) or len(entry_digest) != _DIGEST_LENGTH or not isinstance(size, int):
        raise TypeError(f"files.{name}")
    return FileEntry(digest=entry_digest, size=size)


def _verify_file(path: Path, entry: FileEntry, advance: Advance | None = None) -> None:
    if not path.is_file():
        raise CheckpointError(f"{MANIFEST_FILE} names {path.name}, which is not in {path.parent}; fetch it again")
    size = path.stat().st_size
    if size != entry.size:
        kind = "truncated" if size < entry.size else "too long"
        raise CheckpointError(f"{path}: expected {entry.size} bytes, got {size} ({kind}); fetch it again")
    found = digest_file(path, advance)
    if found != entry.digest:
        raise CheckpointError(f"{path}: expected the digest {entry.digest}, got {found}; fetch it again")


def read_index(folder: Path) -> dict[str, str]:
    """The shard of each tensor by an index file; empty where the weights come without one.

    Raises:
        CheckpointError: The index is not one.
    """
    if not (folder / INDEX_FILE).exists():
        return {}
    weight_map = _read_object(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{folder / INDEX_FILE}: expected a 'weight_map' of tensor names to files")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX_FILE}: expected file names in 'weight_map', got something else")
    return weight_map


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"expected {path.name} in {path.parent}, got: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, got something else ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value
