"""An adapter as PEFT writes it: ``adapter_config.json`` and ``adapter_model.safetensors``, exactly.

For attention a file's matrix is the layout's. For experts PEFT (0.21, ``target_parameters``) keeps one matrix for all
experts of a layer, in two different orders, which other projects mispaired for months::

    lora_A [E * R, in]     expert slowest: rows e * R to e * R + R - 1 are expert e's
    lora_B [out, R * E]    expert fastest: columns e, E + e, 2 E + e, ... are expert e's

and it nests a wrapper for each parameter, gate_up's inside down's, which shows in the names (`layout.EXPERTS`). PEFT
knows no pair that experts share: such a pair is written once for every expert, and read after all were found equal.

A folder does not say whether its experts share a pair, nor which factors trained; a variant's manifest does.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from foedus_protocols.canonical import digest_file
from foedus_protocols.errors import CheckpointError
from foedus_protocols.layout import (
    ATTENTION,
    EXPERTS,
    Layout,
    Tensor,
    Vector,
    adapter_layout,
    check_matrix,
    fixed_tensors,
    flatten,
    is_lora_a,
    unflatten,
)

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

Kind = Literal["attention", "experts"]

_MOST_RANK = 1 << 20

# Switches of PEFT's LoRA that change what the matrices mean; an adapter that sets one is refused, not misread.
_PLAIN_LORA: Mapping[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "alpha_pattern": (None, {}),
    "arrow_config": (None,),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),  # Others change the base, too.
    "kasa_config": (None,),
    "layer_replication": (None,),
    "layers_to_transform": (None,),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "use_dora": (False, None),
    "use_rslora": (False, None),
}


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """A PEFT LoRA folder that fits a layout.

    Attributes:
        rank: R.
        alpha: Numerator of the scale alpha / R.
        base_name: What the adapter's config calls its base; informative only.
        vector: The trained matrices.  # (d,)
        fixed: The matrices that did not train, as stored, in the layout's shapes.
    """

    rank: int
    alpha: float
    base_name: str
    vector: Vector
    fixed: dict[str, Vector]


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """What a folder's ``adapter_config.json`` says.

    Attributes:
        kind: Which matrices are adapted.
        layers: In which layers, ascending; None for all.
    """

    rank: int
    alpha: float
    base_name: str
    kind: Kind
    layers: tuple[int, ...] | None


def write_peft(
    folder: Path, *, layout: Layout, vector: Vector, seed: str, rank: int, alpha: float, base_name: str
) -> None:
    """Write an adapter as PEFT does: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        folder: Made if absent; files of these names are replaced.
        layout: Where the matrices are in the vector.
        vector: The trained matrices.  # (d,)
        seed: Of the fixed matrices, which are written out so that PEFT needs nothing else.
        rank: R; must be the layout's.
        alpha: Numerator of the scale alpha / R.
        base_name: Shown as ``base_model_name_or_path``.

    Raises:
        CheckpointError: The vector or the rank does not fit the layout.
    """
    _check_rank(layout, rank)
    matrices = {**fixed_tensors(layout, seed), **unflatten(layout, vector)}
    modules, parameters = _target_names(layout)
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": modules,  # An empty list: with none at all PEFT takes its own default for the architecture.
        "target_parameters": parameters,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(
        {tensor.name: _to_file(tensor, matrices[tensor.name], layout.num_experts) for tensor in layout.tensors},
        folder / ADAPTER_FILE,
        metadata={"format": "pt"},
    )


def read_peft_config(folder: Path) -> PeftConfig:
    """Read ``adapter_config.json``.

    Raises:
        CheckpointError: Missing, not JSON, not plain LoRA on the attention or on the experts of the same layers, or
            with a switch that changes its meaning.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"expected {path}, found no such file: is this a variant folder?") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"expected JSON in {path}, got text that is not") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise CheckpointError(f"expected peft_type LORA in {path}, got another kind of adapter")
    for switch, plain in _PLAIN_LORA.items():
        if switch in config and config[switch] not in plain:
            raise CheckpointError(f"expected plain LoRA in {path}, got {switch} = {config[switch]!r}")
    kind, layers = _targets_of(config, path)
    rank, alpha = config.get("r"), _finite(config.get("lora_alpha"))
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= _MOST_RANK or alpha is None:
        got = f"r = {reprlib.repr(rank)}, lora_alpha = {reprlib.repr(config.get('lora_alpha'))}"
        raise CheckpointError(f"expected a rank and an alpha in {path}, got {got}")
    return PeftConfig(
        rank=rank,
        alpha=alpha,
        base_name=str(config.get("base_model_name_or_path") or ""),
        kind=kind,
        layers=layers,
    )


