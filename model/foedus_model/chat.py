"""Messages to the tokens of a prompt, and the tokens of an answer to its channels.

A base that carries a ``chat_template.jinja`` is prompted with it, in a sandbox (`render`); one that does not, with the
short form of the harmony format (https://cookbook.openai.com/article/harmony) that training uses, whose answer is the
channel ``final`` at once. In either, text of a message is never read as a control token: whoever writes ``<|end|>``
into a question ends nothing. (Rendering a template to text and encoding that text, as is usual, would obey it.)

Left out: tools. A template may mention them; nothing here calls one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE

from foedus_protocols.console import printable
from foedus_protocols.errors import CheckpointError, UsageError
from tokenizers import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
FINAL = "final"
ROLES = ("system", "developer", "user", "assistant", "tool")
KEYS = ("role", "content", "thinking", "name")
_MARKS = "".join(map(chr, range(0xF8E0, 0xF900)))  # Private characters; one that no message uses is the mark.
_MOST_MESSAGES = 4096
_WAIT = 60.0  # Seconds; the processor's time is limited in the process itself.
_MOST_REASON = 300

Message = Mapping[str, str]
"""``role``, ``content``, and optionally ``name`` and, for an assistant, ``thinking``."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is to continue.

    Attributes:
        ids: The tokens.
        end_ids: Tokens that end the answer.
        channel: The channel that the answer begins in; None where the model opens one itself.
    """

    ids: tuple[int, ...]
    end_ids: frozenset[int]
    channel: str | None


def plain_prompt(tokenizer: Tokenizer, text: str) -> Prompt:
    """Text to continue as it stands.

    Raises:
        UsageError: The text is empty.
    """
    if not text:
        raise UsageError("expected a prompt, got empty text")
    ends = _known(tokenizer, "<|return|>", "<|call|>", "<|end|>", "<|endoftext|>")
    return Prompt(ids=tuple(text_ids(tokenizer, text)), end_ids=ends, channel=FINAL)


def short_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> Prompt:
    """The short form of harmony, as in training: no system message, the answer's header open.

    Instructions (roles ``system`` and ``developer``) become the developer's; reasoning of earlier answers is left out.

    Raises:
        UsageError: There is no message to answer, or one of a role that this form does not have.
        CheckpointError: The tokenizer has no control tokens to wrap messages with.
    """
    check_messages(messages)
    ids: list[int] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool":
            raise UsageError("expected no tool message without a chat template in the base, got one: leave it out")
        if role == "assistant":
            ids += _turn(tokenizer, role, content, channel=FINAL)
        elif role == "user":
            ids += _turn(tokenizer, role, content)
        else:
            ids += _turn(tokenizer, "developer", f"# Instructions\n\n{content}")
    ids += _turn(tokenizer, "assistant", None, channel=FINAL)
    ends = _known(tokenizer, "<|return|>", "<|call|>", "<|end|>", "<|endoftext|>")
    return Prompt(ids=tuple(ids), end_ids=ends, channel=FINAL)


def template_prompt(tokenizer: Tokenizer, template: str, messages: Sequence[Message], **values: str) -> Prompt:
    """A base's own template, with the tokens that ask for an answer.

    Args:
        tokenizer: The base's tokenizer.
        template: The text of its ``chat_template.jinja``.
        messages: The turns so far.
        **values: Variables that the template knows, such as gpt-oss' ``reasoning_effort``.

    Raises:
        UsageError: There is no message to answer.
        CheckpointError: The template cannot be rendered with these messages.
    """
    check_messages(messages)
    controls = special_ids(tokenizer)
    if not controls:
        raise CheckpointError("expected control tokens in a tokenizer with a chat template, got none")
    firsts = {control[0] for control in controls}
    mark = _free_mark([template, *values.values(), *(text for message in messages for text in message.values())])
    marked = [{name: _marked(text, firsts, mark) for name, text in message.items()} for message in messages]
    rendered = _render(template, marked, {name: _marked(text, firsts, mark) for name, text in values.items()})
    ids: list[int] = []
    last = ""
    # Only the template's own control tokens are whole in the rendered text: those in messages hold the mark.
    longest_first = sorted(controls, key=len, reverse=True)
    for piece in re.split("(" + "|".join(map(re.escape, longest_first)) + ")", rendered):
        if piece in controls:
            last = piece
            ids.append(controls[piece])
        elif piece:
            ids += text_ids(tokenizer, piece.replace(mark, ""))
    if not ids:
        raise CheckpointError("expected a prompt from the base's chat template, it rendered nothing")
    # An answer's own messages end with <|end|>: analysis does, and the final answer follows it.
    own_header = last == "<|start|>"
    ends = _known(tokenizer, "<|return|>", "<|call|>", "<|endoftext|>")
    other = frozenset() if own_header else _known(tokenizer, "<|end|>", "<|im_end|>", "<|eot_id|>")
    return Prompt(ids=tuple(ids), end_ids=ends | other, channel=None if own_header else FINAL)


def check_messages(messages: Sequence[Message]) -> None:
    """Accept turns that ask for an answer.

    Raises:
        UsageError: No turns, a turn without text, an unknown role or key, or an answer as the last turn. What a turn
            says, or has for a key or role, is not repeated: it may be a person's words.
    """
    if not messages or len(messages) > _MOST_MESSAGES:
        raise UsageError(f"expected from 1 to {_MOST_MESSAGES} messages, got {len(messages)}")
    for number, message in enumerate(messages, start=1):
        if not set(message) <= set(KEYS):
            raise UsageError(f"expected only the keys {', '.join(KEYS)} in message {number}, got another: remove it")
        if message.get("role") not in ROLES:
            raise UsageError(f"expected a role of {', '.join(ROLES)} in message {number}, got another or none")
        if not message.get("content"):
            raise UsageError(f"expected text in message {number}, got none")
    if messages[-1]["role"] == "assistant":
        raise UsageError("expected a last message to answer, got the assistant's own: remove it")


def read_messages(path: Path) -> list[list[dict[str, str]]]:
    """Read a JSON file: one conversation as a list of messages, or several as a list of such lists.

    Raises:
        UsageError: No such file, or something else in it.
    """
    shape = 'a JSON list of {"role": ..., "content": ...}, or a list of such lists'
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"expected conversations, {shape}, in {path}, got: {error}") from error
    conversations = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    for messages in conversations:
        if not isinstance(messages, list) or not all(
            isinstance(message, dict) and all(isinstance(text, str) for text in message.values())
            for message in messages
        ):
            raise UsageError(f"expected conversations, {shape}, in {path}, got something else")
        check_messages(messages)
    return list(conversations)


class Channels:
    """Which tokens of an answer are text, and of which channel: ``analysis``, ``commentary`` or ``final``.

    Harmony answers hold messages of their own (``<|channel|>analysis<|message|>...<|end|><|start|>assistant...``);
    everything between a control token and ``<|message|>`` is a header and no text.
    """

    def __init__(self, tokenizer: Tokenizer, channel: str | None) -> None:
        self._tokenizer = tokenizer
        self._controls = {number: name for name, number in special_ids(tokenizer).items()}
        self._channel = channel
        self._own_headers = channel is None
        self._header: list[int] = []
        self._naming = False

    def closes(self, token: int) -> bool:
        """Whether a token ends a ``final`` message that the answer opened: what comes after it is not of this answer.

        Where the prompt opened it, the prompt's own `end_ids` say what ends it.
        """
        return self._own_headers and self._channel == FINAL and self._controls.get(token) == "<|end|>"

    def push(self, token: int) -> str | None:
        """The channel that a token is text of; None for control tokens and headers."""
        control = self._controls.get(token)
        if control is None:
            if self._channel is None and self._naming:
                self._header.append(token)
            return self._channel
        if control in ("<|start|>", "<|channel|>"):
            self._channel, self._naming, self._header = None, control == "<|channel|>", []
        elif control == "<|message|>":
            named = self._tokenizer.decode(self._header).split() if self._header else []
            self._channel, self._naming = named[0] if named else FINAL, False
        elif control == "<|end|>":
            self._channel, self._naming = None, False
        else:
            self._naming = False  # <|constrain|> and the like: what follows is no part of the channel's name.
        return None


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of text in which control tokens are spelt, not obeyed."""
    previous = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    finally:
        tokenizer.encode_special_tokens = previous


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """A tokenizer's control tokens: name to id."""
    added = tokenizer.get_added_tokens_decoder()
    return {token.content: number for number, token in added.items() if token.special}


