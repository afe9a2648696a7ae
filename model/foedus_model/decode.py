"""The decoding loop: requests of any length together, with a key-value cache, piece by piece.

transformers' own loop draws from one global generator, streams one request only and knows no stop texts; the model and
its cache are transformers'. Requests of unequal length are padded on the **left** and padding is never seen: the mask
hides it in full and sliding layers, log-sparse layers count their blocks from each request's own first token, and so
do positions. A request that has ended leaves the batch.

A request's tokens are those it gets alone, up to the order of floating-point sums; a draw depends on its own seed only.

Left out: beams, speculative decoding, and prefill in chunks (the eager attention of a long prompt is quadratic in
memory).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from foedus_protocols.errors import UsageError
from tokenizers import Tokenizer
from transformers import DynamicCache, GptOssForCausalLM

from foedus_model.chat import FINAL, Channels, Prompt
from foedus_model.loss import device_of
from foedus_model.sampling import Sampling, choose, new_generator
from foedus_model.text_stream import TextStream

Finish = Literal["end", "stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to continue it."""

    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one step gives of one request.

    Attributes:
        request: Its number in the call.
        token: The new token; None where the request ended by one that is no part of the answer.
        text: Text that is certain now; often empty.
        channel: The channel that the text belongs to.
        finish: Why the request has ended, with its last piece: an end token, a stop text, or the limit.
    """

    request: int
    token: int | None
    text: str
    channel: str
    finish: Finish | None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A finished request.

    Attributes:
        ids: The new tokens, without the one that ended the text.
        text: The answer: the channel ``final``.
        thinking: The other channels.
        finish: Why it ended.
    """

    ids: tuple[int, ...]
    text: str
    thinking: str
    finish: Finish


def complete(
    model: GptOssForCausalLM,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    *,
    batch: int = 8,
    use_cache: bool = True,
    on_finish: Callable[[], None] = lambda: None,
) -> list[Completion]:
    """Continue several prompts; `stream` says how. `on_finish` is called whenever one is done."""
    tokens: list[list[int]] = [[] for _ in requests]
    texts: list[dict[bool, list[str]]] = [{True: [], False: []} for _ in requests]
    finishes: list[Finish] = ["length" for _ in requests]
    for piece in stream(model, tokenizer, requests, batch=batch, use_cache=use_cache):
        if piece.token is not None:
            tokens[piece.request].append(piece.token)
        texts[piece.request][piece.channel == FINAL].append(piece.text)
        if piece.finish is not None:
            finishes[piece.request] = piece.finish
            on_finish()
    return [
        Completion(ids=tuple(ids), text="".join(text[True]), thinking="".join(text[False]), finish=finish)
        for ids, text, finish in zip(tokens, texts, finishes, strict=True)
    ]


def stream(
    model: GptOssForCausalLM,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    *,
    batch: int = 8,
    use_cache: bool = True,
) -> Iterator[Piece]:
    """Continue several prompts, piece by piece.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        requests: What to continue.
        batch: At most this many requests at a time.
        use_cache: Keep keys and values; without, every step reads everything again (slow: for tests).

    Yields:
        A piece for each new token of each request, and one with `finish` at its end. Requests of a batch alternate;
        a request's pieces joined are its whole text.

    Raises:
        UsageError: Prompt and new tokens together are longer than the model's context, or nothing to continue.
    """
    if batch < 1:
        raise UsageError(f"expected a batch of at least 1 request, got {batch}")
    _check_lengths(model, requests)
    for numbers in _groups(requests, batch):
        rows = [_Row(number, requests[number], tokenizer) for number in numbers]
        running = _Batch(model, [row.request.prompt.ids for row in rows], use_cache=use_cache)
        while rows:
            logits = running.logits()  # (rows, vocabulary)
            chosen = [choose(line, row.request.sampling, row.source) for line, row in zip(logits, rows, strict=True)]
            for row, token in zip(rows, chosen, strict=True):
                yield from row.take(token)
            going = [place for place, row in enumerate(rows) if row.finish is None]
            running.append([chosen[place] for place in going], going)
            rows = [rows[place] for place in going]


