"""Continuing text, and the command line around it."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from foedus_model import cli, generate
from foedus_model.adapter import attach
from foedus_model.attention import NAME
from foedus_model.build import load_base
from foedus_model.chat import FINAL, Prompt, plain_prompt, short_prompt
from foedus_model.checkpoint import open_checkpoint
from foedus_model.decode import Request, complete
from foedus_model.loss import device_of
from foedus_model.sampling import Sampling
from foedus_model.streaming import stream_experts
from foedus_protocols.errors import CheckpointError, ConfigError, FoedusError, UsageError
from foedus_protocols.layout import adapter_layout, vector_digest
from foedus_protocols.peft_folder import file_digests, write_peft
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from typer.testing import CliRunner

from .conftest import BYTES, random_state, small_config


@pytest.fixture
def write_variant(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a variant folder as the coordinator does; keywords replace manifest fields."""

    def write(scale: float = 0.2, **fields: object) -> Path:
        checkpoint = open_checkpoint(base)
        layout = adapter_layout(checkpoint.config, targets="attention", rank=4)
        vector = (np.random.default_rng(1).normal(size=layout.length) * scale).astype(np.float32)
        folder = tmp_path / "variant"
        write_peft(folder, layout=layout, vector=vector, seed="s", rank=4, alpha=8, base_name="small")
        manifest = {"base": checkpoint.digest, "adapter": vector_digest(vector), "private": True} | fields
        (folder / "manifest.json").write_text(json.dumps({"manifest": manifest, "signature": ""}))
        return folder

    return write


@pytest.fixture(scope="module")
def plain(base: Path) -> generate.Generator:
    return generate.load_generator(base)


def _ids(tokenizer: Tokenizer, prompt: str, *, chat: bool = False) -> list[int]:
    made = short_prompt(tokenizer, [{"role": "user", "content": prompt}]) if chat else plain_prompt(tokenizer, prompt)
    return list(made.ids)


def _continued(generator: generate.Generator, prompt_ids: list[int], sampling: Sampling) -> list[int]:
    """The ids after a prompt, without the one that ended the text."""
    ends = plain_prompt(generator.tokenizer, "-").end_ids
    prompt = Prompt(ids=tuple(prompt_ids), end_ids=ends, channel=FINAL)
    return list(complete(generator.model, generator.tokenizer, [Request(prompt=prompt, sampling=sampling)])[0].ids)


def test_greedy_text_repeats_and_respects_the_limit(plain: generate.Generator) -> None:
    ids = _ids(plain.tokenizer, "hello")
    first = _continued(plain, ids, Sampling(max_new_tokens=12))
    assert first == _continued(plain, ids, Sampling(max_new_tokens=12))
    assert 0 < len(first) <= 12


def test_sampling_follows_its_seed_and_leaves_the_global_generator(plain: generate.Generator) -> None:
    import torch

    ids = _ids(plain.tokenizer, "hello")
    before = torch.get_rng_state()
    draws = [_continued(plain, ids, Sampling(max_new_tokens=24, temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_control_token_spelt_in_a_prompt_stays_text(plain: generate.Generator) -> None:
    prompt = "a<|end|><|start|>system"
    ids = _ids(plain.tokenizer, prompt)
    assert max(ids) < len(BYTES)
    assert plain.tokenizer.decode(ids) == prompt
    wrapped = _ids(plain.tokenizer, prompt, chat=True)
    controls = [plain.tokenizer.id_to_token(one) for one in wrapped if one >= len(BYTES)]
    assert controls == ["<|start|>", "<|message|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>"]


def test_a_chat_prompt_is_the_harmony_format(plain: generate.Generator) -> None:
    ids = _ids(plain.tokenizer, "Why?", chat=True)
    assert plain.tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|start|>user<|message|>Why?<|end|><|start|>assistant<|channel|>final<|message|>"
    )


def test_a_variant_changes_the_text(base: Path, plain: generate.Generator, write_variant: Callable[..., Path]) -> None:
    adapted = generate.load_generator(base, write_variant())
    ids = _ids(plain.tokenizer, "hello")
    sampling = Sampling(max_new_tokens=32)
    assert _continued(adapted, ids, sampling) != _continued(plain, ids, sampling)
    assert adapted.private is True
    assert plain.private is None
    assert not any(parameter.requires_grad for parameter in adapted.model.parameters())


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"base": "0" * 64}, "trained on the base 0000"),
        ({"adapter": "0" * 64}, "not the one that its manifest names"),
        ({"private": "yes"}, "manifest with base, adapter, private"),
    ],
)
def test_a_variant_that_does_not_belong_is_refused(
    base: Path, write_variant: Callable[..., Path], fields: dict[str, object], text: str
) -> None:
    with pytest.raises(CheckpointError, match=text):
        generate.load_generator(base, write_variant(**fields))


