"""The roofline: the tables of docs/model.md are what the code says, and the figures are right where known."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from foedus_kernels.roofline import (
    GPT_OSS_20B,
    GPT_OSS_120B,
    H100,
    H200,
    KERNELS,
    Card,
    Launch,
    Work,
    decode,
    experts_forward,
    layer_copy,
    log_sparse_forward,
    sink_attention,
)

BENCH = Path(__file__).parent
REPOSITORY = BENCH.parents[1]


@pytest.fixture
def roofline(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    import roofline

    return roofline


def test_the_page_has_the_tables_that_the_code_prints(roofline: Any) -> None:
    page = (REPOSITORY / "docs" / "model.md").read_text(encoding="utf-8")
    (written,) = re.findall(r"<!-- roofline -->\n\n(.*?)\n<!-- end -->", page, re.DOTALL)
    assert written == roofline.tables(), "run tests/bench/roofline.py and copy its tables"


def test_the_command_prints_the_tables_and_one_json_object(roofline: Any) -> None:
    def run(*options: str) -> str:
        command = [sys.executable, str(BENCH / "roofline.py"), *options]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout

    assert run() == roofline.tables()
    said = json.loads(run("--format", "json"))
    assert len(said["roofline"]) == len(KERNELS) * 4
    assert {card["name"] for card in said["cards"]} == {"H100", "H200"}


def test_bytes_are_those_of_the_release() -> None:
    # 13.22 MB an expert, 1.69 GB a layer, 61 GB of experts in all: computed from the released files.
    assert layer_copy(GPT_OSS_120B).link_bytes == pytest.approx(1.692e9, rel=2e-3)
    assert decode(GPT_OSS_120B).bytes == pytest.approx(1.692e9 + 6.37e9, rel=1e-3)
    assert layer_copy(GPT_OSS_20B).link_bytes * GPT_OSS_20B.layers == pytest.approx(10.16e9, rel=2e-3)


def test_few_rows_wait_for_bytes_and_many_for_products() -> None:
    for shape in (GPT_OSS_120B, GPT_OSS_20B):
        few, many = (experts_forward(shape, shape.tokens(rows)) for rows in (16, 256))
        assert (few.bound(H200), many.bound(H200)) == ("bytes", "FLOPs")
        # 6 M K N FLOPs, and the combination's two a value.
        rows = 256 * shape.experts
        assert many.flops == 6 * rows * 2880 * 2880 + 2 * rows * 2880
    assert H100.bandwidth < H200.bandwidth


def test_a_floor_is_the_sum_of_launches() -> None:
    card = Card(name="toy", flops=10.0, bandwidth=2.0, link=1.0, source="")
    work = Work(launches=(Launch(name="a", bytes=4, flops=10), Launch(name="b", bytes=2, flops=70)))
    assert work.seconds(card) == 2 + 7
    assert work.bound(card) == "FLOPs"
    assert Work(launches=(Launch(name="c", bytes=2, flops=0, link_bytes=5),)).bound(card) == "link"


def test_attention_counts_the_pairs_that_there_are() -> None:
    tokens, heads, width = 300, 64, 64
    seen = [min(place + 1, 128) for place in range(tokens)]
    work = sink_attention(GPT_OSS_20B, tokens, 128)
    assert work.launches[0].flops == 4 * sum(seen) * heads * width
    # 442 tiles of 64 x 64 at 4K: `docs/benchmarks.md` has them counted.
    assert log_sparse_forward(GPT_OSS_20B, 4096).flops == 4 * 442 * 64 * 64 * heads * width


def test_the_picture_says_what_was_measured(roofline: Any, tmp_path: Path) -> None:
    roofline.draw(tmp_path / "floors.svg", [])
    assert "points: not measured" in (tmp_path / "floors.svg").read_text(encoding="utf-8")
    row = {"kernel": "K1 experts, forward", "model": "gpt-oss-20b", "rows_an_expert": 16, "way": "ours"}
    row["seconds"] = 2e-4
    roofline.draw(tmp_path / "measured.svg", [row, row | {"kernel": "no such"}])
    assert "1 measured points" in (tmp_path / "measured.svg").read_text(encoding="utf-8")
