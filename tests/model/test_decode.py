"""Decoding: batches, caches and padding, where an answer ends, and what a request's draws depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from foedus_model import decode, generate
from foedus_model.chat import FINAL, Prompt, plain_prompt
from foedus_model.decode import Completion, Request, complete, stream
from foedus_model.generate import Generator
from foedus_model.quantize import quantise
from foedus_model.sampling import Sampling
from foedus_protocols.errors import UsageError

from .conftest import BYTES, random_state, small_config

TYPES = {
    "full": ["full_attention", "full_attention"],
    "sliding": ["sliding_attention", "sliding_attention"],
    "log-sparse": ["log_sparse_attention", "log_sparse_attention"],
    "all": ["sliding_attention", "log_sparse_attention", "full_attention"],
}
TEXTS = ["a", "a prompt far beyond the window of eight tokens", "seven..", "of middling length"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Generator]:
    """A small model by the kind of its layers, in float64: a router's choice cannot hang on the order of a sum."""
    from foedus_model.checkpoint import write_checkpoint

    from .conftest import byte_tokenizer

    made: dict[str, Generator] = {}

    def load(kind: str) -> Generator:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            layers = {"layer_types": TYPES[kind], "num_hidden_layers": len(TYPES[kind])}
            pattern = {"log_sparse_pattern": {"block": 4, "window": 1, "first": 1}} if "log" in str(TYPES[kind]) else {}
            full = {**layers, "layer_types": ["full_attention"] * len(TYPES[kind])}
            write_checkpoint(
                folder / "base",
                config=small_config(**layers, **pattern),
                tensors=quantise(random_state(small_config(**full)), small_config(**full)),
                tokenizer_file=byte_tokenizer(folder / "tokenizer.json"),
                provenance={},
            )
            made[kind] = generate.load_generator(folder / "base")
            made[kind].model.double()
        return made[kind]

    return load


def _requests(generator: Generator, sampling: Sampling, texts: list[str] = TEXTS) -> list[Request]:
    return [Request(prompt=plain_prompt(generator.tokenizer, text), sampling=sampling) for text in texts]


def _ids(done: list[Completion]) -> list[tuple[int, ...]]:
    return [one.ids for one in done]


@pytest.mark.parametrize(("kind", "temperature"), [*((kind, 0.0) for kind in TYPES), ("all", 1.0)])
def test_tokens_do_not_depend_on_cache_batch_or_neighbours(
    loaded: Callable[[str], Generator], kind: str, temperature: float
) -> None:
    generator = loaded(kind)
    requests = _requests(generator, Sampling(max_new_tokens=10, temperature=temperature, seed=3))
    alone = [complete(generator.model, generator.tokenizer, [one])[0].ids for one in requests]
    assert len(set(alone)) == len(alone)
    assert max(map(len, alone)) == 10
    assert _ids(complete(generator.model, generator.tokenizer, requests)) == alone
    assert _ids(complete(generator.model, generator.tokenizer, requests, batch=3)) == alone
    assert _ids(complete(generator.model, generator.tokenizer, requests, use_cache=False)) == alone


def test_greedy_tokens_are_those_of_the_library(loaded: Callable[[str], Generator]) -> None:
    generator = loaded("full")
    request = _requests(generator, Sampling(max_new_tokens=16))[1]
    prompt = torch.tensor([request.prompt.ids])
    theirs = generator.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False,
        eos_token_id=sorted(request.prompt.end_ids),
    )[0, prompt.shape[1] :].tolist()  # fmt: skip
    ours = complete(generator.model, generator.tokenizer, [request])[0]
    assert list(ours.ids) == theirs[: len(ours.ids)]
    assert len(ours.ids) in (16, len(theirs) - 1)


def test_requests_of_unlike_limits_leave_the_batch_as_they_end(loaded: Callable[[str], Generator]) -> None:
    generator = loaded("all")
    requests = [
        Request(prompt=plain_prompt(generator.tokenizer, text), sampling=Sampling(max_new_tokens=limit))
        for text, limit in zip(TEXTS, (3, 12, 1, 7), strict=True)
    ]
    done = complete(generator.model, generator.tokenizer, requests)
    assert done == [complete(generator.model, generator.tokenizer, [one])[0] for one in requests]
    assert all(len(one.ids) <= r.sampling.max_new_tokens for one, r in zip(done, requests, strict=True))


def test_the_cache_feeds_one_token_a_step(loaded: Callable[[str], Generator]) -> None:
    generator = loaded("all")
    seen: list[int] = []

    def note(module: object, arguments: object, keywords: dict[str, torch.Tensor]) -> None:
        seen.append(keywords["input_ids"].shape[1])

    hook = generator.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        requests = _requests(generator, Sampling(max_new_tokens=5), TEXTS[1:2])
        complete(generator.model, generator.tokenizer, requests)
        assert seen == [len(TEXTS[1]), 1, 1, 1, 1]
    finally:
        hook.remove()