def _finite(value: object) -> float | None:
    """A finite number; None for anything else, which a whole number beyond fp64's range is too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def folder_layout(folder: Path, base_config: Mapping[str, Any], manifest: Mapping[str, Any] | None = None) -> Layout:
    """The layout of a folder's matrices on a base.

    Args:
        folder: A PEFT folder, ours or another tool's.
        base_config: The base's ``config.json``.
        manifest: A variant's, whose ``adapter_terms`` say what a folder cannot: whether experts share a pair, and which
            factors trained. Without them experts have a pair each, and every A counts as fixed.

    Raises:
        CheckpointError: The config is none that is supported, or the manifest is of another kind of adapter, or of
            another rank, alpha or other layers.
        ConfigError: The base has not the layers that the folder names.
    """
    described = read_peft_config(folder)
    terms = (manifest or {}).get("adapter_terms")
    terms = terms if isinstance(terms, dict) else {}
    targets = terms.get("targets", described.kind)
    if str(targets).partition("-")[0] != described.kind:
        raise CheckpointError(
            f"expected an adapter of {targets} in {folder}, as its manifest says, got {described.kind}"
        )
    for name, found in (("rank", described.rank), ("alpha", described.alpha), ("layers", described.layers)):
        said = terms.get(name, found)
        if (tuple(said) if isinstance(said, list) else said) != found:
            raise CheckpointError(
                f"expected the {name} {said} in {folder / CONFIG_FILE}, as the variant's manifest says, got {found}: "
                "the file was changed; fetch the variant again"
            )
    return adapter_layout(
        base_config, targets=targets, rank=described.rank, layers=described.layers, train=terms.get("train") or "b"
    )


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the two files of a PEFT folder, by name: what a variant's manifest has as ``files``."""
    return {name: digest_file(folder / name) for name in (ADAPTER_FILE, CONFIG_FILE)}


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare a variant's files with the digests in its manifest.

    The digest of the trained vector leaves the fixed matrices and alpha open, which change the model as much. Manifests
    of 0.2 and before have no ``files``: of those `folder_layout` compares rank, alpha and layers, and the fixed
    matrices stay unchecked, since no digest of them was signed.

    Raises:
        CheckpointError: A file is another one, or ``files`` does not name both. `read_peft` refuses absent ones.
    """
    if "files" not in manifest:
        return
    files = manifest["files"]
    for name in (ADAPTER_FILE, CONFIG_FILE):
        wanted = files.get(name) if isinstance(files, dict) else None
        if not isinstance(wanted, str):
            raise CheckpointError(
                f"expected the digest of {name} in the manifest of {folder}, got none; fetch the variant again"
            )
        path = folder / name
        if path.is_file() and (found := digest_file(path)) != wanted:
            raise CheckpointError(
                f"expected {path} with the digest {wanted} of the variant's manifest, got {found}; "
                "fetch the variant again"
            )


def read_peft(folder: Path, layout: Layout) -> PeftAdapter:
    """Read a PEFT folder whose matrices are exactly those of a layout. Pickled weights are never opened.

    Raises:
        CheckpointError: A file is missing or malformed; matrices are missing, left over, misshapen or not fp32; or the
            experts of a pair that the layout shares differ.
    """
    config = read_peft_config(folder)
    _check_rank(layout, config.rank)
    path = folder / ADAPTER_FILE
    if not path.is_file():
        pickled = next((item.name for item in sorted(folder.iterdir()) if item.suffix in {".bin", ".pt", ".pth"}), None)
        found = f"found the pickle {pickled}, which is never opened" if pickled else "found no such file"
        raise CheckpointError(f"expected {path}, {found}: export the adapter as safetensors")
    try:
        with safe_open(path, framework="np") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError) as error:
        raise CheckpointError(f"expected safetensors of fp32 in {path}, got a truncated or foreign file") from error
    surplus = sorted(stored.keys() - {tensor.name for tensor in layout.tensors})
    if surplus:
        raise CheckpointError(f"expected only the layout's tensors in {path}, got {surplus[0]} too")
    matrices = {
        tensor.name: _from_file(tensor, stored.get(tensor.name), layout.num_experts) for tensor in layout.tensors
    }
    return PeftAdapter(
        rank=config.rank,
        alpha=config.alpha,
        base_name=config.base_name,
        vector=flatten(layout, matrices),
        fixed={tensor.name: matrices[tensor.name] for tensor in layout.fixed()},
    )


def _to_file(tensor: Tensor, matrix: Vector, num_experts: int) -> Vector:
    """A matrix as PEFT stores it; a stack is spread over the experts."""
    if len(tensor.shape) == 2:
        return np.ascontiguousarray(matrix)
    stack = np.broadcast_to(matrix, (num_experts, *tensor.shape[1:]))  # (E, R, in) or (E, out, R)
    if is_lora_a(tensor):
        return np.ascontiguousarray(stack).reshape(-1, tensor.shape[-1])  # (E * R, in)
    return np.ascontiguousarray(stack.transpose(1, 2, 0)).reshape(tensor.shape[1], -1)  # (out, R * E)


def _from_file(tensor: Tensor, matrix: Vector | None, num_experts: int) -> Vector:
    """A matrix of the layout's shape from PEFT's.

    Raises:
        CheckpointError: Missing, misshapen, not fp32, or shared and not equal for all experts.
    """
    if len(tensor.shape) == 2:
        check_matrix(tensor.name, tensor.shape, matrix)
        return matrix  # type: ignore[return-value]  # check_matrix raises on None.
    pairs, first, last = tensor.shape
    if is_lora_a(tensor):
        shape, stacked = (num_experts * first, last), (num_experts, first, last)
    else:
        shape, stacked = (first, last * num_experts), (first, last, num_experts)
    check_matrix(tensor.name, shape, matrix)
    stack = np.asarray(matrix).reshape(stacked)
    stack = stack if is_lora_a(tensor) else stack.transpose(2, 0, 1)  # (E, out, R)
    if pairs == 1 and not np.array_equal(stack, np.broadcast_to(stack[:1], stack.shape)):
        raise CheckpointError(
            f"expected {tensor.name} to be the same for all {num_experts} experts, which share it, got different ones: "
            "read it as an adapter of experts"
        )
    return np.ascontiguousarray(stack[:pairs])


def _target_names(layout: Layout) -> tuple[list[str], list[str] | None]:
    """PEFT's ``target_modules`` and ``target_parameters`` of a layout."""
    names = [f"mlp.experts.{name}" for name in EXPERTS] if layout.num_experts else list(ATTENTION)
    if layout.layers is not None:
        inner = names if layout.num_experts else [f"self_attn.{name}" for name in names]
        names = [f"layers.{layer}.{name}" for layer in layout.layers for name in inner]
    return ([], names) if layout.num_experts else (names, None)


