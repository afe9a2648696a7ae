"""Our attention inside transformers' model: equal to eager, padding and records respected, log-sparse layers alive."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foedus_model import attention, presets
from foedus_model.adapter import attach
from foedus_model.build import _model_config, _on_meta, load_base
from foedus_model.quantize import quantise
from foedus_protocols.errors import ConfigError
from foedus_protocols.layout import adapter_layout
from support.attention import dense_attention, log_sparse
from transformers import GptOssConfig, GptOssForCausalLM, StaticCache

from .conftest import random_state, small_config

PATTERN = {"block": 4, "window": 2, "first": 1}
ALL_TYPES = ["sliding_attention", "log_sparse_attention", "full_attention", "log_sparse_attention"]


def _sparse_config(**changes: Any) -> dict[str, Any]:
    """All three layer types, with blocks so short that 40 tokens have distant ones."""
    return small_config(num_hidden_layers=4, layer_types=ALL_TYPES, log_sparse_pattern=PATTERN) | changes


def _full_twin(config: dict[str, Any]) -> dict[str, Any]:
    """The same shapes without log-sparse layers."""
    return {key: value for key, value in config.items() if key != "log_sparse_pattern"} | {
        "layer_types": [kind.replace("log_sparse", "full") for kind in config["layer_types"]]
    }


def _model(config: dict[str, Any]) -> GptOssForCausalLM:
    """A dense model in float64: in float32 the router's top two flip on a last bit, and logits with them."""
    described = attention.gpt_oss_config(config)
    described._experts_implementation = "eager"  # The library's grouped product takes no float64.
    model = GptOssForCausalLM(described).eval()
    model.load_state_dict(random_state(_full_twin(config)))
    return model.double().requires_grad_(False)


@pytest.fixture(scope="module")
def sparse() -> GptOssForCausalLM:
    """Sliding, full and log-sparse layers."""
    return _model(_sparse_config())


def _tokens(rows: int, length: int, vocabulary: int = 200) -> torch.Tensor:
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(7))