def _turn(tokenizer: Tokenizer, role: str, content: str | None, *, channel: str = "") -> list[int]:
    """One message; without content its header alone."""
    ids = [_control(tokenizer, "<|start|>"), *text_ids(tokenizer, role)]
    if channel:
        ids += [_control(tokenizer, "<|channel|>"), *text_ids(tokenizer, channel)]
    ids.append(_control(tokenizer, "<|message|>"))
    return ids if content is None else [*ids, *text_ids(tokenizer, content), _control(tokenizer, "<|end|>")]


def _control(tokenizer: Tokenizer, name: str) -> int:
    number = tokenizer.token_to_id(name)
    if number is None:
        raise CheckpointError(f"the base's tokenizer has no {name}; use --raw to continue plain text")
    return int(number)


def _known(tokenizer: Tokenizer, *names: str) -> frozenset[int]:
    return frozenset(number for name in names if (number := tokenizer.token_to_id(name)) is not None)


def _free_mark(texts: Sequence[str]) -> str:
    used = set().union(*(set(text) for text in texts))
    free = next((mark for mark in _MARKS if mark not in used), None)
    if free is None:
        raise UsageError("expected messages without private characters (U+F8E0 to U+F8FF), got all of them")
    return free


def _marked(text: str, firsts: set[str], mark: str) -> str:
    """The text with a mark behind every character that a control token could begin with."""
    return "".join(character + mark if character in firsts else character for character in text)


def _render(template: str, messages: Sequence[Mapping[str, str]], values: Mapping[str, str]) -> str:
    """Run a template in the sandbox of `render`, a process that the system's limits can end."""
    asked = json.dumps({"template": template, "messages": messages, "values": values})
    command = (sys.executable, "-P", str(Path(__file__).with_name("render.py")))  # -P: our codecs is not Python's.
    try:
        done = subprocess.run(command, input=asked, stdout=PIPE, stderr=DEVNULL, encoding="utf-8", timeout=_WAIT)
        said = json.loads(done.stdout) if done.returncode == 0 else {}
    except subprocess.TimeoutExpired:
        said = {}
    if "text" in said:
        return str(said["text"])
    reason = printable(said.get("error", "it takes more time or memory than a template may"))[:_MOST_REASON]
    raise CheckpointError(
        f"the base's {TEMPLATE_FILE} cannot be rendered with these messages: {reason}; use --short or --raw"
    )
