"""The step on the sum: the same bits everywhere, and Flower's arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp import strategy
from foedus_protocols import codec, rotation, rules
from foedus_protocols.errors import ConfigError, VerificationError
from foedus_protocols.layout import Vector, vector_digest
from foedus_protocols.rules import Rule, advance, initial_state, mean_of_sum
from numpy.typing import NDArray
from support.coded import decode_sum
from support.replayed import RoundSum, replay

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "rules.json").read_text(encoding="utf-8"))

LENGTH = 257
ROUNDS = 6


def gradients() -> list[Vector]:
    return [np.random.default_rng(seed).standard_normal(LENGTH).astype(np.float32) for seed in range(ROUNDS)]


def start() -> Vector:
    return np.random.default_rng(99).standard_normal(LENGTH).astype(np.float32)


def trajectory(rule: Rule) -> list[Vector]:
    adapter, state, path = start(), initial_state(rule, LENGTH), []
    for g in gradients():
        adapter, state = advance(adapter, g, rule=rule, state=state)
        path.append(adapter)
    return path


def case_words(case: dict[str, Any], number: int, count: int) -> NDArray[np.int64]:
    """Round sums by a formula that any language can repeat: see "words" in the vector file."""
    index = np.arange(count, dtype=np.uint64) + np.uint64(number * count + 1)
    return (((index * np.uint64(2654435761)) % np.uint64(1 << 32)) >> np.uint64(20)).astype(np.int64) - 2048


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["name"])
def test_checked_in_outcomes(case: dict[str, Any]) -> None:
    """A change of any of these digests is a change of the protocol: every party would get another adapter."""
    coding = codec.Coding(**case["coding"])
    rule = Rule(**case["rule"])
    adapter = np.resize(np.array(case["adapter"], dtype=np.float32), coding.length)
    sums = [
        RoundSum(
            words=case_words(case, number, coding.padded),
            weights=weights,
            key=codec.coding_key(case["charter"], case["run"], number, case["phase"]),
        )
        for number, weights in enumerate(case["weights"], start=1)
    ]
    decoded = decode_sum(sums[0].words, coding=coding, key=sums[0].key)
    assert vector_digest(decoded) == case["expected"]["decoded_sum_1"]
    found = []
    state = initial_state(rule, coding.length)
    for closed in sums:
        adapter, state = replay(adapter, [closed], coding=coding, rule=rule, state=state)
        found.append(vector_digest(adapter))
    assert found == case["expected"]["adapters"]


def flower_trajectory(server: Any, first_round: int) -> list[Vector]:
    """Run Flower's own strategy class on replies that moved each coordinate by minus the gradient."""
    metadata = Metadata(
        run_id=1,
        message_id="",
        src_node_id=1,
        dst_node_id=0,
        reply_to_message_id="",
        group_id="",
        created_at=0.0,
        ttl=1.0,
        message_type="train",
    )
    adapter, path = start().astype(np.float64), []
    for number, g in enumerate(gradients(), start=first_round):
        server.current_arrays = _flower_arrays(server, adapter)
        content = RecordDict(
            {
                "arrays": ArrayRecord({"a": Array(adapter - g)}),
                "metrics": MetricRecord({"num-examples": 1}),
            }
        )
        arrays, _ = server.aggregate_train(number, [Message(content, metadata=metadata)])
        adapter = arrays["a"].numpy()
        path.append(adapter)
    return path


def _flower_arrays(server: Any, adapter: NDArray[np.float64]) -> Any:
    """What the class keeps between rounds: a record in FedAvgM, a dictionary in FedOpt's family."""
    if isinstance(server, strategy.FedAvgM):
        return ArrayRecord({"a": Array(adapter)})
    return {"a": adapter}


def test_adam_is_flowers_fedadam() -> None:
    """FedAdam's bias correction counts rounds from 0, so it is given each round's number less one."""
    theirs = flower_trajectory(strategy.FedAdam(eta=0.01, beta_1=0.9, beta_2=0.99, tau=1e-12), first_round=0)
    for ours, reference in zip(trajectory(Rule(epsilon=1e-12)), theirs, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-6)


def test_sgd_is_flowers_fedavgm() -> None:
    theirs = flower_trajectory(strategy.FedAvgM(server_learning_rate=0.3, server_momentum=0.9), first_round=1)
    for ours, reference in zip(trajectory(Rule(name="sgd", rate=0.3, momentum=0.9)), theirs, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=0, atol=5e-6)


def test_adambc_with_vanishing_noise_is_flowers_fedadam() -> None:
    theirs = flower_trajectory(strategy.FedAdam(eta=0.01, beta_1=0.9, beta_2=0.99, tau=0.0), first_round=0)
    for ours, reference in zip(trajectory(Rule(name="adambc", noise_variance=1e-20)), theirs, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-6)


def test_adambc_takes_the_noise_off_the_second_moment() -> None:
    """The paper's formula in double precision, with the floor that a noise-dominated coordinate needs."""
    noise = 0.8
    adapter, m, v = start().astype(np.float64), np.zeros(LENGTH), np.zeros(LENGTH)
    floored = 0
    for number, (g, ours) in enumerate(
        zip(gradients(), trajectory(Rule(name="adambc", noise_variance=noise)), strict=True), start=1
    ):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g.astype(np.float64) ** 2
        corrected = v / (1 - 0.99**number) - noise
        floored += int(np.sum(corrected < noise))
        adapter = adapter - 0.01 * (m / (1 - 0.9**number)) / np.sqrt(np.maximum(corrected, noise))
        np.testing.assert_allclose(ours, adapter, rtol=0, atol=1e-6)
    assert 0 < floored < ROUNDS * LENGTH


