#!/usr/bin/env python3
"""Build the real-text files of the benchmarks from checkouts of three public repositories. Standard library only.

    git clone https://github.com/abachaa/MedQuAD                    # CC BY 4.0
    git clone https://github.com/pubmedqa/pubmedqa                  # MIT
    git clone https://github.com/Law-AI/semantic-segmentation       # MIT
    python scripts/build_real_data.py --medquad MedQuAD --pubmedqa pubmedqa --judgments semantic-segmentation --out data

writes ``data/medical/*.jsonl.gz`` and ``data/legal/*.jsonl.gz``: one file an organisation, one record a line. Blanks
are folded and nothing else is changed. The bytes depend on the checkouts alone. Of PubMedQA the training half is taken,
of the judgments the four areas of law with at least eight cases.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MEDQUAD = {
    "cancergov": "1_CancerGov_QA",
    "gard": "2_GARD_QA",
    "ghr": "3_GHR_QA",
    "medlineplus": "4_MPlus_Health_Topics_QA",
    "niddk": "5_NIDDK_QA",
    "ninds": "6_NINDS_QA",
    "seniorhealth": "7_SeniorHealth_QA",
}
JUDGMENTS = {
    "constitutional": "Constitutional",
    "criminal": "Criminal",
    "labour_industrial": "Labour & Industrial Law",
    "land_property": "Land & Property",
}
JUDGMENT_FOLDERS = ("data/text", "data/IndianSupremeCourt50/text")

Record = dict[str, Any]


def medquad(folder: Path) -> Iterator[Record]:
    """Question and answer pairs of one MedQuAD collection, those without an answer left out, by identifier."""
    records = []
    for path in folder.glob("*.xml"):
        root = ElementTree.parse(path).getroot()
        topic = fold(root.findtext("Focus") or "")
        for pair in root.iter("QAPair"):
            question, answer = pair.find("Question"), fold(pair.findtext("Answer") or "")
            if question is None or not answer:
                continue
            records.append(
                {
                    "id": question.get("qid"),
                    "topic": topic,
                    "question_type": question.get("qtype"),
                    "question": fold(question.text or ""),
                    "answer": answer,
                }
            )
    yield from sorted(records, key=lambda record: str(record["id"]))


def pubmedqa(checkout: Path) -> Iterator[Record]:
    """The labelled articles that are not in PubMedQA's test half, by identifier."""
    articles = json.loads((checkout / "data/ori_pqal.json").read_text(encoding="utf-8"))
    test = json.loads((checkout / "data/test_ground_truth.json").read_text(encoding="utf-8"))
    for identifier in sorted(articles.keys() - test.keys()):
        article = articles[identifier]
        yield {
            "id": identifier,
            "question": fold(article["QUESTION"]),
            "context": fold(" ".join(article["CONTEXTS"])),
            "long_answer": fold(article["LONG_ANSWER"]),
            "label": article["final_decision"],
            "year": article.get("YEAR"),
        }


def judgments(checkout: Path, area: str) -> Iterator[Record]:
    """Sentences of one area of law with their rhetorical roles, case by case."""
    for case in sorted(_cases(checkout)[area]):
        path = next(
            (path for folder in JUDGMENT_FOLDERS if (path := checkout / folder / f"{case}.txt").is_file()), None
        )
        if path is None:
            raise FileNotFoundError(f"expected {case}.txt in {' or '.join(JUDGMENT_FOLDERS)} of {checkout}, found none")
        lines = (line.rpartition("\t") for line in path.read_text(encoding="utf-8").split("\n"))
        sentences = [(fold(text), fold(role)) for text, _, role in lines if fold(text)]
        for number, (text, role) in enumerate(sentences):
            yield {"id": f"{case}-{number}", "case": case, "role": role, "text": text}


def _cases(checkout: Path) -> dict[str, list[str]]:
    """The cases of each area: lines ``Area-->case,case``."""
    lines = (checkout / "categories.txt").read_text(encoding="utf-8").splitlines()
    areas = (line.split("-->") for line in lines if "-->" in line)
    return {area.strip(): [case.strip() for case in cases.split(",")] for area, cases in areas}


def fold(text: str) -> str:
    """Runs of white space as one blank."""
    return " ".join(text.split())


def write(path: Path, records: Iterable[Record]) -> int:
    """Write records as gzipped JSON lines whose bytes hold no time and no name."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file:
        file.write("".join(lines).encode())
    return len(lines)


def main(arguments: list[str] | None = None) -> int:
    """Build every file whose checkout is given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--medquad", type=Path, help="checkout of abachaa/MedQuAD")
    parser.add_argument("--pubmedqa", type=Path, help="checkout of pubmedqa/pubmedqa")
    parser.add_argument("--judgments", type=Path, help="checkout of Law-AI/semantic-segmentation")
    parser.add_argument("--out", type=Path, required=True, help="folder to write medical/ and legal/ to")
    options = parser.parse_args(arguments)
    files: dict[str, Iterable[Record]] = {}
    if options.medquad:
        files |= {f"medical/{name}": medquad(options.medquad / folder) for name, folder in MEDQUAD.items()}
    if options.pubmedqa:
        files["medical/pubmedqa_train"] = pubmedqa(options.pubmedqa)
    if options.judgments:
        files |= {f"legal/{name}": judgments(options.judgments, area) for name, area in JUDGMENTS.items()}
    if not files:
        parser.error("name at least one checkout: --medquad, --pubmedqa or --judgments")
    for name, records in files.items():
        path = options.out / f"{name}.jsonl.gz"
        sys.stdout.write(f"{path}: {write(path, records):,} records\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
