"""Several units in one forward: the bits of each alone, or one unit a forward."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from foedus_client import checks, packed, training
from foedus_client.packed import Packing, packed_gradients, packing_for
from foedus_client.privacy import StepTerms
from foedus_client.synthetic import SyntheticRecord, SyntheticUnit
from foedus_kernels.backend import interpreting
from foedus_model.adapter import AttachedAdapter, attach
from foedus_model.experts import choose_path
from foedus_protocols.errors import PrivacyCheckFailed
from foedus_protocols.layout import adapter_layout
from support.interpreted import sum_rows_alone
from support.quantised import VOCABULARY, small_model

TOKENS = 32
TERMS = StepTerms(l2_clip_norm=0.5, noise_multiplier=1.0, sampling_prob=1.0, expected_units=4.0, max_records_per_unit=2)
OPEN = replace(TERMS, noise_multiplier=0.0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["attention", "experts-shared", "experts"])
def adapter(request: pytest.FixtureRequest) -> AttachedAdapter:
    return adapted(request.param)


@pytest.fixture
def attention() -> AttachedAdapter:
    return adapted("attention")


def adapted(targets: str) -> AttachedAdapter:
    model = small_model("mxfp4")
    layout = adapter_layout(model.config.to_dict(), rank=4, train="both", targets=targets)
    attached = attach(model, layout, seed="public", alpha=8.0, rank=4)
    attached.load_vector((np.random.default_rng(5).normal(size=layout.length) * 0.1).astype(np.float32))
    return attached


def records(count: int, length: int = TOKENS, seed: int = 3) -> list[SyntheticRecord]:
    rng = np.random.default_rng(seed)
    words = rng.integers(0, VOCABULARY, (count, length)).astype(np.int32)
    return [SyntheticRecord(tokens=row, loss_mask=np.arange(length) >= 1 + 7 * i) for i, row in enumerate(words)]


def same_bits(adapter: AttachedAdapter, length: int = TOKENS) -> bool:
    """Whether units have the same gradients alone and together here: a property of the processor and its library."""
    some = [one for seed in range(4) for one in records(3, length, seed=seed)]
    together = packed_gradients(adapter, some)
    return all(
        np.array_equal(packed_gradients(adapter, [one])[0], row) for one, row in zip(some, together, strict=True)
    )


@pytest.mark.usefixtures("one_thread")
def test_what_was_allowed_has_the_same_bits_with_anybody(adapter: AttachedAdapter) -> None:
    """One thread of AVX2 keeps a row's bits from 16 rows on; where a processor does not, packing is refused."""
    before = adapter.vector()
    packing = packing_for(adapter, units=3, max_tokens=TOKENS)
    assert np.array_equal(adapter.vector(), before), "the run's adapter is put back"
    if packing is None:
        assert not same_bits(adapter), "refused, although a unit's bits did not depend on the others"
        return
    assert packing.lengths <= {16, 24, 32}
    for length in packing.lengths:
        some = records(3, length, seed=length)
        alone = [packing.gradients(adapter, [one])[0] for one in some]
        for chosen in ([0, 1, 2], [2, 0], [1, 2], [1, 1, 1]):
            together = packing.gradients(adapter, [some[index] for index in chosen])
            assert [row.tobytes() for row in together] == [alone[index].tobytes() for index in chosen]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("targets", ["experts-shared", "experts"])
