"""The real-text files, built from small checkouts made by hand."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "build_real_data.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("build_real_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().split("\n")[:-1]]


def _pair(identifier: str, answer: str) -> str:
    return (
        f'<QAPair><Question qid="{identifier}" qtype="causes">What  causes\n colds ?</Question>'
        f"<Answer>{answer}</Answer></QAPair>"
    )


def test_medquad(script: Any, tmp_path: Path) -> None:
    for folder in script.MEDQUAD.values():
        (tmp_path / folder).mkdir()
    pairs = _pair("1-2", " A &amp; B\n\t - C ") + _pair("1-10", "Cold") + _pair("1-3", " ")
    (tmp_path / "2_GARD_QA" / "1.xml").write_text(
        f"<Document><Focus>Colds </Focus><QAPairs>{pairs}</QAPairs></Document>"
    )
    assert script.main(["--medquad", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    shared = {"topic": "Colds", "question_type": "causes", "question": "What causes colds ?"}
    assert _read(tmp_path / "out/medical/gard.jsonl.gz") == [
        {"id": "1-10", **shared, "answer": "Cold"},
        {"id": "1-2", **shared, "answer": "A & B - C"},
    ]
    assert _read(tmp_path / "out/medical/ninds.jsonl.gz") == []


def test_pubmedqa_leaves_the_test_half_out(script: Any, tmp_path: Path) -> None:
    article = {"QUESTION": "Q ?", "CONTEXTS": ["one\n", "two"], "LONG_ANSWER": "Long.", "final_decision": "yes"}
    (tmp_path / "data").mkdir()
    articles = {"9": article | {"YEAR": "1999"}, "10": article, "11": article}
    (tmp_path / "data/ori_pqal.json").write_text(json.dumps(articles))
    (tmp_path / "data/test_ground_truth.json").write_text(json.dumps({"11": "yes"}))
    assert script.main(["--pubmedqa", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    shared = {"question": "Q ?", "context": "one two", "long_answer": "Long.", "label": "yes"}
    assert _read(tmp_path / "out/medical/pubmedqa_train.jsonl.gz") == [
        {"id": "10", **shared, "year": None},
        {"id": "9", **shared, "year": "1999"},
    ]


def _judgments(folder: Path, script: Any) -> None:
    one, two = (folder / name for name in script.JUDGMENT_FOLDERS)
    one.mkdir(parents=True)
    two.mkdir(parents=True)
    areas = "\n".join(f"{area}-->{number}_B, {number}_A" for number, area in enumerate(script.JUDGMENTS.values()))
    (folder / "categories.txt").write_text(areas + "\nIntellectual Property-->9_Z\n")
    for number in range(len(script.JUDGMENTS)):
        (one / f"{number}_A.txt").write_text("It is  so\tFacts\n\nHence \u20b9 5\tRatio of the decision\n")
        (two / f"{number}_B.txt").write_text("No\tPrecedent\n")


def test_judgments_come_case_by_case(script: Any, tmp_path: Path) -> None:
    _judgments(tmp_path, script)
    assert script.main(["--judgments", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert _read(tmp_path / "out/legal/criminal.jsonl.gz") == [
        {"id": "1_A-0", "case": "1_A", "role": "Facts", "text": "It is so"},
        {"id": "1_A-1", "case": "1_A", "role": "Ratio of the decision", "text": "Hence \u20b9 5"},
        {"id": "1_B-0", "case": "1_B", "role": "Precedent", "text": "No"},
    ]
    (tmp_path / "data/text/1_A.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected 1_A\.txt"):
        script.main(["--judgments", str(tmp_path), "--out", str(tmp_path / "out")])


def test_the_same_checkout_gives_the_same_bytes(script: Any, tmp_path: Path) -> None:
    _judgments(tmp_path, script)
    for out in ("one", "two"):
        script.main(["--judgments", str(tmp_path), "--out", str(tmp_path / out)])
    one, two = (tmp_path / out / "legal/criminal.jsonl.gz" for out in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes()[:10] == bytes([31, 139, 8, 0, 0, 0, 0, 0, 2, 255])


def test_no_checkout_is_an_error(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--out", str(tmp_path)])
    assert "name at least one checkout" in capsys.readouterr().err
