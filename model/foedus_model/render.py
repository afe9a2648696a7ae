"""A chat template's rendering, in a process of its own: the program that `chat.template_prompt` starts.

A template is a checkpoint's program. jinja2's sandbox keeps it from files and from the interpreter, and not from time
and memory: nested loops, a text doubled forty times or a macro that calls itself. So limits of the system hold it, and
what they end is this process. Reads ``{"template", "messages", "values"}`` as JSON and writes ``{"text"}`` or
``{"error"}``.

Imports the standard library and jinja2 only, to start fast.
"""

from __future__ import annotations

import datetime
import json
import resource
import sys
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 10  # Of the processor; a template takes milliseconds.
BYTES = 1 << 30  # Of address space, of which the interpreter takes about 30 MiB.
MOST_CHARACTERS = 1 << 24


def main() -> None:
    """Read, render, write."""
    for limit, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, BYTES), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(limit)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))  # No core: it would hold the messages.
    try:
        answer = json.dumps({"text": _render(**json.load(sys.stdin))})
    except Exception as error:  # The template's, of whatever type it makes: it is told, not raised.
        answer = json.dumps({"error": f"{type(error).__name__}: {error}"})
    sys.stdout.write(answer)


def _render(template: str, messages: list[dict[str, str]], values: dict[str, str]) -> str:
    """Run a template in the sandbox, with what transformers gives it."""

    def raise_exception(text: str) -> None:
        raise TemplateError(text)

    def now(layout: str) -> str:
        return datetime.datetime.now().strftime(layout)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": now}
    rendered: Any = environment.from_string(template).render(messages=messages, add_generation_prompt=True, **values)
    if len(str(rendered)) > MOST_CHARACTERS:
        raise TemplateError(f"expected at most {MOST_CHARACTERS} characters, got {len(rendered)}")
    return str(rendered)


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter would escape HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


if __name__ == "__main__":
    main()
