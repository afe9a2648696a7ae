"""A link over a slow line: what was sent before an outage is not sent again.

The ratio of the link's time to a plain socket's, and a whole federation over slow lines, take minutes:
``make slow-link``.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from foedus_protocols.store import CHUNK_BYTES
from net import lines
from support import netns
from support.wire import Line

SIZE = 6 * CHUNK_BYTES
LINE = Line(rate_bits=20e6, delay_seconds=0.02, loss=0.01, seed=4)


def part_bytes(files: Path) -> int:
    """How much of the one file on its way in has arrived."""
    return sum(path.stat().st_size for path in (files / "parts").glob("*.part"))


def push_through_an_outage(far: lines.FarEnd, seconds: float) -> dict[str, Any]:
    """Push, lose the line after two chunks, and return what the pushing end says when it is through, and when."""
    pushing = subprocess.Popen(far.command("push", far.link, "--bytes", str(SIZE)), stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while part_bytes(far.files) < 2 * CHUNK_BYTES:
            assert time.monotonic() < deadline, "nothing arrived"
            assert pushing.poll() is None, "the push was over before the outage"
            time.sleep(0.01)
        far.outage(seconds)
        mended = time.monotonic()
        said, _ = pushing.communicate(timeout=120)
    finally:
        pushing.kill()
        pushing.wait()
    result: dict[str, Any] = json.loads(said.splitlines()[-1])
    result["seconds_after"] = time.monotonic() - mended
    assert result["receipt"] == result["digest"]
    assert (far.files / result["digest"][:2] / result["digest"]).stat().st_size == SIZE
    return result


def test_a_broken_connection_goes_on_at_its_byte_offset(tmp_path: Path) -> None:
    with lines.proxied(tmp_path / "ends", LINE) as far:
        pushed = push_through_an_outage(far, 0.5)
    offsets = pushed["offsets"]
    assert (offsets[0], pushed["dialled"]) == (0, 1)
    assert offsets[-1] >= 2 * CHUNK_BYTES


@pytest.mark.skipif(netns.why_not() is not None, reason="needs root, the ip command and TUN devices")
def test_packets_that_are_lost_for_a_while_lose_nothing(tmp_path: Path) -> None:
    with lines.packets(tmp_path / "ends", LINE) as far:
        push_through_an_outage(far, 1.0)


@pytest.mark.slow
@pytest.mark.skipif(netns.why_not() is not None, reason="needs root, the ip command and TUN devices")
def test_a_line_that_is_away_for_minutes_in_the_middle_of_a_vector_costs_nothing_but_time(tmp_path: Path) -> None:
    """Longer than a link's patience: it gives up, is dialled again as by the daemon, and goes on at the byte offset."""
    with lines.packets(tmp_path / "ends", LINE) as far:
        pushed = push_through_an_outage(far, 180.0)
    assert pushed["dialled"] >= 2
    assert pushed["offsets"][0] == 0
    assert pushed["offsets"][-1] >= 2 * CHUNK_BYTES
    print(f"at {pushed['offsets']}, dialled {pushed['dialled']} times, through {pushed['seconds_after']:.1f} s after")
    assert pushed["seconds_after"] < 60
