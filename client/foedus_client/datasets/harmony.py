"""Chats as the token sequences that gpt-oss was trained on, with the loss on answers alone.

The harmony format (https://cookbook.openai.com/article/harmony)::

    <|start|>user<|message|>QUESTION<|end|><|start|>assistant<|channel|>final<|message|>ANSWER<|return|>

An earlier answer ends with ``<|end|>``, the last one with ``<|return|>``; instructions are the `developer`'s; reasoning
goes to the channel ``analysis`` and is kept for the last answer only. A record's text is never read as a control
token: whoever writes ``<|end|>`` into a question ends nothing.

Left out: tools, and the system message that names a knowledge cutoff and a date; a variant inherits its base's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from foedus_protocols.errors import DataError
from tokenizers import Tokenizer

from foedus_client.datasets.formats import Chat, Message, RowError

_CONTROL = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|endoftext|>")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One training example.

    Attributes:
        tokens: What the model reads.  # int32 (T,)
        loss_mask: Which tokens it learns to predict; the first has no context and is never one.  # bool (T,)
    """

    tokens: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]


@dataclass(kw_only=True)
class _Piece:
    """A run of tokens: control tokens and roles stay whole, contents may be shortened."""

    tokens: list[int]
    answer: bool
    content: bool


class Harmony:
    """Encodes chats and plain text with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take a tokenizer, for this object alone: it is set to read control tokens as ordinary text.

        Raises:
            DataError: The tokenizer lacks a control token of the format.
        """
        self._ids = {name: number for name in _CONTROL if (number := tokenizer.token_to_id(name)) is not None}
        missing = [name for name in _CONTROL if name not in self._ids]
        if missing:
            raise DataError(f"expected a tokenizer with the harmony tokens, this one lacks {', '.join(missing)}")
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer

    @classmethod
    def from_file(cls, path: Path) -> Harmony:
        """Read a ``tokenizer.json``.

        Raises:
            DataError: The file is missing or is no tokenizer.
        """
        if not path.is_file():
            raise DataError(f"expected a tokenizer at {path}, found none: name a base model's tokenizer.json")
        try:
            tokenizer = Tokenizer.from_buffer(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path}: expected a tokenizer.json of the tokenizers library") from error
        return cls(tokenizer)

    def chat(self, chat: Chat, *, max_tokens: int) -> tuple[Record, int]:
        """Encode a chat.

        A chat that is too long keeps at least half of the room for its last answer, which loses its end; the turns
        before lose their start, the oldest first.

        Args:
            chat: Turns that end with an answer.
            max_tokens: Longest record.

        Returns:
            The record, and how many tokens the whole chat has.

        Raises:
            RowError: Not even the turns' control tokens fit.
        """
        pieces = self._pieces(chat.messages)
        length = sum(len(piece.tokens) for piece in pieces)
        if length > max_tokens:
            _shorten(pieces, max_tokens)
        tokens = [token for piece in pieces for token in piece.tokens]
        mask = [piece.answer for piece in pieces for _ in piece.tokens]
        return Record(tokens=np.asarray(tokens, np.int32), loss_mask=np.asarray(mask, np.bool_)), length

    def windows(self, text: str, *, max_tokens: int) -> list[Record]:
        """Cut a text into records, each of which starts with an end-of-text token as its only context.

        Every token of the text is learned in exactly one window.
        """
        tokens = self._encode(text)
        step = max_tokens - 1
        return [
            Record(
                tokens=np.asarray([self._ids["<|endoftext|>"], *tokens[start : start + step]], np.int32),
                loss_mask=np.arange(len(tokens[start : start + step]) + 1) > 0,
            )
            for start in range(0, len(tokens), step)
        ]

    def _pieces(self, messages: tuple[Message, ...]) -> list[_Piece]:
        pieces: list[_Piece] = []
        for index, message in enumerate(messages):
            last = index == len(messages) - 1
            if message.role != "assistant":
                content = message.content
                if message.role == "developer":
                    content = f"# Instructions\n\n{content}"
                pieces += self._turn(message.role, content, end="<|end|>", answer=False)
                continue
            if last and message.thinking:
                pieces += self._turn("assistant", message.thinking, channel="analysis", end="<|end|>", answer=True)
            end = "<|return|>" if last else "<|end|>"
            pieces += self._turn("assistant", message.content, channel="final", end=end, answer=True)
        return pieces

    def _turn(self, role: str, content: str, *, end: str, answer: bool, channel: str = "") -> list[_Piece]:
        header = [self._ids["<|start|>"], *self._encode(role)]
        if channel:
            header += [self._ids["<|channel|>"], *self._encode(channel)]
        return [
            _Piece(tokens=[*header, self._ids["<|message|>"]], answer=False, content=False),
            _Piece(tokens=self._encode(content), answer=answer, content=True),
            _Piece(tokens=[self._ids[end]], answer=answer, content=False),
        ]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _shorten(pieces: list[_Piece], max_tokens: int) -> None:
    """Make the pieces fit, in place; see `Harmony.chat`."""
    room = max_tokens - sum(len(piece.tokens) for piece in pieces if not piece.content)
    if room < 2:
        raise RowError(f"its turns alone fill {max_tokens} tokens: raise --max-tokens")
    *prompts, answer = [piece for piece in pieces if piece.content]
    prompt_length = sum(len(piece.tokens) for piece in prompts)
    answer_room = min(len(answer.tokens), max(room // 2, room - prompt_length))
    if answer_room < len(answer.tokens):
        pieces.pop()  # An answer that goes on must not teach the model to stop here; its last token is room gained.
        room += 1
        answer_room += 1
        answer.tokens = answer.tokens[:answer_room]
    excess = prompt_length - (room - answer_room)
    for piece in prompts:
        cut = min(max(excess, 0), len(piece.tokens))
        piece.tokens = piece.tokens[cut:]
        excess -= cut
