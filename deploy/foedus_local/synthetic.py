"""A demo on random weights at a true shape: what it takes, the refusal, and the base.

`foedus demo --preset gpt-oss-20b --synthetic` runs the main job as it would run on the released weights, each
organisation a process with a base of its own, where no released weights are at hand. What comes out is an adapter to
noise: speed and memory mean something, losses do not. The tokenizer is the shipped base's, whose tokens every preset
has room for.

What is needed is traced before anything is written (`foedus_model.fit`): the organisations share one machine, and on a
CPU the base's quantised bytes too, which stay in the mapped files. Left out: the coordinator and what Python itself
takes, and the speed. A base of 20 billion parameters on a CPU runs, for hours.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from foedus_client.switches import checkpointing, units_streamed
from foedus_model.build import specs_of
from foedus_model.fit import DRIVER, fit
from foedus_model.memory import device_free, host_free
from foedus_model.parts import in_units
from foedus_model.switches import compute_type, default_device, fused_attention
from foedus_model.synthesise import shaped, synthesise
from foedus_protocols.errors import CheckpointError
from foedus_protocols.files import DiskFull
from foedus_protocols.manifest import TOKENIZER_FILE

from foedus_local.plan import Terms


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """Bytes that a synthetic demo takes.

    Attributes:
        disk: Of the base's files.
        memory: Of the organisations' processes together, where they run.
    """

    disk: int
    memory: int


def requirements(
    described: Mapping[str, Any], terms: Terms, *, organisations: int, device: torch.device
) -> Requirements:
    """What a demo takes with a base of this configuration, under the settings of the environment.

    Args:
        described: The ``config.json``.
        terms: Of the charter.
        organisations: How many processes hold a base.
        device: Where they do.
    """
    on_gpu = device.type != "cpu"
    # A unit's records are one batch; as one record of all their tokens they are counted on the safe side.
    found = fit(
        described,
        tokens=min(terms.max_tokens * terms.max_records_per_unit, int(described["max_position_embeddings"])),
        dtype=compute_type(device),
        targets=terms.adapter,
        driver=DRIVER if on_gpu else 0,
    )
    weights = sum(found.weights.values()) - (0 if on_gpu else found.weights["experts"])
    activations = found.activations
    if fused_attention():  # Eager attention with checkpointing is not traced, and counted without.
        activations = found.fused if checkpointing() == "off" else found.checkpointed
    each = weights + found.adapter + activations + found.driver
    if on_gpu and fused_attention() and found.stream is not None and units_streamed() is not None:
        each = found.remedies[-1].bytes
    disk = sum(spec.nbytes for spec in specs_of(described).values())
    return Requirements(disk=disk, memory=organisations * each)


def require(preset: str, terms: Terms, folder: Path, *, organisations: int) -> dict[str, Any]:
    """Look at disk and memory before anything is written.

    Returns:
        The preset's configuration.

    Raises:
        ConfigError: No preset has this name.
        DiskFull: The disk of `folder` has less free than the base takes.
        CheckpointError: The GPU, or the host without one, has less free than the organisations take.
    """
    described = shaped(preset)
    device = default_device()
    needed = requirements(described, terms, organisations=organisations, device=device)
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free_disk = shutil.disk_usage(place).free
    if free_disk < needed.disk:
        raise DiskFull(
            f"expected {in_units(needed.disk)} free in {folder} for random weights of the shape {preset}, got "
            f"{in_units(free_disk)}: free some space, or name a folder on another disk with --folder"
        )
    free = device_free(device) if device.type != "cpu" else host_free()
    if free is not None and free < needed.memory:
        raise CheckpointError(
            f"expected {in_units(needed.memory)} of free memory on {device} for {organisations} organisations with a "
            f"base of the shape {preset} each, got {in_units(free)}; take a larger GPU (FOEDUS_DEVICE names one), set "
            "FOEDUS_ATTENTION=fused and FOEDUS_CHECKPOINTING=on, or take a smaller --preset"
        )
    return described


def write_base(folder: Path, described: Mapping[str, Any], *, seed: int, tokenizer_of: Path) -> Path:
    """Write random weights with the tokenizer of another base; returns the folder."""
    synthesise(folder, described, seed=seed, tokenizer_file=tokenizer_of / TOKENIZER_FILE)
    return folder
