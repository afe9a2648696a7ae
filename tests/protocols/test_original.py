"""OpenAI's configuration in transformers' names and back."""

from __future__ import annotations

import math
from typing import Any

import pytest
from foedus_protocols.errors import CheckpointError
from foedus_protocols.original import is_original, rope_of, to_original, to_released

# The published file of gpt-oss-20b's original/ folder.
PUBLISHED: dict[str, Any] = {
    "num_hidden_layers": 24,
    "num_experts": 32,
    "experts_per_token": 4,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "swiglu_limit": 7.0,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "initial_context_length": 4096,
    "rope_theta": 150000,
    "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1,
    "rope_ntk_beta": 32,
}


def test_the_published_configuration_is_the_20b_preset() -> None:
    from foedus_model import presets

    released = to_released(PUBLISHED)
    preset = presets.preset("gpt-oss-20b")
    assert {name: released[name] for name in preset} == preset
    assert released["bos_token_id"] == 199998


def test_there_and_back_is_the_same() -> None:
    assert to_original(to_released(PUBLISHED)) == PUBLISHED


def test_an_older_file_has_the_programs_limit() -> None:
    older = {name: value for name, value in PUBLISHED.items() if name != "swiglu_limit"}
    assert to_released(older)["swiglu_limit"] == 7.0


def test_positions_that_are_not_stretched_are_plain() -> None:
    plain = to_released(PUBLISHED | {"rope_scaling_factor": 1.0})
    assert plain["rope_parameters"] == {"rope_type": "default", "rope_theta": 150000.0}
    assert plain["max_position_embeddings"] == 4096
    assert to_released(to_original(plain)) == plain


def test_another_vocabulary_has_no_harmony_tokens() -> None:
    ids = to_released(PUBLISHED | {"vocab_size": 512})
    assert [ids[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")] == [None] * 3


def test_whose_names_a_file_has() -> None:
    assert is_original(PUBLISHED)
    assert not is_original(to_released(PUBLISHED))
    assert not is_original({"num_experts": 8, "model_type": "mixtral"})
    assert not is_original({})


def test_rotary_positions_in_either_spelling() -> None:
    newer = to_released(PUBLISHED)["rope_parameters"]
    older = {name: value for name, value in newer.items() if name != "rope_theta"}
    assert rope_of({"rope_scaling": older, "rope_theta": 150000.0}) == newer
    assert rope_of({"rope_scaling": None, "rope_theta": 1e4}) == {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"num_experts": 0},
            "expected num_experts in OpenAI's config.json to be a positive integer up to 1099511627776, got 0",
        ),
        ({"head_dim": 64.0}, "head_dim .* a positive integer up to 1099511627776, got 64.0"),
        ({"vocab_size": True}, "vocab_size .* a positive integer up to 1099511627776, got True"),
        ({"rope_theta": "150000"}, "rope_theta .* a positive number up to 1099511627776, got '150000'"),
        ({"rope_theta": math.nan}, "rope_theta .* a positive number up to 1099511627776, got nan"),
        ({"swiglu_limit": math.inf}, "swiglu_limit .* a positive number up to 1099511627776, got inf"),
        ({"rope_ntk_beta": -1}, "rope_ntk_beta .* a positive number up to 1099511627776, got -1"),
        ({"rope_scaling_factor": 1e308}, "rope_scaling_factor .* got 1e\\+308"),
        ({"num_hidden_layers": 1001}, "num_hidden_layers .* up to 1000, got 1001"),
        ({"num_hidden_layers": None}, "num_hidden_layers .* got None"),
        ({"tied": True}, "expected the fields of OpenAI's config.json, got also tied"),
    ],
)
def test_a_field_that_is_wrong_is_named(change: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        to_released(PUBLISHED | change)


def test_a_missing_field_cannot_be_written() -> None:
    released = to_released(PUBLISHED)
    released.pop("hidden_size")
    with pytest.raises(CheckpointError, match="expected 'hidden_size' in the configuration"):
        to_original(released)
