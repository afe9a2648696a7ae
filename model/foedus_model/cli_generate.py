"""``foedus model generate``: prompts in, answers out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from foedus_protocols.console import Format, FormatOption, emit, progress_console, without_controls
from foedus_protocols.errors import UsageError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from foedus_model.presets import TINY

if TYPE_CHECKING:
    from foedus_model.chat import Prompt
    from foedus_model.decode import Completion, Request
    from foedus_model.generate import Generator

NOT_PRIVATE = "NOT PRIVATE: this variant was trained without differential privacy; it may repeat training records."


@dataclass(frozen=True, kw_only=True)
class _Form:
    """How text becomes a prompt."""

    raw: bool
    short: bool
    effort: str | None


def generate(
    prompt: Annotated[list[str] | None, typer.Option(help="The text to answer; may be given several times.")] = None,
    prompt_file: Annotated[
        list[Path] | None, typer.Option(help="A file with the text to answer; may be given several times.")
    ] = None,
    messages: Annotated[
        Path | None,
        typer.Option(help='JSON: a list of {"role": ..., "content": ...}, or several such lists.'),
    ] = None,
    base: Annotated[Path, typer.Option(help="The base model; the small one that comes along by default.")] = TINY,
    variant: Annotated[Path | None, typer.Option(help="A variant folder to put on the base.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as plain text, not as a chat.")] = False,
    short: Annotated[
        bool, typer.Option("--short", help="The short chat form of training, although the base has a template.")
    ] = False,
    effort: Annotated[str | None, typer.Option(help="What the base's template calls reasoning effort.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among so many likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens of this probability together.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Draw among tokens with this share of the likeliest one's probability.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes drawn tokens repeatable; each prompt starts from it.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends the answer; may be given several times.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Prompts that are decoded together.")] = 8,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes, one prompt after another.")] = False,
    output: FormatOption = Format.text,
) -> None:
    """Answer prompts with a base model or a variant."""
    from foedus_model.decode import Request, complete
    from foedus_model.generate import load_as_switched
    from foedus_model.sampling import Sampling

    if stream and output is Format.json:
        raise UsageError("expected --stream or --format json, got both: the JSON object comes at the end")
    if raw and short:
        raise UsageError("expected --raw or --short, got both")
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
        stop=tuple(stop or ()),
    )  # fmt: skip
    conversations = _conversations(prompt or [], prompt_file or [], messages, raw=raw)
    form = _Form(raw=raw, short=short, effort=effort)
    with closing(load_as_switched(base, variant)) as generator:
        requests = [Request(prompt=_prompt(generator, turns, form), sampling=sampling) for turns in conversations]
        if stream:
            _stream(generator, requests)
            return
        with _progress(requests) as progress:
            done = complete(generator.model, generator.tokenizer, requests, batch=batch, on_finish=progress)
    result = _result(generator, requests, done, variant)
    emit(result, output, lambda console: _print(console, result))


def _conversations(
    prompts: list[str], files: list[Path], messages: Path | None, *, raw: bool
) -> list[list[dict[str, str]]]:
    """The conversations to continue; a prompt is one of a single user's message."""
    from foedus_model.chat import read_messages

    if sum((bool(prompts), bool(files), messages is not None)) != 1:
        raise UsageError(
            "expected prompts by --prompt TEXT, --prompt-file FILE or --messages FILE, and only one of them"
        )
    if messages is not None:
        if raw:
            raise UsageError("expected --messages or --raw, got both: plain text has no roles")
        return read_messages(messages)
    texts = prompts or [_read(path) for path in files]
    if not all(texts):
        raise UsageError("expected a prompt, got empty text")
    return [[{"role": "user", "content": text}] for text in texts]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"expected a text file in UTF-8 at {path}, got: {error}") from error


def _prompt(generator: Generator, turns: list[dict[str, str]], form: _Form) -> Prompt:
    from foedus_model.chat import plain_prompt, short_prompt, template_prompt

    if form.raw:
        return plain_prompt(generator.tokenizer, turns[0]["content"])
    if generator.template is None or form.short:
        if form.effort is not None:
            raise UsageError("expected a base with a chat template for --effort, or none of it with --short")
        return short_prompt(generator.tokenizer, turns)
    values = {"reasoning_effort": form.effort} if form.effort is not None else {}
    return template_prompt(generator.tokenizer, generator.template, turns, **values)


def _stream(generator: Generator, requests: list[Request]) -> None:
    """Print answers as they come; reasoning goes to standard error, where there is any."""
    from foedus_model.chat import FINAL
    from foedus_model.decode import stream

    if generator.private is False:
        sys.stdout.write(NOT_PRIVATE + "\n")
    for piece in stream(generator.model, generator.tokenizer, requests, batch=1):
        out = sys.stdout if piece.channel == FINAL else sys.stderr
        text = without_controls(piece.text) if out.isatty() else piece.text
        out.write(text + ("\n" if piece.finish is not None else ""))
        out.flush()


@contextmanager
def _progress(requests: list[Request]) -> Iterator[Callable[[], None]]:
    """A bar on standard error where there are several prompts; gives what is called at the end of each."""
    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=progress_console, disable=len(requests) < 2, transient=True) as progress:
        task = progress.add_task("answers", total=len(requests))
        yield lambda: progress.advance(task)


def _result(
    generator: Generator, requests: list[Request], done: list[Completion], variant: Path | None
) -> dict[str, Any]:
    """What ``--format json`` prints; a single prompt's answer stands at the top too."""
    answers = [
        {
            "text": one.text,
            "thinking": one.thinking,
            "finish": one.finish,
            "prompt_tokens": len(request.prompt.ids),
            "new_tokens": len(one.ids),
        }
        for request, one in zip(requests, done, strict=True)
    ]
    return {
        **(answers[0] if len(answers) == 1 else {}),
        "answers": answers,
        "base": generator.base_digest,
        "variant": str(variant) if variant is not None else None,
        "private": generator.private,
        "notice": NOT_PRIVATE if generator.private is False else None,
    }


def _print(console: Console, result: dict[str, Any]) -> None:
    if result["notice"]:
        console.print(f"[bold red]{result['notice']}[/bold red]", soft_wrap=True)
    answers = result["answers"]
    shown = without_controls if console.is_terminal else str
    for number, answer in enumerate(answers, start=1):
        if len(answers) > 1:
            console.print(f"[bold]{number}[/bold]", highlight=False)
        if answer["thinking"]:
            console.print(shown(answer["thinking"]), markup=False, highlight=False, soft_wrap=True, style="dim")
        console.print(shown(answer["text"]), markup=False, highlight=False, soft_wrap=True)
