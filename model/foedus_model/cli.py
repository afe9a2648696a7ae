"""``foedus model``: look at base models, continue text with one, pretrain the small one.

Heavy imports happen inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from foedus_protocols.console import Format, FormatOption, emit
from foedus_protocols.errors import UsageError
from foedus_protocols.manifest import Manifest, read_config, verify_manifest, write_manifest
from rich.console import Console
from rich.markup import escape

from foedus_model.presets import TINY

app = typer.Typer(no_args_is_help=True, help="Base models and variants: pretrain, inspect, generate.")

NOT_PRIVATE = "NOT PRIVATE: this variant was trained without differential privacy; it may repeat training records."


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A base model.")] = TINY,
    output: FormatOption = Format.text,
) -> None:
    """Verify a base model's files against its manifest and say what it is."""
    result = _described(folder, verify_manifest(folder), read_config(folder))
    emit(result, output, lambda console: _print_fields(console, result))


@app.command()
def manifest(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A downloaded checkpoint in the released layout.")],
    source: Annotated[str, typer.Option(help="Where the files come from; kept in the manifest.")] = "",
    output: FormatOption = Format.text,
) -> None:
    """Write the manifest of a downloaded checkpoint, which makes it a base that a charter can name."""
    from foedus_model.checkpoint import require_safetensors

    require_safetensors(folder)
    written = write_manifest(folder, provenance={"source": source} if source else {})
    result = _described(folder, written, read_config(folder))
    emit(result, output, lambda console: _print_fields(console, result))


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Option(help="The text to answer.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with the text to answer.")] = None,
    base: Annotated[Path, typer.Option(help="The base model; the small one that comes along by default.")] = TINY,
    variant: Annotated[Path | None, typer.Option(help="A variant folder to put on the base.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as plain text, not as a chat.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="At most this many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes drawn tokens repeatable.")] = None,
    output: FormatOption = Format.text,
) -> None:
    """Answer a prompt with a base model or a variant."""
    import torch

    from foedus_model import generate as generation

    sampling = generation.Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    text = _prompt(prompt, prompt_file)
    generator = generation.load_generator(base, variant, device="cuda" if torch.cuda.is_available() else "cpu")
    prompt_ids = generation.encode_prompt(generator.tokenizer, text, chat=not raw)
    new_ids = generation.generate(generator, prompt_ids, sampling)
    result: dict[str, Any] = {
        "text": generator.tokenizer.decode(new_ids),
        "prompt_tokens": len(prompt_ids),
        "new_tokens": len(new_ids),
        "base": generator.base_digest,
        "variant": str(variant) if variant is not None else None,
        "private": generator.private,
        "notice": NOT_PRIVATE if generator.private is False else None,
    }
    emit(result, output, lambda console: _print_text(console, result))


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="A new or empty folder for the finished base.")],
    work: Annotated[Path, typer.Option(help="Where the run keeps its state; run again to continue.")],
    output: FormatOption = Format.text,
) -> None:
    """Pretrain the small base from the text of this Python installation; resumable."""
    import torch

    from foedus_model import pretrain as pretraining

    if out.exists() and any(out.iterdir()):
        raise UsageError(f"expected a new or empty folder for the finished base, got {out}")
    model = pretraining.pretrain(
        work, device="cuda" if torch.cuda.is_available() else "cpu", quiet=output is Format.json
    )
    pretraining.ship(model, work, out)
    result = _described(out, verify_manifest(out), read_config(out))
    emit(result, output, lambda console: _print_fields(console, result))


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise UsageError("expected a prompt by --prompt TEXT or --prompt-file FILE, and only one of them")
    if prompt is not None:
        return prompt
    try:
        return Path(str(prompt_file)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"expected a text file in UTF-8 at {prompt_file}, got: {error}") from error


def _described(folder: Path, found: Manifest, config: dict[str, Any]) -> dict[str, Any]:
    shape = ("num_hidden_layers", "hidden_size", "num_local_experts", "num_experts_per_tok", "vocab_size")
    return {
        "path": str(folder),
        "digest": found.digest,
        "quantisation": found.quantisation,
        "bytes": sum(entry.size for entry in found.files.values()),
        "files": len(found.files),
        **{field: config.get(field) for field in shape},
        "config_digest": found.config_digest,
        "tokenizer_digest": found.tokenizer_digest,
        "provenance": dict(found.provenance),
    }


def _print_fields(console: Console, result: dict[str, Any]) -> None:
    for name, value in result.items():
        console.print(f"[bold]{name}[/bold]  {escape(str(value))}", soft_wrap=True)


def _print_text(console: Console, result: dict[str, Any]) -> None:
    if result["notice"]:
        console.print(f"[bold red]{result['notice']}[/bold red]", soft_wrap=True)
    console.print(result["text"], markup=False, highlight=False, soft_wrap=True)
