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
    MOE_16E_32K,
    RECORD_KERNELS,
    RECORDS,
    Card,
    Launch,
    Work,
    decode,
    experts_forward,
    layer_copy,
    log_sparse_backward,
    log_sparse_both,
    log_sparse_decode,
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
    assert len(said["roofline"]) == len(KERNELS) * 4 + len(RECORD_KERNELS) * len(RECORDS)
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


def test_a_record_counts_its_tiles_and_what_its_newest_token_reads() -> None:
    heads, kv_heads, width = 64, 8, 64
    assert RECORDS == (4096, 16384, 32768)
    for tokens, tiles in zip(RECORDS, (442, 2296, 5111), strict=True):
        both = log_sparse_both(MOE_16E_32K, tokens)
        assert both.flops == (4 + 10) * tiles * 64 * 64 * heads * width
        apart = [work(MOE_16E_32K, tokens) for work in (log_sparse_forward, log_sparse_backward)]
        assert both.bytes == sum(work.bytes for work in apart)
        assert both.seconds(H200) == pytest.approx(sum(work.seconds(H200) for work in apart))
    # Block 511 reads the first, {507, 503, 495, 479, 447, 383, 255} and {509, 510, 511}.
    keys = 11 * 64
    newest = log_sparse_decode(MOE_16E_32K, 32768)
    assert newest.flops == 4 * keys * heads * width
    assert newest.bytes == 2 * (heads * width + keys * kv_heads * width) * 2
    # One token more begins block 512, of which there is one key; {508, 504, 496, 480, 448, 384, 256, 0}, {510, 511}.
    assert log_sparse_decode(MOE_16E_32K, 32769).flops == 4 * (10 * 64 + 1) * heads * width


def test_the_picture_says_what_was_measured(roofline: Any, tmp_path: Path) -> None:
    roofline.draw(tmp_path / "floors.svg", [])
    assert "points: not measured" in (tmp_path / "floors.svg").read_text(encoding="utf-8")
    row = {"kernel": "K1 experts, forward", "model": "gpt-oss-20b", "rows_an_expert": 16, "way": "ours"}
    row["seconds"] = 2e-4
    roofline.draw(tmp_path / "measured.svg", [row, row | {"kernel": "no such"}])
    assert "1 measured points" in (tmp_path / "measured.svg").read_text(encoding="utf-8")
    record = {"kernel": "K5 record, decode", "model": "moe-16e-32k", "rows_an_expert": None, "way": "ours"}
    record |= {"seconds": 2e-6, "tokens": 16384}
    roofline.draw(tmp_path / "records.svg", [row, record, record | {"tokens": 17}])
    assert "2 measured points" in (tmp_path / "records.svg").read_text(encoding="utf-8")