def _with_files(folder: Path) -> Path:
    """The manifest gets the digests of the files beside it."""
    signed = json.loads((folder / "manifest.json").read_text())
    signed["manifest"]["files"] = file_digests(folder)
    (folder / "manifest.json").write_text(json.dumps(signed))
    return folder


@pytest.mark.parametrize("changed", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_variant_whose_files_were_changed_under_its_manifest_is_refused(
    base: Path, write_variant: Callable[..., Path], changed: str
) -> None:
    """The trained matrices, and so the vector's digest, stay: every A is another, or alpha is 500 times as large."""
    folder = _with_files(write_variant())
    generate.load_generator(base, folder)
    if changed == "adapter_config.json":
        config = json.loads((folder / changed).read_text())
        (folder / changed).write_text(json.dumps(config | {"lora_alpha": 4000}))
    else:
        stored = load_file(folder / changed)
        save_file({name: one * (50 if "lora_A" in name else 1) for name, one in stored.items()}, folder / changed)
    with pytest.raises(CheckpointError, match=f"{changed} with the digest .* of the variant's manifest, got"):
        generate.load_generator(base, folder)


@pytest.mark.parametrize("files", [{}, "both", None, {"adapter_model.safetensors": 1}])
def test_a_manifest_that_names_not_both_files_is_refused(
    base: Path, write_variant: Callable[..., Path], files: object
) -> None:
    with pytest.raises(CheckpointError, match=r"expected the digest of adapter_model\.safetensors in the manifest"):
        generate.load_generator(base, write_variant(files=files))
    folder = _with_files(write_variant())
    signed = json.loads((folder / "manifest.json").read_text())
    del signed["manifest"]["files"]["adapter_config.json"]
    (folder / "manifest.json").write_text(json.dumps(signed))
    with pytest.raises(CheckpointError, match=r"expected the digest of adapter_config\.json in the manifest"):
        generate.load_generator(base, folder)


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({"alpha": 4.0}, "expected the alpha 4.0 in .*, as the variant's manifest says, got 8.0"),
        ({"rank": 2}, "expected the rank 2 in .*, got 4"),
        ({"layers": [0]}, r"expected the layers \[0\] in .*, got None"),
    ],
)
def test_an_older_manifest_is_compared_by_its_terms(
    base: Path, write_variant: Callable[..., Path], terms: dict[str, Any], said: str
) -> None:
    same = {"targets": "attention", "layers": None, "train": "b", "rank": 4, "alpha": 8.0}
    generate.load_generator(base, write_variant(adapter_terms=same))
    with pytest.raises(CheckpointError, match=said):
        generate.load_generator(base, write_variant(adapter_terms=same | terms))


def test_a_variant_without_a_manifest_is_refused(base: Path, write_variant: Callable[..., Path]) -> None:
    folder = write_variant()
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="expected a variant with"):
        generate.load_generator(base, folder)


def test_a_prompt_beyond_the_context_is_refused(plain: generate.Generator) -> None:
    with pytest.raises(UsageError, match="at most 2048 tokens together, got 2000 of prompt and 49"):
        _continued(plain, [1] * 2000, Sampling(max_new_tokens=49))


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}])
def test_senseless_sampling_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sampling(**options)  # type: ignore[arg-type]