def test_a_context_that_is_exactly_full_is_served_and_no_more(
    loaded: Callable[[str], Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = loaded("sliding")
    monkeypatch.setattr(generator.model.config, "max_position_embeddings", 20)
    prompt = Prompt(ids=(1,) * 17, end_ids=frozenset(), channel=FINAL)
    for limit in (3, 4):
        request = Request(prompt=prompt, sampling=Sampling(max_new_tokens=limit))
        if limit == 3:
            assert len(complete(generator.model, generator.tokenizer, [request])[0].ids) == limit
        else:
            with pytest.raises(UsageError, match="at most 20 tokens together, got 17 of prompt and 4"):
                complete(generator.model, generator.tokenizer, [request])


# --- Where an answer ends: a model that says what it is told -------------------------------------------------------


class _Scripted:
    """Stands for a batch: each row is told its tokens one after another."""

    script: list[int] = []  # noqa: RUF012 - each test sets it

    def __init__(self, model: object, prompts: list[list[int]], *, use_cache: bool) -> None:
        self._step = 0
        self._rows = len(prompts)

    def logits(self) -> torch.Tensor:
        logits = torch.zeros(self._rows, len(BYTES) + 6)
        logits[:, self.script[self._step]] = 1.0
        self._step += 1
        return logits

    def append(self, tokens: list[int], rows: list[int]) -> None:
        self._rows = len(rows)


@contextmanager
def _says(generator: Generator, *parts: str | int) -> Iterator[None]:
    """Let the model continue with this text; control tokens by number."""
    script: list[int] = []
    for part in parts:
        script += [part] if isinstance(part, int) else generator.tokenizer.encode(part, add_special_tokens=False).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_Batch", _Scripted)
        patch.setattr(_Scripted, "script", script)
        yield


def _control(generator: Generator, name: str) -> int:
    number = generator.tokenizer.token_to_id(name)
    assert number is not None
    return int(number)


def _answer(generator: Generator, prompt: Prompt | None = None, **options: object) -> Completion:
    sampling = Sampling(**{"max_new_tokens": 64} | options)  # type: ignore[arg-type]
    prompt = prompt or plain_prompt(generator.tokenizer, "hi")
    return complete(generator.model, generator.tokenizer, [Request(prompt=prompt, sampling=sampling)])[0]


@pytest.mark.parametrize("name", ["<|return|>", "<|end|>", "<|endoftext|>"])
def test_an_end_token_ends_and_is_no_part_of_the_answer(loaded: Callable[[str], Generator], name: str) -> None:
    generator = loaded("full")
    with _says(generator, "done", _control(generator, name), "more"):
        done = _answer(generator)
    assert (done.text, done.finish, len(done.ids)) == ("done", "end", 4)


def test_a_stop_text_ends_the_answer_before_it(loaded: Callable[[str], Generator]) -> None:
    generator = loaded("full")
    with _says(generator, "one two three four"):
        done = _answer(generator, stop=(" three", "x"))
    assert (done.text, done.finish) == ("one two", "stop")
    with _says(generator, "one two thr"):
        done = _answer(generator, stop=(" three",), max_new_tokens=11)
    assert (done.text, done.finish) == ("one two thr", "length")  # What was held back is given at the end.


def test_streamed_pieces_are_whole_characters_and_join_to_the_text(loaded: Callable[[str], Generator]) -> None:
    generator = loaded("full")
    text = "naïve — 数 \N{GRINNING FACE} end"
    request = Request(
        prompt=plain_prompt(generator.tokenizer, "hi"), sampling=Sampling(max_new_tokens=len(text.encode()))
    )
    with _says(generator, text):
        pieces = list(stream(generator.model, generator.tokenizer, [request]))
    assert "".join(piece.text for piece in pieces) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece.text for piece in pieces)
    assert [piece.token for piece in pieces] == generator.tokenizer.encode(text).ids
    assert len([piece for piece in pieces if piece.text]) == len(text)
    assert [piece.finish for piece in pieces if piece.finish] == ["length"]


def test_a_character_that_is_cut_off_is_shown_as_such(loaded: Callable[[str], Generator]) -> None:
    generator = loaded("full")
    with _says(generator, "a\N{GRINNING FACE}"):
        assert _answer(generator, max_new_tokens=3).text == "a\N{REPLACEMENT CHARACTER}"


def test_reasoning_and_answer_are_told_apart(loaded: Callable[[str], Generator]) -> None:
    generator = loaded("full")
    channel, message, end, start, ret = (
        _control(generator, name) for name in ("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|return|>")
    )
    prompt = Prompt(ids=(1, 2), end_ids=frozenset({ret}), channel=None)
    said = (channel, "analysis", message, "Hm.", end, start, "assistant", channel, "final", message, "Yes.", ret)
    with _says(generator, *said):
        done = _answer(generator, prompt)
    assert (done.thinking, done.text, done.finish) == ("Hm.", "Yes.", "end")
    with _says(generator, *said[:-1], end, start, "user", message, "And then?", end):
        done = _answer(generator, prompt)
    assert (done.text, done.finish) == ("Yes.", "end")  # The next turn is not the model's to say.
    with _says(generator, "One", end, "two", ret):
        done = _answer(generator, Prompt(ids=(1, 2), end_ids=frozenset({ret}), channel=FINAL))
    assert end in done.ids[:-1]  # Where the prompt opened the message, the prompt says what ends it.
    with _says(generator, "no header at all", ret):
        assert _answer(generator, prompt).text == "no header at all"


def test_a_batch_of_none_is_refused(loaded: Callable[[str], Generator]) -> None:
    generator = loaded("full")
    with pytest.raises(UsageError, match="at least 1 request"):
        complete(generator.model, generator.tokenizer, _requests(generator, Sampling()), batch=0)
    empty = Request(prompt=Prompt(ids=(), end_ids=frozenset(), channel=FINAL))
    with pytest.raises(UsageError, match="got no tokens"):
        complete(generator.model, generator.tokenizer, [empty])
