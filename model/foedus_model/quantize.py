"""A base -> the same base with its large matrices in another codec, one tensor in memory at a time.

transformers keeps a dense expert matrix as [E, in, out]; every codec stores rows of outputs, in groups of inputs. What
a codec does not store is in bfloat16, as released. A tied head is stored once, as the embedding.

Rounding is to nearest, group by group. Methods that look at activations first (GPTQ, AWQ) and rounding-aware training
are left out: they need data.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from foedus_protocols.errors import CheckpointError
from foedus_protocols.manifest import CONFIG_FILE, INDEX_FILE
from foedus_protocols.original import MXFP4
from foedus_protocols.progress import byte_progress

from foedus_model.build import check_tensors, specs_of
from foedus_model.checkpoint import Checkpoint, write_streamed
from foedus_model.codecs import CODECS, Codec, codec
from foedus_model.linear import ATTENTION
from foedus_model.parts import in_units, part_of
from foedus_model.shards import SHARD_BYTES

_EXPERT_MATRICES = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
_LINEAR_MATRICES = tuple(f".self_attn.{name}.weight" for name in ATTENTION)
_NOT_COPIED = (CONFIG_FILE, INDEX_FILE, "dtypes.json")  # Written anew, or about OpenAI's layout alone.


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What `convert` wrote.

    Attributes:
        digest: The new base's.
        source_bytes: Bytes of the source's tensors.
        bytes: Bytes of the new base's tensors.
        errors: By part, ``||stored - source|| / ||source||`` over the matrices that were rounded.
    """

    digest: str
    source_bytes: int
    bytes: int
    errors: Mapping[str, float]


def quantise(
    state: Mapping[str, torch.Tensor], config: Mapping[str, Any], to: str = "mxfp4"
) -> dict[str, torch.Tensor]:
    """Round the state of a dense `GptOssForCausalLM` to the released layout.

    Args:
        state: `model.state_dict()` of the dense model.
        config: Its ``config.json``.
        to: The codec, `mxfp4` as released.

    Returns:
        Tensors by released name: the codec's parts for the matrices that it stores, bfloat16 for the rest.

    Raises:
        CheckpointError: An unknown codec, no expert matrix is in `state`, or one cannot be stored.
    """
    into = codec(to)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if _stores(into, name):
            tensors |= _encoded(into, name, _rows_of_outputs(name, tensor))
        elif not (name == "lm_head.weight" and config.get("tie_word_embeddings")):
            tensors[name] = tensor.detach().to(torch.bfloat16)
    if not any(part_of(name) == "experts" for name in tensors):
        raise CheckpointError("expected a dense gpt-oss model with expert matrices, got a state without any")
    return tensors