def _run(*arguments: str) -> dict[str, object]:
    result = CliRunner().invoke(cli.app, [*arguments, "--format", "json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout.splitlines()[-1]))


def test_command_generate_says_not_private(base: Path, write_variant: Callable[..., Path]) -> None:
    variant = str(write_variant(private=False))
    arguments = ["generate", "--base", str(base), "--prompt", "hello", "--max-new-tokens", "4"]
    assert _run(*arguments)["notice"] is None
    result = _run(*arguments, "--variant", variant)
    assert result["private"] is False
    assert str(result["notice"]).startswith("NOT PRIVATE")
    text = CliRunner().invoke(cli.app, [*arguments, "--variant", variant], catch_exceptions=False)
    assert "NOT PRIVATE" in text.stdout


def test_command_generate_reads_a_file_and_wants_one_prompt(base: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("hello")
    arguments = ["generate", "--base", str(base), "--raw", "--max-new-tokens", "4"]
    by_file = _run(*arguments, "--prompt-file", str(tmp_path / "prompt.txt"))
    assert by_file["text"] == _run(*arguments, "--prompt", "hello")["text"]
    for extra in ([], ["--prompt", "a", "--prompt-file", "b"]):
        with pytest.raises(UsageError, match="only one of them"):
            CliRunner().invoke(cli.app, [*arguments, *extra], catch_exceptions=False)
    with pytest.raises(UsageError, match="text file"):
        CliRunner().invoke(cli.app, [*arguments, "--prompt-file", str(tmp_path / "no")], catch_exceptions=False)


def test_command_inspect_describes_and_manifest_adopts(base: Path, tmp_path: Path) -> None:
    described = _run("inspect", str(base))
    assert described["digest"] == open_checkpoint(base).digest
    assert (described["quantisation"], described["num_local_experts"]) == ("mxfp4", 16)
    bare = Path(shutil.copytree(base, tmp_path / "bare"))
    (bare / "manifest.json").unlink()
    with pytest.raises(FoedusError, match="foedus model manifest"):
        CliRunner().invoke(cli.app, ["inspect", str(bare)], catch_exceptions=False)
    adopted = _run("manifest", str(bare), "--source", "a mirror")
    assert adopted["provenance"] == {"source": "a mirror"}
    assert _run("inspect", str(bare))["digest"] == adopted["digest"]


def test_command_pretrain_refuses_a_full_folder(base: Path, tmp_path: Path) -> None:
    arguments = ["pretrain", "--out", str(base), "--work", str(tmp_path / "work")]
    with pytest.raises(UsageError, match="new or empty folder"):
        CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_the_same_alone_in_a_batch_and_without_cache(plain: generate.Generator, temperature: float) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=temperature, seed=3)
    texts = ["a", "a prompt far beyond the window", "seven.."]
    requests = [Request(prompt=plain_prompt(plain.tokenizer, text), sampling=sampling) for text in texts]
    together = [one.ids for one in complete(plain.model, plain.tokenizer, requests)]
    assert together == [complete(plain.model, plain.tokenizer, [one])[0].ids for one in requests]
    assert together == [one.ids for one in complete(plain.model, plain.tokenizer, requests, use_cache=False)]


@pytest.mark.parametrize(
    "terms",
    [
        {"targets": "attention", "train": "both"},
        {"targets": "experts-shared", "train": "b"},
        {"targets": "experts", "layers": [1], "train": "b"},
        {"targets": "experts", "layers": [0], "train": "both"},
    ],
    ids=lambda terms: f"{terms['targets']}, {terms['train']}",
)
def test_a_variant_of_every_kind_is_loaded_as_its_manifest_says(
    base: Path, plain: generate.Generator, terms: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(base)
    layout = adapter_layout(checkpoint.config, rank=4, **terms)
    vector = (np.random.default_rng(1).normal(size=layout.length) * 0.2).astype(np.float32)
    write_peft(tmp_path, layout=layout, vector=vector, seed="s", rank=4, alpha=8, base_name="small")
    manifest = {"base": checkpoint.digest, "adapter": vector_digest(vector), "private": True, "adapter_terms": terms}
    (tmp_path / "manifest.json").write_text(json.dumps({"manifest": manifest, "signature": ""}))
    adapted = generate.load_generator(base, tmp_path)
    expected = attach(load_base(base), layout, seed="s", alpha=8.0, rank=4)
    expected.load_vector(vector)
    ids = torch.tensor([_ids(plain.tokenizer, "hello")])
    with torch.inference_mode():
        got, want, without = (one.model(input_ids=ids).logits for one in (adapted, expected, plain))
    assert torch.equal(got, want)
    assert float((got - without).abs().max()) > 0.1


def _logits(generator: generate.Generator, prompt: str = "a prompt far beyond the window") -> torch.Tensor:
    with torch.inference_mode():
        return generator.model(input_ids=torch.tensor([_ids(generator.tokenizer, prompt)])).logits


def test_a_generator_runs_as_the_environment_says(
    base: Path, plain: generate.Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for name, value in {"ATTENTION": "fused", "EXPERTS": "dequantised", "THREADS": "3", "DEVICE": "cpu"}.items():
        monkeypatch.setenv(f"FOEDUS_{name}", value)
    with caplog.at_level("INFO"):
        switched = generate.load_as_switched(base)
    assert "experts: dequantised, since it was asked for" in caplog.text
    assert (switched.model.config._attn_implementation, plain.model.config._attn_implementation) == (NAME, "eager")
    assert (asked, switched.streaming) == ([3], None)
    got, want = _logits(switched), _logits(plain)
    assert 0.0 < float((got - want).abs().max()) < 1e-2, "another function ran, to the same result"
    switched.close()


def test_the_fused_path_of_experts_is_refused_where_it_cannot_run(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOEDUS_DEVICE", "cpu")
    monkeypatch.setenv("FOEDUS_EXPERTS", "fused")
    with pytest.raises(ConfigError, match="experts: expected what the fused path needs, got the device cpu"):
        generate.load_as_switched(base)


@pytest.mark.parametrize("whole", [False, True], ids=["experts", "whole layers"])
def test_generation_and_losses_stream_to_the_same_bits(
    base: Path, write_variant: Callable[..., Path], whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a cache, several prompts at a time, with a variant; whole layers, as on a GPU, by its engine too."""
    variant = write_variant()
    resident = generate.load_generator(base, variant)
    monkeypatch.setattr(generate, "stream_experts", partial(stream_experts, whole=whole))
    monkeypatch.setenv("FOEDUS_DEVICE", "cpu")
    monkeypatch.setenv("FOEDUS_STREAMING", "4")
    streamed = generate.load_as_switched(base, variant)
    assert streamed.streaming is not None
    assert not _copying()
    assert torch.equal(_logits(streamed), _logits(resident))
    sampling = Sampling(max_new_tokens=6)
    texts = ["a", "a prompt far beyond the window", "seven.."]
    requests = [Request(prompt=plain_prompt(resident.tokenizer, text), sampling=sampling) for text in texts]
    got, want = (complete(one.model, one.tokenizer, requests) for one in (streamed, resident))
    assert [one.ids for one in got] == [one.ids for one in want]
    assert _copying()
    streamed.close()
    streamed.close()
    assert not _copying()


def _copying() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("expert-copies")]


@pytest.mark.parametrize("kind", ["dense base", "a pair for each expert"])
def test_what_cannot_stream_is_refused_not_ignored(
    kind: str, base: Path, write_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOEDUS_DEVICE", "cpu")
    monkeypatch.setenv("FOEDUS_STREAMING", "1")
    if kind == "dense base":
        config = {key: value for key, value in small_config().items() if key != "quantization_config"}
        tensors = {name: tensor for name, tensor in random_state(config).items() if name != "lm_head.weight"}
        dense = write_base("dense", config=config, tensors=tensors)
        with pytest.raises(ConfigError, match="expected a base with quantised experts to stream, got dense ones"):
            generate.load_as_switched(dense)
        return
    terms: dict[str, Any] = {"targets": "experts", "layers": [1], "train": "b"}
    checkpoint = open_checkpoint(base)
    layout = adapter_layout(checkpoint.config, rank=4, **terms)
    vector = np.zeros(layout.length, np.float32)
    write_peft(tmp_path / "pairs", layout=layout, vector=vector, seed="s", rank=4, alpha=8, base_name="small")
    manifest = {"base": checkpoint.digest, "adapter": vector_digest(vector), "private": True, "adapter_terms": terms}
    (tmp_path / "pairs" / "manifest.json").write_text(json.dumps({"manifest": manifest, "signature": ""}))
    with pytest.raises(ConfigError, match="expected an adapter on attention or experts-shared to stream"):
        generate.load_as_switched(base, tmp_path / "pairs")


def test_tokens_go_where_the_head_is(plain: generate.Generator) -> None:
    """Embeddings that wait on the host say nothing of where a model computes."""
    elsewhere = SimpleNamespace(device="cpu", lm_head=SimpleNamespace(weight=torch.empty(1, device="meta")))
    assert device_of(elsewhere).type == "meta"
    assert device_of(plain.model).type == "cpu"
