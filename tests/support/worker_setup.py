"""What a worker is told of its base and data, for a few invented units."""

from __future__ import annotations

from pathlib import Path

from foedus_client.work import Setup
from foedus_protocols.layout import adapter_layout, initial_vector
from foedus_protocols.manifest import read_config, read_manifest

RANK = 2


def setup_of(base: Path, data: Path, *, max_tokens: int, max_records_per_unit: int) -> Setup:
    """Units by topic; the split key holds some of sixteen out."""
    return Setup(
        base=str(base),
        base_digest=read_manifest(base).digest,
        rank=RANK,
        alpha=4.0,
        adapter_seed="public",
        layout_digest=adapter_layout(read_config(base), targets="attention", rank=RANK).digest,
        files=[str(data)],
        units="topic",
        columns={},
        split_key="11" * 32,
        max_tokens=max_tokens,
        max_records_per_unit=max_records_per_unit,
    )


def write_adapter(base: Path, path: Path) -> None:
    """The adapter that a run starts from, as a file of float32."""
    layout = adapter_layout(read_config(base), targets="attention", rank=RANK)
    initial_vector(layout, "public").tofile(path)