def test_experts_rows_that_are_not_padded_are_seen(
    targets: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An expert's few rows sum in another order than many: the packing's own multiple of 16 is what it rests on."""
    tried = {"units": 3, "max_tokens": 16, "rng": np.random.default_rng(11).bytes}
    monkeypatch.setattr(packed, "_ROW_MULTIPLE", 1)
    differ = not same_bits(adapted(targets), length=16)
    with caplog.at_level(logging.INFO, "foedus.client"):
        refused = packing_for(adapted(targets), **tried) is None
    assert refused or not differ, "allowed, although a unit's bits depended on the others"
    assert refused == ("other bits alone than among" in caplog.text)


@pytest.mark.usefixtures("one_thread")
def test_through_the_kernels_too_a_units_bits_do_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole forward and backward of a model, its experts by the device code, interpreted."""
    if not interpreting():
        pytest.skip("a CUDA device is here, and nothing is interpreted")
    sum_rows_alone(monkeypatch)
    adapter = adapted("experts")
    some = records(2, 16, seed=16)
    decoded = packed_gradients(adapter, some)
    choose_path(adapter.model, rows=2 * 16, wanted="fused", interpreted=True)
    together = packed_gradients(adapter, some)
    assert not np.array_equal(together, decoded), "another path ran"
    np.testing.assert_allclose(together, decoded, rtol=0, atol=1e-5 * np.abs(decoded).max())
    if not same_bits(adapted("experts"), length=16):
        return  # This processor's own library gives a row other bits among others: packing is refused.
    for one, row in zip(some, together, strict=True):
        assert packed_gradients(adapter, [one])[0].tobytes() == row.tobytes()
    assert packed_gradients(adapter, some[::-1])[0].tobytes() == together[1].tobytes()


def test_the_model_is_as_it_was_after_a_packed_backward(adapter: AttachedAdapter) -> None:
    record = records(1)[0]
    before = training.unit_gradient(adapter, [record])
    packed_gradients(adapter, records(2))
    assert np.array_equal(training.unit_gradient(adapter, [record]), before)
    assert not any("forward" in vars(module) for module in adapter.model.modules())
    assert all(getattr(module, "row_multiple", 1) == 1 for module in adapter.model.modules())


def test_a_unit_that_is_not_finite_leaves_the_others_bits(adapter: AttachedAdapter) -> None:
    some = records(3)
    adapter.model.model.embed_tokens.weight.data[7] = torch.nan
    for one in (some[0], some[2]):
        one.tokens[one.tokens == 7] = 8
    some[1].tokens[5] = 7
    rows = packed_gradients(adapter, some)
    assert np.isnan(rows[1]).any()
    some[1].tokens[:] = some[1].tokens[0] % 7
    others = packed_gradients(adapter, some)
    assert np.array_equal(rows[[0, 2]], others[[0, 2]])
    assert np.isfinite(rows[[0, 2]]).all()


def test_a_neighbours_rounding_error_is_seen(
    attention: AttachedAdapter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = packed.unit_gradients_torch

    def coupled(left: torch.Tensor, right: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        found = own(left, right, edges)
        return found + 1e-7 * (found.sum(0, keepdim=True) - found)

    monkeypatch.setattr(packed, "unit_gradients_torch", coupled)
    rng = np.random.default_rng(4).bytes  # Of 40 random draws 3 round to the same grid points.
    assert packing_for(attention, units=3, max_tokens=16, rng=rng) is None
    assert "one unit a forward" in caplog.text
    forced = Packing(units=3, lengths=frozenset({16}))
    fine = replace(OPEN, l2_clip_norm=10.0)  # Above the gradients, on a grid that shows an error of this size.
    with pytest.raises(PrivacyCheckFailed, match="other change"):
        checks._packed_move(attention, fine, forced, rng)


def test_another_gradient_than_one_unit_a_forward_is_not_taken(
    attention: AttachedAdapter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packed, "unit_gradient", lambda *args: 1.001 * training.unit_gradient(*args))
    with caplog.at_level(logging.INFO, "foedus.client"):
        assert packing_for(attention, units=2, max_tokens=16) is None
    assert "another gradient than one unit a forward" in caplog.text


def test_matrices_that_are_not_known_are_not_packed(
    attention: AttachedAdapter, caplog: pytest.LogCaptureFixture
) -> None:
    norm = attention.model.model.norm.weight.requires_grad_(True)
    attention.trained.append(norm)
    with caplog.at_level(logging.INFO, "foedus.client"):
        assert packing_for(attention, units=2, max_tokens=16) is None
    assert "got 1 others" in caplog.text


def test_short_records_are_not_tried(attention: AttachedAdapter) -> None:
    assert packing_for(attention, units=2, max_tokens=15) is None


def test_the_path_is_a_function_of_the_unit_alone(attention: AttachedAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, among one's like and among others: always the packed path, in groups of at most `units`."""
    packing = Packing(units=2, lengths=frozenset({16}))
    silent = SyntheticRecord(tokens=np.arange(16, dtype=np.int32), loss_mask=np.arange(16) < 1)
    assert packing.takes(records(1, 16))
    assert not packing.takes(records(1, 17))
    assert not packing.takes(records(2, 16))
    assert not packing.takes([silent])
    groups: list[int] = []
    monkeypatch.setattr(
        packed, "packed_gradients", lambda adapter, some: groups.append(len(some)) or packed_rows(adapter, some)
    )
    singles: list[int] = []
    monkeypatch.setattr(
        training, "unit_gradient", lambda adapter, some: singles.append(len(some)) or packed_rows(adapter, some)[0]
    )
    some = [SyntheticUnit(records=[one]) for one in [*records(3, 16), *records(1, 17), silent]]
    noise = training.noise_table(TERMS, training.vector_length(attention))
    result = training.private_vector(
        attention,
        [*some, SyntheticUnit(records=records(2, 16))],
        terms=TERMS,
        rng=os.urandom,
        noise=noise,
        packing=packing,
    )
    assert (groups, singles, result.sampled_units) == ([2, 1], [1, 1, 2], 6)
    groups.clear()
    training.private_vector(attention, some, terms=OPEN, rng=os.urandom, noise=None, packing=packing)
    assert groups == [], "mode none takes one unit a forward"


def packed_rows(adapter: AttachedAdapter, some: list[SyntheticRecord]) -> np.ndarray:
    return np.ones((len(some), training.vector_length(adapter)), np.float32)


def test_records_that_do_not_fit_together_are_refused(attention: AttachedAdapter) -> None:
    with pytest.raises(ValueError, match="one length"):
        packed_gradients(attention, [*records(1, 16), *records(1, 17)])
