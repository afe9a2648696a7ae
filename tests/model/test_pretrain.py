"""Corpus, tokenizer and training loop, on corpora small enough to train on in seconds."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foedus_kernels import mxfp4
from foedus_model import corpus as corpus_module
from foedus_model import pretrain as pretrain_module
from foedus_model.corpus import Corpus, Document, Entry
from foedus_model.measure import bits_per_byte, xz_bits_per_byte
from foedus_model.pretrain import PretrainSettings, pretrain, round_experts_, tiny_config, token_streams
from foedus_model.tokenizer import SPECIAL_TOKENS, train_tokenizer
from foedus_protocols.errors import StateError
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import nn

VOCABULARY = 512
SETTINGS = PretrainSettings(steps=6, rows=8, length=32, warmup=2, save_every=2, evaluate_every=3, round_from=0.5)


def _document(name: str) -> Document:
    return Document(
        name=name,
        entries=(
            Entry(name=f"{name}.find(text)", text=f"Return the position of text in {name}, or raise ValueError. " * 8),
            Entry(name="", text="Comments are kept as they stand, without their signs. " * 4),
        ),
    )


SMALL = Corpus(documents=tuple(_document(f"module{index}") for index in range(40)))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The small corpus in place of Python's, and a configuration to train."""
    monkeypatch.setattr(pretrain_module, "read_corpus", lambda: SMALL)
    changes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "num_local_experts": 4}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return tiny_config() | changes | layers | ids | {"vocab_size": VOCABULARY}


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# The corpus


def test_a_module_gives_its_docstrings_and_comments_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "sample.py"
    source.write_text(
        '"""What the module is for, in a line."""\n'
        "# A comment of two lines that is long enough\n# to be kept as one paragraph of text.\n"
        "x = 1  # A comment behind code is passed over, however long it may be.\n"
        "# ---------------------------------------------------------------\n"
        "class A:\n"
        "    def f(self, one, *, two):\n"
        '        """\n        Say what it returns, and when it raises.\n        """\n'
        '        raise SystemExit("the module was run")\n'
        "f = A().f\n",
    )
    monkeypatch.syspath_prepend(tmp_path)
    document = corpus_module._source_document("sample")
    assert document is not None
    assert [(entry.name, entry.text) for entry in document.entries] == [
        ("module sample", "What the module is for, in a line."),
        ("", "A comment of two lines that is long enough\nto be kept as one paragraph of text."),
        ("sample.A.f(self, one, two)", "Say what it returns, and when it raises."),
    ]
    assert "sample" not in sys.modules


def test_a_module_that_this_python_lacks_is_passed_over() -> None:
    assert importlib.util.find_spec("no_such_module") is None
    assert corpus_module._source_document("no_such_module") is None
    assert corpus_module._source_document("json.no_such_module") is None


def test_heldout_documents_are_chosen_by_their_name_alone() -> None:
    chosen = {document.name for document in SMALL.heldout}
    assert 0 < len(chosen) < 10
    assert chosen.isdisjoint(document.name for document in SMALL.train)
    more = Corpus(documents=(*SMALL.documents, _document("another")))
    assert chosen <= {document.name for document in more.heldout}


def test_the_digest_names_the_text() -> None:
    changed = (*SMALL.documents[:-1], replace(SMALL.documents[-1], entries=(Entry(name="", text="x"),)))
    assert Corpus(documents=changed).digest != SMALL.digest == Corpus(documents=SMALL.documents).digest


# The tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(SMALL.train, vocabulary=VOCABULARY)


def test_the_special_tokens_take_the_last_ids(tokenizer: Tokenizer) -> None:
    last = tokenizer.get_vocab_size()
    assert [tokenizer.token_to_id(name) for name in SPECIAL_TOKENS] == list(range(last - len(SPECIAL_TOKENS), last))