def test_the_step_goes_against_the_gradient() -> None:
    g = np.array([1.0, -1.0, 0.0], dtype=np.float32)
    for rule in (Rule(), Rule(name="sgd"), Rule(name="adambc", noise_variance=1e-3)):
        after, _ = advance(np.zeros(3, dtype=np.float32), g, rule=rule, state=initial_state(rule, 3))
        assert np.sign(after).tolist() == [-1, 1, 0]


def test_inputs_are_left_alone_and_everything_stays_fp32() -> None:
    for rule in (Rule(), Rule(name="sgd", momentum=0.5), Rule(name="adambc", noise_variance=0.1)):
        adapter, g, state = start(), gradients()[0], initial_state(rule, LENGTH)
        after, following = advance(adapter, g, rule=rule, state=state)
        assert np.array_equal(adapter, start())
        assert np.array_equal(g, gradients()[0])
        assert not state.first.any()
        assert (state.step, following.step) == (0, 1)
        assert {after.dtype, following.first.dtype, following.second.dtype} == {np.dtype(np.float32)}


@pytest.mark.parametrize("length", [1, rotation.CHUNK, rotation.CHUNK + 1, 3 * rotation.CHUNK])
def test_a_step_in_place_and_piece_by_piece_gives_the_same_bits(length: int) -> None:
    rng = np.random.default_rng(length)
    for rule in (Rule(), Rule(name="sgd", momentum=0.5), Rule(name="adambc", noise_variance=0.1)):
        adapter, state = rng.standard_normal(length).astype(np.float32), initial_state(rule, length)
        again, kept = adapter.copy(), initial_state(rule, length)
        for _ in range(2):
            g = rng.standard_normal(length).astype(np.float32)
            whole, moments = rules._STEPS[rule.name](g, rule, state)
            adapter, state = adapter - whole, moments
            before = again
            again, kept = advance(again, g, rule=rule, state=kept, in_place=True)
            assert again is before
            assert again.tobytes() == adapter.tobytes()
            assert (kept.step, kept.first.tobytes(), kept.second.tobytes()) == (
                state.step,
                state.first.tobytes(),
                state.second.tobytes(),
            )


def test_mean_of_sum_divides_by_the_survivors_weights_in_any_order() -> None:
    weights = [0.1, 0.2, 0.7, 1.0]
    decoded = np.full(5, 3.0, dtype=np.float32)
    assert mean_of_sum(decoded, weights).tolist() == [1.5] * 5
    awkward = [1.0, 1e-9, 0.3, 1e-9, 1e-9]
    assert np.array_equal(mean_of_sum(decoded, awkward), mean_of_sum(decoded, sorted(awkward)))


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [1.0, -1.0], [math.nan]])
def test_weights_are_positive(weights: list[float]) -> None:
    with pytest.raises(VerificationError, match="positive weight"):
        mean_of_sum(np.zeros(2, dtype=np.float32), weights)


def test_replay_from_the_start_equals_advancing_round_by_round() -> None:
    coding = codec.Coding(length=LENGTH, ring_bits=20, update_bound=2.0, members=2)
    rule = Rule(rate=0.02)

    def closed(number: int) -> RoundSum:
        words = np.random.default_rng(number).integers(-1000, 1000, coding.padded)
        return RoundSum(words=words, weights=[1.0, 0.5][:number], key=codec.coding_key("a" * 64, "r", number))

    whole, final = replay(start(), (closed(number) for number in (1, 2)), coding=coding, rule=rule)
    middle, state = replay(start(), [closed(1)], coding=coding, rule=rule)
    end, _ = replay(middle, [closed(2)], coding=coding, rule=rule, state=state)
    assert vector_digest(whole) == vector_digest(end)
    assert final.step == 2
    assert vector_digest(whole) != vector_digest(middle)


def test_noise_variance_is_that_of_the_weighted_mean() -> None:
    """By hand: noise of v is noise_multiplier / expected_units a coordinate; weights 3 and 1 over their sum."""
    parties = [(3.0, 64.0, 0.5), (1.0, 32.0, 2.0)]
    expected = (0.75 * 0.5 / 64) ** 2 + (0.25 * 2.0 / 32) ** 2
    assert rules.noise_variance(parties) == pytest.approx(expected)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "lion"},
        {"rate": 0.0},
        {"rate": math.inf},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"momentum": 1.0},
        {"epsilon": 0.0},
        {"epsilon": 1e-60},
        {"epsilon": 1e60},
        {"name": "adambc"},
        {"name": "adambc", "noise_variance": 1e-60},
    ],
)
def test_a_rule_that_cannot_step_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        Rule(**change)


@pytest.mark.parametrize("wrong", [lambda g: g[:-1], lambda g: g.astype(np.float64)])
def test_another_length_or_type_is_refused(wrong: Callable[[Vector], Vector]) -> None:
    with pytest.raises(VerificationError, match="float32 gradient"):
        advance(start(), wrong(gradients()[0]), rule=Rule(), state=initial_state(Rule(), LENGTH))