def _targets_of(config: Mapping[str, Any], path: Path) -> tuple[Kind, tuple[int, ...] | None]:
    """Which matrices a config adapts, in which layers.

    Raises:
        CheckpointError: None of the sets that are supported, or not the same ones in each of its layers.
    """
    modules, parameters = config.get("target_modules") or [], config.get("target_parameters") or []
    for kind, found, other, known in (
        ("attention", modules, parameters, [f"self_attn.{name}" for name in ATTENTION]),
        ("experts", parameters, modules, [f"mlp.experts.{name}" for name in EXPERTS]),
    ):
        if other or not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            continue
        plain = sorted(known) if kind == "experts" else sorted(name.rpartition(".")[2] for name in known)
        if sorted(found) == plain:
            return kind, None  # type: ignore[return-value]
        layers = sorted({int(name.split(".")[1]) for name in found if _in_a_layer(name, known)})
        if layers and sorted(found) == sorted(f"layers.{layer}.{name}" for layer in layers for name in known):
            return kind, tuple(layers)  # type: ignore[return-value]
    raise CheckpointError(
        f"expected target_modules {', '.join(ATTENTION)}, or target_parameters "
        f"{', '.join(f'mlp.experts.{name}' for name in EXPERTS)}, in {path}, got target_modules {modules!r}, "
        f"target_parameters {parameters!r}"
    )


def _in_a_layer(name: str, known: list[str]) -> bool:
    head, _, rest = name.partition(".")
    layer, _, inner = rest.partition(".")
    return head == "layers" and layer.isdecimal() and layer.isascii() and len(layer) < 5 and inner in known


def _check_rank(layout: Layout, rank: int) -> None:
    inner = {tensor.shape[-2 if is_lora_a(tensor) else -1] for tensor in layout.tensors}
    if inner != {rank}:
        raise CheckpointError(f"expected rank {rank} throughout the layout, got {sorted(inner)}")
