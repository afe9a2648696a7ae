"""The shipped tokenizer, and files to read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from foedus_client.datasets.cli import shipped_base
from foedus_client.datasets.harmony import Harmony
from tokenizers import Tokenizer


@pytest.fixture(scope="session")
def tokenizer_path() -> Path:
    return shipped_base() / "tokenizer.json"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_path))


@pytest.fixture(scope="session")
def harmony(tokenizer_path: Path) -> Harmony:
    return Harmony.from_file(tokenizer_path)


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[str, Iterable[Any]], Path]:
    def write(name: str, rows: Iterable[Any]) -> Path:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
