"""A base with the adapter of a run on it, ready to train where and how the environment says.

Every switch that training has is obeyed here (`switches.py`, `foedus_model.switches`), for an organisation's worker and
for the demo's comparison alike.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from foedus_model.adapter import AttachedAdapter, attach
from foedus_model.attention import fuse_attention
from foedus_model.build import load_base
from foedus_model.experts import choose_path
from foedus_model.recompute import recompute_layers
from foedus_model.streaming import Streamer, stream_experts
from foedus_model.switches import compute_type, default_device, experts_path, fused_attention, prepare_process, threads
from foedus_protocols.errors import CheckpointError
from foedus_protocols.layout import adapter_layout
from foedus_protocols.manifest import read_config

from foedus_client.switches import checkpointing, units_a_forward, units_streamed
from foedus_client.work import Setup

_LOG = logging.getLogger("foedus.client")


@dataclass(frozen=True, kw_only=True)
class Switches:
    """What the environment says of training; by the names of its readers."""

    device: torch.device
    dtype: torch.dtype
    threads: int | None
    fused: bool
    experts: str | None
    checkpointing: str
    units_a_forward: int
    units_streamed: int | None

    @classmethod
    def read(cls) -> Switches:
        """All of them, so that one that cannot be is found before anything is loaded or started.

        Raises:
            ConfigError: A value that cannot be, or two that exclude each other.
        """
        device = default_device()
        return cls(
            device=device,
            dtype=compute_type(device),
            threads=threads(),
            fused=fused_attention(),
            experts=experts_path(),
            checkpointing=checkpointing(),
            units_a_forward=units_a_forward(),
            units_streamed=units_streamed(),
        )


def load_adapted(setup: Setup) -> tuple[AttachedAdapter, Streamer | None]:
    """Load a base with an adapter, and what streams its layers where the environment asks for that.

    Raises:
        CheckpointError: Another base than the charter's, or another adapter layout.
        ConfigError: A setting of the environment that cannot be.
    """
    switches = Switches.read()
    prepare_process()
    base, device = Path(setup.base), switches.device
    layout = adapter_layout(
        read_config(base), targets=setup.targets, rank=setup.rank, layers=setup.layers, train=setup.train
    )
    if layout.digest != setup.layout_digest:
        raise CheckpointError(
            f"expected the adapter layout {setup.layout_digest[:12]}, this base gives {layout.digest[:12]}"
        )
    stream = switches.units_streamed is not None
    model = load_base(base, expect_digest=setup.base_digest, device=device, dtype=switches.dtype, stream=stream)
    adapter = attach(model, layout, seed=setup.adapter_seed, alpha=setup.alpha, rank=setup.rank)
    rows = setup.max_tokens * max(setup.max_records_per_unit, switches.units_a_forward)
    choose_path(model, rows=rows, device=device, wanted=switches.experts)
    if switches.fused:
        fuse_attention(model)
    streaming = None
    if switches.units_streamed is not None:
        streaming = stream_experts(model, adapter.trained, units=switches.units_streamed)
        streaming.require_host(setup.max_tokens * setup.max_records_per_unit)
        _LOG.info("%s", str(streaming))  # Not the object: a handler that keeps records would keep the model.
    if switches.checkpointing != "off":
        recompute_layers(model, offload=switches.checkpointing == "offload")
    return adapter, streaming