def quantised_config(config: Mapping[str, Any], to: str) -> dict[str, Any]:
    """A ``config.json`` that says how the matrices are stored.

    `nf4` and `int8` have method names of our own: no other program must take them for a format that it knows.
    """
    if to == "mxfp4":
        described: dict[str, Any] = copy.deepcopy(MXFP4)
    else:
        kept = ["model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        described = {"quant_method": f"foedus_{to}", "group": codec(to).group, "modules_to_not_convert": kept}
    return {**config, "quantization_config": described}


def convert(
    source: Checkpoint, out: Path, *, to: str, requantise: bool = False, shard_bytes: int = SHARD_BYTES
) -> Converted:
    """Write a base again with its matrices in another codec. The folder appears complete or not at all.

    Args:
        source: A verified base, dense or quantised.
        out: A folder that does not exist yet, or is empty. Until the end all is in ``OUT.part`` beside it, which is
            removed where the conversion fails.
        to: ``mxfp4``, ``nf4`` or ``int8``.
        requantise: Allow a source that is rounded already: errors add up.
        shard_bytes: The most that a file holds.

    Raises:
        CheckpointError: A source that is quantised already, or does not fit its own configuration, or cannot be stored
            in this codec; a folder that is in use; too little room on the disk.
    """
    # `.` has no name of its own to put ``.part`` behind, and a link's place is not where its folder can be replaced.
    out = out.resolve()
    into, held = codec(to), source.manifest.quantisation
    _refuse_rounded(source, to, requantise)
    check_tensors(source)
    config = quantised_config(source.config, to)
    specs = specs_of(config)
    sizes = {name: spec.nbytes for name, spec in specs.items()}
    reader = _Reader(source.tensors(), CODECS.get(held))
    writer = _Writer(reader, into)
    total = sum(sizes.values())
    with _folder(out, total) as part, byte_progress(f"writing {out.name} as {to}", total) as advance:

        def make(name: str) -> torch.Tensor:
            tensor = writer.make(name)
            advance(sizes[name])
            return tensor

        digest = write_streamed(
            part,
            config=config,
            specs=specs,
            make=make,
            tokenizer_file=None,
            provenance={"made": f"{held} rounded to {to}", "source": source.digest},
            shard_bytes=shard_bytes,
            companions=[source.path / name for name in _companions(source)],
        )
    return Converted(
        digest=digest,
        source_bytes=sum(spec.nbytes for spec in source.contents.specs.values()),
        bytes=total,
        errors={part: error.relative() for part, error in writer.errors.items()},
    )


@dataclass
class _Error:
    """Sums of squares, of the difference and of the source."""

    difference: float = 0.0
    source: float = 0.0

    def add(self, stored: torch.Tensor, source: torch.Tensor) -> None:
        self.difference += float((stored - source).double().square().sum())
        self.source += float(source.double().square().sum())

    def relative(self) -> float:
        return math.sqrt(self.difference / self.source) if self.source else 0.0


@dataclass(frozen=True)
class _Reader:
    """The source's matrices in float32, whatever stores them."""

    tensors: Mapping[str, torch.Tensor]
    stored_as: Codec | None

    def tensor(self, name: str) -> torch.Tensor:
        """What the target keeps in bfloat16, a quantised linear layer of the source among it."""
        if name in self.tensors:
            return self.tensors[name].to(torch.bfloat16)
        return next(self.pieces(name)).to(torch.bfloat16)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """A linear layer's matrix (N, K), or a stack expert by expert (N, K), in float32."""
        if self.stored_as is not None and _stores(self.stored_as, name):
            first, second = (self.tensors[f"{name}_{suffix}"] for suffix, _, _ in self.stored_as.parts)
            if not name.endswith(_EXPERT_MATRICES):
                first, second = first.unsqueeze(0), second.unsqueeze(0)
            stack = self.stored_as.weights(first, second)
            for expert in range(stack.shape[0]):
                yield stack.decode((expert,), torch.float32)[0]
            return
        matrix = _rows_of_outputs(name, self.tensors[name])
        for piece in matrix if matrix.dim() == 3 else (matrix,):
            yield piece.to(torch.float32)


@dataclass(frozen=True)
class _Writer:
    """Makes the target's tensors, and sums up what rounding changed."""

    reader: _Reader
    codec: Codec
    errors: dict[str, _Error] = field(default_factory=dict)

    def make(self, name: str) -> torch.Tensor:
        """A tensor of the target by its name.

        A matrix is rounded once for its codes and once for its scales: in a file wide types come first, and keeping the
        codes until their turn would keep half a model. The error is taken from the codes' turn.
        """
        for turn, (suffix, _, _) in enumerate(self.codec.parts):
            matrix = name.removesuffix(f"_{suffix}")
            if matrix != name and _stores(self.codec, matrix):
                return self._part(matrix, turn)
        return self.reader.tensor(name)

    def _part(self, name: str, turn: int) -> torch.Tensor:
        parts = []
        for piece in self.reader.pieces(name):  # (N, K)
            encoded = _encode(self.codec, name, piece)
            if turn == 0:
                again = self.codec.weights(*(tensor.unsqueeze(0) for tensor in encoded)).decode((0,), torch.float32)[0]
                self.errors.setdefault(part_of(name), _Error()).add(again, piece)
            parts.append(encoded[turn])
        return torch.stack(parts) if name.endswith(_EXPERT_MATRICES) else parts[0]


def _stores(into: Codec, name: str) -> bool:
    """Whether a codec stores the matrix that a dense model has under this name."""
    return name.endswith(_EXPERT_MATRICES) or (into.linears and name.endswith(_LINEAR_MATRICES))


def _rows_of_outputs(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().mT if name.endswith(_EXPERT_MATRICES) else tensor.detach()


def _encoded(into: Codec, name: str, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = zip(into.parts, _encode(into, name, matrix), strict=True)
    return {f"{name}_{suffix}": tensor for (suffix, _, _), tensor in parts}


def _encode(into: Codec, name: str, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        return into.encode(matrix.contiguous())
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _refuse_rounded(source: Checkpoint, to: str, requantise: bool) -> None:
    held = source.manifest.quantisation
    if held == to:
        raise CheckpointError(f"expected a base in another codec than {to}, got {source.path}, stored so already")
    if held != "dense" and not requantise:
        raise CheckpointError(
            f"expected a dense base to round to {to}, got {source.path} in {held}: rounding twice adds the errors up "
            "(MXFP4 to NF4 was measured at 9.4 % more perplexity); take the dense release, or say --requantise"
        )


def _companions(source: Checkpoint) -> list[str]:
    weights = source.manifest.weight_files
    return [name for name in source.manifest.files if name not in weights and name not in _NOT_COPIED]


@contextmanager
def _folder(out: Path, total: int) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end, or is removed."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"expected a new or empty folder to write a model to, got {out}")
    part = out.with_name(f"{out.name}.part")
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < total:
        raise CheckpointError(
            f"expected {in_units(total)} of free disk in {out.parent}, got {in_units(free)}; "
            "make room, or write elsewhere"
        )
    try:
        part.mkdir()
    except FileExistsError as error:
        raise CheckpointError(
            f"expected no {part}, got one: a conversion runs, or was killed; remove it if none runs"
        ) from error
    try:
        yield part
        os.replace(part, out)
    except BaseException:
        shutil.rmtree(part)
        raise