class _Row:
    """One request of a running batch."""

    def __init__(self, number: int, request: Request, tokenizer: Tokenizer) -> None:
        self.number = number
        self.request = request
        self.source = new_generator(request.sampling)
        self.finish: Finish | None = None
        self._tokenizer = tokenizer
        self._channels = Channels(tokenizer, request.prompt.channel)
        self._channel = request.prompt.channel or FINAL
        self._text = TextStream(tokenizer, request.sampling.stop)
        self._ids: list[int] = []
        self._any_text = False

    def take(self, token: int) -> Iterator[Piece]:
        """Account for a chosen token."""
        if token in self.request.prompt.end_ids or self._channels.closes(token):
            self.finish = "end"
            yield from self._last(None)
            return
        self._ids.append(token)
        channel = self._channels.push(token)
        if channel is not None and channel != self._channel:
            yield self._piece(None, self._text.finish())
            self._channel, self._text = channel, TextStream(self._tokenizer, self.request.sampling.stop)
        text = self._text.push(token) if channel is not None else ""
        self._any_text |= channel is not None
        if self._text.stopped:
            self.finish = "stop"
        elif len(self._ids) == self.request.sampling.max_new_tokens:
            self.finish = "length"
        if self.finish is None:
            yield self._piece(token, text)
        else:
            yield from self._last(token, text)

    def _last(self, token: int | None, text: str = "") -> Iterator[Piece]:
        """The last piece; an answer that never opened a message is shown as it is."""
        text += self._text.finish()
        if not self._any_text:
            text = self._tokenizer.decode(self._ids)
        yield self._piece(token, text)

    def _piece(self, token: int | None, text: str) -> Piece:
        return Piece(request=self.number, token=token, text=text, channel=self._channel, finish=self.finish)


class _Batch:
    """Rows that are decoded together, padded on the left, and their cache."""

    def __init__(self, model: GptOssForCausalLM, prompts: Sequence[Sequence[int]], *, use_cache: bool) -> None:
        longest, device = max(map(len, prompts)), device_of(model)
        self._model = model
        self._tokens = torch.zeros((len(prompts), longest), dtype=torch.long, device=device)  # (B, T)
        self._mask = torch.zeros_like(self._tokens)  # (B, T)
        for row, prompt in enumerate(prompts):
            self._tokens[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
            self._mask[row, longest - len(prompt) :] = 1
        self._cache = DynamicCache(config=model.config) if use_cache else None
        self._cached = 0

    @torch.inference_mode()
    def logits(self) -> torch.Tensor:
        """Of each row's last position.  # float32 (B, vocabulary)"""
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)  # (B, T)
        padded = not bool(self._mask.all())
        output = self._model(
            input_ids=self._tokens[:, self._cached :],
            # No mask where nothing is hidden: an attention function may then take a shorter way.
            attention_mask=self._mask if padded else None,
            position_ids=positions[:, self._cached :],
            past_key_values=self._cache,
            use_cache=self._cache is not None,
            logits_to_keep=1,
        )
        if self._cache is not None:
            self._cached = self._tokens.shape[1]
        return output.logits[:, -1].float()

    @torch.inference_mode()
    def append(self, tokens: Sequence[int], rows: Sequence[int]) -> None:
        """Add a token to each of the rows that go on, and forget the others."""
        kept = torch.tensor(rows, dtype=torch.long, device=self._tokens.device)
        if len(rows) < len(self._tokens) and rows:
            self._tokens, self._mask = self._tokens[kept], self._mask[kept]
            if self._cache is not None:
                self._cache.batch_select_indices(kept)
        if rows:
            new = torch.tensor(tokens, dtype=torch.long, device=self._tokens.device)[:, None]  # (B, 1)
            self._tokens = torch.cat([self._tokens, new], dim=1)
            self._mask = torch.cat([self._mask, torch.ones_like(new)], dim=1)


def _groups(requests: Sequence[Request], batch: int) -> Iterator[list[int]]:
    """Which requests are decoded together: neighbours in length, so that little is padded."""
    order = sorted(range(len(requests)), key=lambda number: len(requests[number].prompt.ids))
    for start in range(0, len(order), batch):
        yield order[start : start + batch]


def _check_lengths(model: GptOssForCausalLM, requests: Sequence[Request]) -> None:
    longest = model.config.max_position_embeddings
    for request in requests:
        if not request.prompt.ids:
            raise UsageError("expected a prompt, got no tokens")
        if len(request.prompt.ids) + request.sampling.max_new_tokens > longest:
            raise UsageError(
                f"expected at most {longest} tokens together, got {len(request.prompt.ids)} of prompt and "
                f"{request.sampling.max_new_tokens} to generate; shorten one"
            )