def _padded(tokens: torch.Tensor, before: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of one width, the tokens of each moved right by its padding: tokens, mask and positions."""
    mask = (torch.arange(tokens.shape[1]) >= torch.tensor(before).unsqueeze(1)).long()
    rows = torch.stack([row.roll(pads) for row, pads in zip(tokens, before, strict=True)]) * mask
    return rows, mask, (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("grouped", [False, True])
def test_full_and_sliding_layers_equal_transformers_eager(grouped: bool) -> None:
    config = _full_twin(_sparse_config(num_key_value_heads=1 if grouped else 2))
    eager = _model(config)
    ours = _model(config)
    ours.set_attn_implementation(attention.NAME)
    tokens = _tokens(2, 150)
    rows, mask, positions = _padded(tokens, [0, 31])
    with torch.inference_mode():
        for inputs in (
            {"input_ids": tokens},
            {"input_ids": rows, "attention_mask": mask, "position_ids": positions},
        ):
            got, want = (model(**inputs).logits for model in (ours, eager))
            real = inputs.get("attention_mask", torch.ones_like(tokens)).bool()
            torch.testing.assert_close(got[real], want[real], rtol=0, atol=1e-11)


def test_gradients_equal_transformers_eager() -> None:
    config = _full_twin(_sparse_config())
    tokens = _tokens(1, 60)
    found = []
    for name in ("eager", attention.NAME):
        model = _model(config)
        model.set_attn_implementation(name)
        model.requires_grad_(True)(input_ids=tokens, labels=tokens).loss.backward()
        found.append({key: value.grad for key, value in model.named_parameters() if "self_attn" in key})
    for key, want in found[0].items():
        assert float((found[1][key] - want).norm()) <= 1e-10 * float(want.norm()), key
    assert any(key.endswith("sinks") for key in found[0])


def test_a_log_sparse_layer_is_the_oracle_inside_the_model(sparse: GptOssForCausalLM) -> None:
    """One layer of the model, its attention replaced by the dense masked oracle."""
    tokens = _tokens(1, 45)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    plain = attention.log_sparse_torch

    def spy(q: Any, k: Any, v: Any, sinks: Any, *, scale: float, offsets: Any, **pattern: int) -> torch.Tensor:
        assert pattern == PATTERN
        out = plain(q, k, v, sinks, scale=scale, offsets=offsets, **pattern)
        seen.append((out, dense_attention((q, k, v, sinks), scale, log_sparse(**pattern))))
        return out

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(attention, "log_sparse_torch", spy)
        sparse(input_ids=tokens)
        full = _model(_full_twin(_sparse_config()))(input_ids=tokens).logits
    assert len(seen) == 2
    for got, want in seen:
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    with torch.inference_mode():
        assert float((sparse(input_ids=tokens).logits - full).abs().max()) > 1e-2, "it must not run as full attention"


def test_greedy_tokens_are_the_same_with_and_without_cache(sparse: GptOssForCausalLM) -> None:
    prompts = _tokens(2, 9)
    options = {"max_new_tokens": 36, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        mask = torch.ones_like(prompts)
        cached, plain = (
            sparse.generate(prompts, attention_mask=mask, use_cache=use_cache, **options) for use_cache in (True, False)
        )
    assert torch.equal(cached, plain)
    assert len(set(plain[0].tolist())) > 8, "a sequence that varies, or the test shows nothing"


def test_greedy_tokens_are_the_same_alone_and_in_a_padded_batch(sparse: GptOssForCausalLM) -> None:
    rows, mask, _ = _padded(_tokens(3, 30), [0, 13, 28])
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        together = sparse.generate(rows, attention_mask=mask, **options)
        for row, pads in enumerate([0, 13, 28]):
            prompt = rows[row : row + 1, pads:]
            alone = sparse.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            assert torch.equal(together[row, pads:], alone[0])


def test_a_cache_may_be_filled_in_several_steps(sparse: GptOssForCausalLM) -> None:
    tokens = _tokens(2, 41)
    with torch.inference_mode():
        want = sparse(input_ids=tokens, use_cache=False).logits
        cache, parts = None, []
        for part in tokens.split([11, 1, 20, 9], dim=1):
            output = sparse(input_ids=part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_ignored(sparse: GptOssForCausalLM, side: str) -> None:
    tokens = _tokens(2, 40)
    rows, mask, positions = _padded(tokens, [0, 17])
    if side == "right":
        rows, mask, positions = rows.flip(0, 1), mask.flip(1).flip(0), torch.arange(40).expand(2, -1)
        rows = torch.stack([torch.cat([tokens[1, :23], tokens[0, :17]]), tokens[0]])
    with torch.inference_mode():
        got = sparse(input_ids=rows, attention_mask=mask, position_ids=positions).logits
        short = sparse(input_ids=tokens[1:, :23]).logits
        padded = got[1, 17:] if side == "left" else got[0, :23]
    torch.testing.assert_close(padded, short[0], rtol=0, atol=1e-11)


def test_packed_records_do_not_see_each_other(sparse: GptOssForCausalLM) -> None:
    lengths = [1, 19, 2, 33]
    records = [_tokens(1, length) for length in lengths]
    with torch.inference_mode():
        packed = sparse(
            input_ids=torch.cat(records, 1),
            position_ids=torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
            cu_seq_lens_q=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
            use_cache=False,
        ).logits
        alone = torch.cat([sparse(input_ids=record).logits for record in records], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-11)


def test_what_would_be_wrong_in_silence_is_refused(sparse: GptOssForCausalLM) -> None:
    tokens = _tokens(1, 12)
    holes = torch.ones_like(tokens)
    holes[0, 5] = 0
    offsets = torch.tensor([0, 5, 12])
    padded = torch.ones_like(tokens)
    padded[0, :2] = 0
    with torch.inference_mode():
        with pytest.raises(ValueError, match="2 separate runs of tokens"):
            sparse(input_ids=tokens, attention_mask=holes)
        with pytest.raises(ValueError, match="a mask of padding"):
            sparse(input_ids=tokens, attention_mask=torch.zeros(1, 1, 12, 12))
        with pytest.raises(ValueError, match="without padding and without a cache, got padding"):
            sparse(input_ids=tokens, attention_mask=padded, cu_seq_lens_q=offsets)
        cache = StaticCache(config=sparse.config, max_cache_len=64)
        with pytest.raises(ValueError, match="a static one"):
            sparse(input_ids=tokens, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="attention_dropout"):
        attention.attention(sparse, *[torch.zeros(1)] * 3, None, scaling=1.0, dropout=0.1, s_aux=torch.zeros(1))


def test_log_sparse_layers_run_on_no_other_attention() -> None:
    config = attention.gpt_oss_config(_sparse_config())
    model = GptOssForCausalLM(config)
    model.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="would run them as full attention"):
        model(input_ids=_tokens(1, 5))
    config = attention.gpt_oss_config(_sparse_config())
    with pytest.raises(ConfigError, match="would run them as full attention"):
        GptOssForCausalLM._from_config(config, attn_implementation="eager")


def test_the_configuration_survives_a_round_trip(tmp_path: Path) -> None:
    config = attention.gpt_oss_config(_sparse_config())
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["layer_types"] == ALL_TYPES
    assert written["log_sparse_pattern"] == PATTERN
    again = attention.gpt_oss_config(written)
    assert again.to_dict() == config.to_dict()
    with pytest.raises(Exception, match="log_sparse_attention"):
        GptOssConfig.from_pretrained(tmp_path)  # transformers alone says no; it does not run full attention.


@pytest.mark.parametrize("pattern", [{"block": 0}, {"blocks": 64}, {"window": 0}])
def test_an_unknown_pattern_is_refused(pattern: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="log_sparse_pattern with block, window and first"):
        attention.gpt_oss_config(_sparse_config(log_sparse_pattern=pattern))


def test_a_base_with_log_sparse_layers_loads_packed_and_trains(write_base: Callable[..., Path]) -> None:
    config = _sparse_config()
    folder = write_base(config=config, tensors=quantise(random_state(_full_twin(config)), config))
    model = load_base(folder)
    assert model.config.log_sparse_layers == [1, 3]
    assert json.loads((folder / "config.json").read_text())["layer_types"] == ALL_TYPES
    adapter = attach(model, adapter_layout(config, targets="attention", rank=8), seed="s", alpha=16.0, rank=8)
    optimiser = torch.optim.Adam(adapter.trained, lr=1e-2)
    # A text in which each token follows from the one 16 before it: four blocks back.
    period = list(range(16))
    random.Random(5).shuffle(period)
    tokens = torch.tensor([period * 4])
    losses = []
    for _ in range(12):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    log_sparse_b = [
        parameter
        for tensor, parameter in zip(adapter.layout.trained(), adapter.trained, strict=True)
        if ".layers.3." in tensor.name
    ]
    assert len(log_sparse_b) == 4
    assert all(bool((parameter != 0).any()) for parameter in log_sparse_b), "q, k, v and o of a log-sparse layer learn"


def test_moe_16e_32k_has_120_billion_parameters_and_fits_the_format() -> None:
    config = presets.preset("moe-16e-32k")
    model = _on_meta(_model_config(config), "dense")
    assert sum(parameter.numel() for parameter in model.parameters()) == 119_991_715_200
    assert config["intermediate_size"] % 32 == 0
    one_group = 36 * 16 * 32 * (3 * 2880 + 2)  # What 32 more columns would add.
    assert abs(119_991_715_200 - 120e9) <= one_group / 2
    assert model.config.log_sparse_layers == list(range(1, 36, 2))
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (16, 4)
    assert model.config.max_position_embeddings == 32768
    assert model.config.rope_parameters["rope_type"] == "default"
