"""The bench's results as Markdown tables, for ``docs/benchmarks.md``."""

from __future__ import annotations

from typing import Any


def tables(result: dict[str, Any]) -> str:
    """Every part that was measured."""
    parts = [_machine(result)]
    parts += [part(result[name]) for name, part in _PARTS.items() if result.get(name)]
    return "\n\n".join(parts)


def _machine(result: dict[str, Any]) -> str:
    load = " / ".join(f"{value:.1f}" for value in result["load_before"])
    return (
        f"{result['cores']} cores; load average before the bench {load}; {result['repeats']} repeat(s), medians. "
        "Seconds on a shared machine only say what to expect; the ratios are taken in one run, side by side."
    )


def _overhead(rows: list[dict[str, Any]]) -> str:
    """Rounds beside SuperLink's."""
    lines = [
        "| fp32 adapter | organisations | Foedus round | of it coding | without coding | SuperLink round "
        "| ratio without coding | ratio with coding | round without fsync | cost of durability |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        flower, loose = row.get("flower_seconds"), row.get("no_fsync_seconds")
        lines.append(
            f"| {4 * row['parameters'] / 1e6:g} MB | {row['members']} | {row['seconds']:.2f} s "
            f"| {row['coding_seconds']:.2f} s | {row['overhead_seconds']:.2f} s "
            + (
                f"| {flower:.2f} s | {row['overhead_seconds'] / flower:.3f} | {row['seconds'] / flower:.3f} "
                if flower
                else "| - | - | - "
            )
            + (f"| {loose:.2f} s | {row['seconds'] - loose:.2f} s |" if loose else "| - | - |")
        )
    return "\n".join(lines)


def _memory(rows: list[dict[str, Any]]) -> str:
    """Peak over idle."""
    lines = [
        "| fp32 adapter | organisations | coordinator over idle | daemon over idle (largest) | limit |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {4 * row['parameters'] / 1e6:g} MB | {row['members']} | {row['coordinator_mib']:.0f} MiB "
        f"| {row['daemon_mib']:.0f} MiB | {row['limit_mib']:.0f} MiB |"
        for row in rows
    ]
    return "\n".join(lines)


def _bytes(row: dict[str, Any]) -> str:
    """The wire."""
    kinds = ("wire_up", "wire_down", "vectors", "sums", "metadata")
    lines = [
        f"| {row['members']} organisations, {row['rounds']} rounds of {row['vector_bytes'] / 1e6:.1f} MB | bytes |",
        "| --- | --- |",
        *(f"| {kind.replace('_', ', ')} | {row[kind]:,} |" for kind in kinds),
        f"| metadata's share | {row['metadata_share']:.2%} |",
    ]
    return "\n".join(lines)


def _resume(row: dict[str, Any]) -> str:
    """After a kill."""
    lines = ["| killed, and started again at once | connected again | its round closed |", "| --- | --- | --- |"]
    for name in ("coordinator", "daemon"):
        found = row[name]
        lines.append(f"| {name} | {found['reconnected_seconds']:.1f} s | {found['round_closed_seconds']:.1f} s |")
    return "\n".join(lines)


_PARTS: dict[str, Any] = {"overhead": _overhead, "memory": _memory, "bytes": _bytes, "resume": _resume}
