"""The shipped base has learned something, and its manifest says how much."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from foedus_model.build import load_base
from foedus_model.checkpoint import open_checkpoint
from foedus_model.corpus import Corpus, read_corpus
from foedus_model.measure import bits_per_byte
from foedus_model.presets import TINY
from support.order0 import order0_bits_per_byte
from tokenizers import Tokenizer
from torch import nn

PROSE = Path(__file__).parents[1] / "vectors" / "prose.txt"
OTHER_CORPUS = "the corpus of this Python differs from the one that tiny was trained on"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_base(TINY, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return read_corpus()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


def test_it_beats_a_compressor_that_has_seen_the_whole_corpus() -> None:
    provenance = open_checkpoint(TINY).manifest.provenance
    assert 0 < provenance["heldout_bits_per_byte"] < provenance["xz_corpus_bits_per_byte"]
    assert {"python", "corpus_digest", "heldout_digest"} <= provenance.keys()


def test_it_is_a_few_megabytes() -> None:
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 6_000_000


def test_the_manifests_figure_is_measured_again(model: nn.Module, tokenizer: Tokenizer, corpus: Corpus) -> None:
    provenance = open_checkpoint(TINY).manifest.provenance
    if corpus.digest != provenance["corpus_digest"]:
        pytest.skip(OTHER_CORPUS)
    assert corpus.heldout_digest == provenance["heldout_digest"]
    assert len(bytes(corpus)) == provenance["corpus_bytes"]
    bits = bits_per_byte(model, tokenizer, [document.text for document in corpus.heldout])
    assert bits == pytest.approx(provenance["heldout_bits_per_byte"], abs=2e-3), platform.python_version()


def test_it_knows_prose_that_it_has_not_seen(model: nn.Module, tokenizer: Tokenizer) -> None:
    """Margins: a bit and a half below byte frequencies, five bits below chance."""
    prose = PROSE.read_text(encoding="utf-8")
    bits = bits_per_byte(model, tokenizer, [prose])
    assert bits < order0_bits_per_byte(prose) - 1.5
    assert bits < 8 - 5


def test_it_has_read_no_sentence_of_that_prose(corpus: Corpus) -> None:
    read = bytes(corpus).decode()
    sentences = [" ".join(sentence.split()) for sentence in PROSE.read_text(encoding="utf-8").split(".")]
    assert not [sentence for sentence in sentences if len(sentence) > 40 and sentence in " ".join(read.split())]
