"""Tokens to text, piece by piece: no half characters, and nothing of a stop text.

A byte-level token may end in the middle of a character, and a stop text may be spelt over several tokens. So the end
of what is known is held back while more tokens could change it; the pieces joined are exactly the text of all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one request's tokens, as they come.

    Attributes:
        stopped: Whether a stop text was met; nothing comes after it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []  # Of which no text was made yet: they end within a character.
        self._held = ""  # Text that could be the beginning of a stop text.
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain after one more token; often empty."""
        if self.stopped:
            return ""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=False)
        if text.endswith(_UNFINISHED):
            return ""
        self._ids.clear()
        return self._release(text)

    def finish(self) -> str:
        """What was held back, at the end of the request; a character that was never completed is shown as such."""
        text = self._tokenizer.decode(self._ids, skip_special_tokens=False) if self._ids else ""
        self._ids.clear()
        if self.stopped:
            return ""
        piece = self._release(text)  # May meet a stop text, and then holds nothing back.
        piece, self._held = piece + self._held, ""
        return piece

    def _release(self, text: str) -> str:
        """Cut at the first stop text, and hold back what may become one."""
        text = self._held + text
        self._held = ""
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