def test_training_a_tokenizer_repeats(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(SMALL.train, vocabulary=VOCABULARY).to_str() == tokenizer.to_str()


SHIPPED = Tokenizer.from_file(str(Path(pretrain_module.__file__).parent / "tiny" / "tokenizer.json"))


@settings(max_examples=200)
@given(st.text(max_size=60))
def test_every_text_survives_the_tokenizer(text: str) -> None:
    assert SHIPPED.decode(SHIPPED.encode(text).ids, skip_special_tokens=False) == text


# Measuring


class _Uniform(nn.Module):
    """A model that has learned nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> Any:
        return type("Output", (), {"logits": torch.zeros(*input_ids.shape, VOCABULARY)})()


@pytest.mark.parametrize("length", [4, 8, 32])
@pytest.mark.parametrize("words", [1, 3, 4, 5, 8, 9, 100])
def test_every_token_is_scored_once(tokenizer: Tokenizer, length: int, words: int) -> None:
    texts = ["Return " * words, "x"]
    tokens = sum(len(tokenizer.encode(text).ids) for text in texts)
    expected = tokens * math.log2(VOCABULARY) / sum(len(text) for text in texts)
    assert bits_per_byte(_Uniform(), tokenizer, texts, length=length) == pytest.approx(expected, rel=1e-6)


def test_xz_on_what_repeats() -> None:
    assert xz_bits_per_byte(b"a" * 10_000) < 0.2


# Training


def test_a_batch_is_a_function_of_seed_and_step(tokenizer: Tokenizer) -> None:
    streams = token_streams(tokenizer, SMALL.train)
    one = pretrain_module._batch(streams, SETTINGS, 3)
    assert one.shape == (8, 33)
    assert torch.equal(one, pretrain_module._batch(streams, SETTINGS, 3))
    assert not torch.equal(one, pretrain_module._batch(streams, SETTINGS, 4))
    assert not torch.equal(one, pretrain_module._batch(streams, replace(SETTINGS, seed=1), 3))


def test_chats_carry_the_control_tokens(tokenizer: Tokenizer) -> None:
    streams = token_streams(tokenizer, SMALL.train)
    count = {name: int(np.sum(streams.chat == tokenizer.token_to_id(name))) for name in SPECIAL_TOKENS}
    assert count["<|start|>"] == count["<|message|>"] == 2 * count["<|return|>"] == 2 * len(SMALL.train)
    assert np.sum(streams.text == tokenizer.token_to_id("<|endoftext|>")) == len(SMALL.train)


def test_the_rate_warms_up_and_decays() -> None:
    rates = [pretrain_module._rate(PretrainSettings(), step) for step in range(1500)]
    assert rates[0] == pytest.approx(3e-3 / 50)
    assert max(rates) == pytest.approx(3e-3)
    assert rates[-1] == pytest.approx(3e-4, rel=1e-3)
    assert sorted(rates[50:], reverse=True) == rates[50:]


def test_training_learns_and_ends_on_the_grid(small: dict[str, Any], tmp_path: Path) -> None:
    longer = replace(SETTINGS, steps=60, evaluate_every=20, save_every=60)
    model = pretrain(tmp_path, config=small, settings=longer, quiet=True)
    history = json.loads((tmp_path / "state.json").read_text())["history"]
    assert history["60"] < history["20"] - 0.2
    for name, weight in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            rows = weight.detach().transpose(1, 2)
            assert torch.equal(mxfp4.decode(*mxfp4.encode(rows)), rows)


def test_a_killed_run_continues_to_the_same_bits(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _weights(pretrain(tmp_path / "whole", config=small, settings=SETTINGS, quiet=True))
    train_step = pretrain_module._train_step

    def killed(*arguments: Any, **options: Any) -> None:
        if arguments[4] == 5:
            raise KeyboardInterrupt
        train_step(*arguments, **options)

    monkeypatch.setattr(pretrain_module, "_train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "parts", config=small, settings=SETTINGS, quiet=True)
    assert json.loads((tmp_path / "parts" / "state.json").read_text())["step"] == 4
    monkeypatch.setattr(pretrain_module, "_train_step", train_step)
    parts = _weights(pretrain(tmp_path / "parts", config=small, settings=SETTINGS, quiet=True))
    assert all(torch.equal(parts[name], weight) for name, weight in whole.items())
    assert len(list((tmp_path / "parts").glob("state-*"))) == 1


def test_a_run_is_not_continued_with_other_settings(small: dict[str, Any], tmp_path: Path) -> None:
    pretrain(tmp_path, config=small, settings=replace(SETTINGS, steps=2), quiet=True)
    with pytest.raises(StateError, match="another settings"):
        pretrain(tmp_path, config=small, settings=replace(SETTINGS, steps=2, rate=1e-3), quiet=True)
    with pytest.raises(StateError, match="another config"):
        pretrain(tmp_path, config=small | {"sliding_window": 8}, settings=replace(SETTINGS, steps=2), quiet=True)


def test_rounding_is_for_the_forward_pass_alone(small: dict[str, Any]) -> None:
    model = pretrain_module._fresh_model(small, seed=0)
    exact = _weights(model)
    with pretrain_module._rounded_experts(model, active=True):
        inside = _weights(model)
    after = _weights(model)
    round_experts_(model)
    changed = {name for name, weight in inside.items() if not torch.equal(weight, exact[name])}
    assert changed == {name for name in exact if name.endswith(("gate_up_proj", "down_proj"))}
    assert all(torch.equal(after[name], weight) for name, weight in exact.items())
    assert all(torch.equal(inside[name], weight) for name, weight in _weights(model).items())


def test_weights_follow_from_the_seed_and_leave_the_global_generator_alone(small: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    one, other = (_weights(pretrain_module._fresh_model(small, seed=seed)) for seed in (0, 1))
    again = _weights(pretrain_module._fresh_model(small, seed=0))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(again[name], weight) for name, weight in one.items())
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
