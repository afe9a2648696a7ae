"""K3 in Triton against its references: ragged segments, bits alone and among others, and kernels with one fault."""

from __future__ import annotations

import itertools

import pytest
import torch
from foedus_kernels import clip, expert_lora
from foedus_kernels.device import clip as device
from foedus_kernels.expert_lora import ExpertLora
from foedus_kernels.experts import Gate, PackedExperts, experts_torch
from foedus_kernels.testing import assert_close
from foedus_kernels.weights import DenseWeights
from support.mutants import mutant

# Segments without rows, of one row, of a whole block of 16, of one more and one less, and of several blocks. A number
# of segments that 2 divides: two units of an expert, and one whole expert without rows.
RAGGED = [0, 1, 17, 3, 0, 0, 16, 40]
# Ranks of 8, 16 and 24 beside widths that fill no tile, on either side; one tile and several; both sides wide; one.
CASES = [
    *((RAGGED, shape) for shape in ((40, 8), (130, 16), (33, 24), (8, 131), (70, 67), (1, 1))),
    *((lengths, (40, 8)) for lengths in ([0, 0], [1, 1], [2, 0], [15, 33])),
]


def rows_of(lengths, shape, place, seed=0):
    where, dtype = place
    generator = torch.Generator().manual_seed(seed + sum(lengths) + shape[0])
    left = torch.randn(sum(lengths), shape[0], generator=generator).to(where, dtype)
    right = torch.randn(sum(lengths), shape[1], generator=generator).to(where, dtype)
    return left, right, torch.tensor([0, *itertools.accumulate(lengths)], device=where)


def factors_of(units, place):
    return torch.linspace(0.9, 0.2, units).to(place[0])


@pytest.mark.parametrize(("lengths", "shape"), CASES, ids=str)
def test_equal_to_the_references(lengths, shape, place, close) -> None:
    left, right, offsets = rows_of(lengths, shape, place)
    gradients = device.unit_gradients(left, right, offsets)
    assert gradients.dtype == left.dtype
    assert_close(gradients, clip.unit_gradients_torch(left, right, offsets), **close, what="gradients")
    norms = device.unit_square_norms(left, right, offsets)
    assert norms.dtype == torch.float64
    want = clip.unit_square_norms_torch(left.float(), right.float(), offsets)
    assert_close(norms, want, max_relative=1e-5, rms=1e-5, what="square norms")
    for units in (1, 2):
        factors = factors_of(units, place)
        got = device.clipped_gradient(left, right, offsets, factors)
        assert got.dtype == left.dtype
        assert_close(got, clip.clipped_gradient_torch(left, right, offsets, factors), **close, what="clipped")
    empty = torch.tensor(lengths) == 0
    assert not gradients.cpu()[empty].any()
    assert not norms.cpu()[empty].any()


def test_a_segments_bits_are_a_function_of_its_own_rows(place) -> None:
    """Alone, first, last, among others of other lengths, and at addresses of other alignments."""
    shape = (70, 24)
    left, right, offsets = rows_of([19], shape, place)
    want = device.unit_gradients(left, right, offsets)[0], device.unit_square_norms(left, right, offsets)[0]
    for before, after in (([], [3]), ([3], []), ([1, 0, 17], [40, 2]), ([16, 16], [1] * 5)):
        others, other_rights, _ = rows_of([sum(before) + sum(after)], shape, place, seed=7)
        first = sum(before)
        wide = torch.cat([others[:first], left, others[first:]])
        narrow = torch.cat([other_rights[:first], right, other_rights[first:]])
        bounds = torch.tensor([0, *itertools.accumulate([*before, 19, *after])], device=place[0])
        assert torch.equal(device.unit_gradients(wide, narrow, bounds)[len(before)], want[0])
        assert torch.equal(device.unit_square_norms(wide, narrow, bounds)[len(before)], want[1])
    for skipped in (1, 3):
        storage = left.new_empty(skipped + left.numel())
        elsewhere = storage[skipped:].view(left.shape).copy_(left)
        assert elsewhere.data_ptr() % 16
        strided = right.new_empty(right.shape[0], 2 * right.shape[1])[:, ::2].copy_(right)
        assert torch.equal(device.unit_gradients(elsewhere, strided, offsets)[0], want[0])
        assert torch.equal(device.unit_square_norms(elsewhere, strided, offsets)[0], want[1])


def test_a_norm_is_that_of_the_gradient_that_is_written(place) -> None:
    left, right, offsets = rows_of([0, 1, 17, 3], (140, 20), place)
    gradients = device.unit_gradients(left.float(), right.float(), offsets).double()
    norms = device.unit_square_norms(left.float(), right.float(), offsets)
    assert_close(norms, gradients.square().sum((1, 2)), max_relative=1e-14, rms=1e-14)


def test_an_experts_bits_do_not_depend_on_other_experts(place) -> None:
    left, right, offsets = rows_of([5, 12, 0, 20, 3, 3], (70, 8), place)
    factors = factors_of(2, place)
    together = device.clipped_gradient(left, right, offsets, factors)
    for expert in range(3):
        start, stop = int(offsets[2 * expert]), int(offsets[2 * expert + 2])
        own = offsets[2 * expert : 2 * expert + 3] - start
        alone = device.clipped_gradient(left[start:stop], right[start:stop], own, factors)
        assert torch.equal(alone[0], together[expert])


@pytest.mark.filterwarnings("ignore:invalid value encountered in")  # The interpreter's, of NumPy.
def test_a_unit_of_factor_zero_takes_no_part_whatever_its_rows_hold(place) -> None:
    """The mechanism drops a unit whose gradient is not finite: it may not spoil the others' sum."""
    left, right, offsets = rows_of([5, 12, 4, 20], (40, 8), place)
    factors = torch.tensor([0.5, 0.0], device=place[0])
    want = device.clipped_gradient(left, right, offsets, factors)
    left[7], right[9], left[22] = torch.nan, torch.inf, -torch.inf  # Of the second unit.
    assert torch.equal(device.clipped_gradient(left, right, offsets, factors), want)
    assert torch.isfinite(clip.clipped_gradient_torch(left, right, offsets, factors)).all()
    norms = device.unit_square_norms(left, right, offsets)
    assert torch.isfinite(norms).tolist() == [True, False, True, False]


def test_the_norm_survives_cancellation(place) -> None:
    """Two rows that cancel to 2^-8 (2^-20 in float32): float32 Gram matrices lose it, and the truth is exact."""
    bits = 20 if place[1] == torch.float32 else 8
    left = torch.stack([torch.full((16,), 1.0), torch.full((16,), -1.0)]).to(*place)
    right = torch.stack([torch.full((16,), 1.0), torch.full((16,), 1.0 - 2.0**-bits)]).to(*place)
    norm = device.unit_square_norms(left, right, torch.tensor([0, 2], device=place[0]))
    assert norm.item() == 16 * 16 * 2.0 ** (-2 * bits)


def test_rows_further_than_32_bits_from_the_first(place, tmp_path) -> None:
    """More than 2^31 elements lie before the segments. On a CPU they are a file that is all holes."""
    where, dtype = place
    width, rank = 128, 16
    rows = 2**31 // width + 40

    def side(name: str, columns: int) -> torch.Tensor:
        if where.type == "cpu":
            whole = torch.from_file(str(tmp_path / name), shared=True, size=rows * columns, dtype=dtype)
        else:
            whole = torch.empty(rows * columns, device=where, dtype=dtype)
        return whole.view(rows, columns)

    left, right = side("left", width), side("right", rank)
    left[-3:], right[-3:], _ = rows_of([3], (width, rank), place)
    far = torch.tensor([rows - 3, rows - 2, rows], device=where)
    near = torch.tensor([0, 1, 3], device=where)
    for operation in (device.unit_gradients, device.unit_square_norms):
        assert torch.equal(operation(left, right, far), operation(left[-3:].clone(), right[-3:].clone(), near))


@pytest.mark.gpu
def test_gradients_of_more_than_2_to_the_31_elements() -> None:
    width, rank, segments = 5760, 16, 23_400
    left = torch.randn(segments, width, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(segments, rank, device="cuda", dtype=torch.bfloat16)
    offsets = torch.arange(segments + 1, device="cuda")
    gradients = device.unit_gradients(left, right, offsets)
    assert gradients.numel() > 2**31
    assert torch.equal(gradients[-1], torch.outer(left[-1].float(), right[-1].float()).bfloat16())


def test_rows_that_offsets_name_beyond_the_last_are_not_read(place) -> None:
    """No value is checked on the host; memory that is not the rows' stays unread all the same."""
    left, right, _ = rows_of([8], (20, 8), place)
    left[5:], right[5:] = torch.nan, torch.nan
    for bounds in ([0, 3, 9], [-4, 3, 2**40], [7, 5, 1]):
        offsets = torch.tensor(bounds, device=place[0])
        assert torch.isfinite(device.unit_gradients(left[:5], right[:5], offsets)).all()
        assert torch.isfinite(device.unit_square_norms(left[:5], right[:5], offsets)).all()
        assert torch.isfinite(device.clipped_gradient(left[:5], right[:5], offsets, factors_of(2, place))).all()


def test_no_value_is_brought_to_the_host(place, monkeypatch) -> None:
    given = (*rows_of([5, 12, 4, 20], (40, 8), place), factors_of(2, place))

    class HostValue(Exception):
        pass

    def refuse(*_: object) -> None:
        raise HostValue

    with monkeypatch.context() as patch:
        for name in ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__index__", "__len__"):
            patch.setattr(torch.Tensor, name, refuse)
        device.unit_gradients(*given[:3])
        device.unit_square_norms(*given[:3])
        device.clipped_gradient(*given)
        with pytest.raises(HostValue):
            clip.unit_gradients_torch(*given[:3])


@pytest.mark.gpu
def test_no_launch_waits_for_the_device() -> None:
    place = torch.device("cuda"), torch.bfloat16
    given = (*rows_of([5, 12, 4, 20], (40, 8), place), factors_of(2, place))
    torch.cuda.set_sync_debug_mode("error")
    try:
        device.unit_gradients(*given[:3])
        device.unit_square_norms(*given[:3])
        device.clipped_gradient(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pairs", [1, 3])
def test_units_of_a_layer_of_experts_get_their_own_gradients(pairs, place, close, monkeypatch) -> None:
    """Through autograd, as training calls it: the experts' backward over device code against over the reference.

    Three experts, one of which nobody is routed to; three units of 4 tokens; a pair each, and one that all share.
    """
    where, dtype = place
    generator = torch.Generator().manual_seed(4)
    count, ins, inner, rank, units, tokens = 3, 32, 24, 8, 3, 4

    def normal(*shape):
        return torch.randn(*shape, generator=generator).mul(0.4).to(where, dtype)

    layer = PackedExperts(
        DenseWeights(normal(count, 2 * inner, ins)),
        normal(count, 2 * inner),
        DenseWeights(normal(count, ins, inner)),
        normal(count, ins),
    )
    shapes = ((rank, ins), (2 * inner, rank), (rank, inner), (ins, rank))
    wide = [normal(pairs, *shape).expand(units, -1, -1, -1).requires_grad_() for shape in shapes]
    hidden, chosen = normal(units * tokens, ins), torch.rand(units * tokens, 2, generator=generator).to(where, dtype)
    ids = torch.randint(0, 2, (units * tokens, 2), generator=generator).mul(2).to(where)  # Never expert 1.

    def gradients():
        out = experts_torch(hidden, ids, chosen, layer, Gate(), ExpertLora(*wide, scale=1.5))
        return torch.autograd.grad(out.float().square().sum(), wide)

    with monkeypatch.context() as patch:
        patch.setattr(expert_lora, "unit_gradients_torch", clip.unit_gradients_torch._init_fn)
        want = gradients()
        patch.setattr(expert_lora, "unit_gradients_torch", device.unit_gradients)
        got = gradients()
    for mine, other in zip(got, want, strict=True):
        assert_close(mine, other, **close)


# --- Kernels with one fault -------------------------------------------------------------------------------------------

# What stands in the source, what is written in its place, and the operations that must then differ.
FAULTS = {
    "a segment starts one row late": (
        "tl.load(offsets_ptr + first), 0)",
        "tl.load(offsets_ptr + first) + 1, 0)",
        "unit_gradients unit_square_norms clipped_gradient",
    ),
    "a segment ends one row late": (
        "tl.load(offsets_ptr + last), rows)",
        "tl.load(offsets_ptr + last) + 1, rows)",
        "unit_gradients unit_square_norms clipped_gradient",
    ),
    "rows past a segment's last are multiplied": (
        "there = row + place < count",
        "there = row + place < count + ROWS",
        "unit_gradients unit_square_norms clipped_gradient",
    ),
    "the last rows of a long segment are left out": (
        "for row in range(0, count, ROWS)",
        "for row in range(0, count // ROWS * ROWS, ROWS)",
        "unit_gradients unit_square_norms clipped_gradient",
    ),
    "the rank's tail is not masked": ("in_there = ins < R ", "in_there = ins < R + INS ", "unit_square_norms"),
    "the width's tail is not masked": ("out_there = outs < N", "out_there = outs < N + OUTS", "unit_square_norms"),
    "every tile reads the first columns": (
        "left_ptr + start * N + place[:, None] * N + outs[None, :]",
        "left_ptr + start * N + place[:, None] * N + (outs - first_out)[None, :]",
        "unit_gradients unit_square_norms clipped_gradient",
    ),
    "the last group of tiles is left out": ("range(GROUPS)", "range(GROUPS - 1)", "unit_square_norms"),
    "the neighbouring unit's factor": (
        "segment.remainder_(units)",
        "segment.add_(1).remainder_(units)",
        "clipped_gradient",
    ),
    "rows are not scaled": ("left.to(tl.float32) * factors[:, None]", "left.to(tl.float32)", "clipped_gradient"),
}


@pytest.mark.filterwarnings("ignore:.*encountered in")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_the_comparison(fault, place, close, tmp_path) -> None:
    old, new, differing = FAULTS[fault]
    wrong = mutant(device, old, new, tmp_path)
    # Rows of a longer buffer, which a kernel may then read past their end.
    left, right, _ = rows_of([60], (600, 24), place)
    left, right, offsets = left[:27], right[:27], torch.tensor([0, 2, 7, 24, 27], device=place[0])
    factors = factors_of(2, place)
    found = []
    for name, given in (
        ("unit_gradients", (left, right, offsets)),
        ("unit_square_norms", (left, right, offsets)),
        ("clipped_gradient", (left, right, offsets, factors)),
    ):
        want = getattr(clip, f"{name}_torch")(*given)
        assert_close(getattr(device, name)(*given), want, **close)
        try:
            assert_close(getattr(wrong, name)(*given), want, **close)
        except AssertionError:
            found.append(name)
    assert found == differing.split()


@pytest.mark.parametrize("operation", ["unit_gradients", "unit_square_norms"])
@pytest.mark.parametrize("fault", ["rows in another order", "a boundary one row off"])
def test_wrong_arguments_fail_the_comparison(operation, fault, place, close) -> None:
    left, right, offsets = rows_of([2, 5, 17, 3], (40, 8), place)
    want = getattr(clip, f"{operation}_torch")(left, right, offsets)
    if fault == "rows in another order":
        order = torch.arange(left.shape[0] - 1, -1, -1, device=place[0])
        left, right = left[order], right[order]
    else:
        offsets = offsets + torch.tensor([0, 0, 1, 0, 0], device=place[0])
    with pytest.raises(AssertionError, match="largest error"):
        assert_close(getattr(device, operation)(left, right, offsets), want, **close)


# --- Refusals and dispatch --------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(place, monkeypatch) -> None:
    left, right, offsets = rows_of([2, 3], (4, 3), place)
    meta = torch.empty(5, 3, dtype=left.dtype, device="meta")
    for given, text in (
        ((left[:4], right, offsets), r"expected rows \(M, N\) and \(M, R\)"),
        ((left.half(), right.half(), offsets), "float32 or bfloat16, got torch.float16"),
        ((left.double(), right.double(), offsets), "float32 or bfloat16, got torch.float64"),
        ((left, right, offsets.int()), r"expected int64 offsets \(S \+ 1,\)"),
        ((left, meta, offsets), "on one device"),
    ):
        for operation in (device.unit_gradients, device.unit_square_norms):
            with pytest.raises(ValueError, match=text):
                operation(*given)
        with pytest.raises(ValueError, match=text):
            device.clipped_gradient(*given, factors_of(2, place))
    for wrong in (torch.ones(3), torch.ones(2, 1), torch.ones(0)):
        with pytest.raises(ValueError, match="factors"):
            device.clipped_gradient(left, right, offsets, wrong.to(place[0]))
    with pytest.raises(ValueError, match="expected factors beside the rows"):
        device.clipped_gradient(left, right, offsets, torch.ones(2, device="meta"))
    for limit, text in (("_MOST_ROWS", "at most 1 rows, got 5"), ("_MOST_PROGRAMS", "at most 1 programs")):
        with monkeypatch.context() as patch:
            patch.setattr(device, limit, 1)
            with pytest.raises(ValueError, match=text):
                device.unit_square_norms(left, right, offsets)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_operators_run_device_code_on_cuda_and_the_reference_in_float64(dtype) -> None:
    left, right, offsets = rows_of([2, 5, 17, 3], (40, 8), (torch.device("cuda"), dtype))
    factors = factors_of(2, (left.device, dtype))
    pairs = (
        (clip.unit_gradients_torch, device.unit_gradients, (left, right, offsets)),
        (clip.unit_square_norms_torch, device.unit_square_norms, (left, right, offsets)),
        (clip.clipped_gradient_torch, device.clipped_gradient, (left, right, offsets, factors)),
    )
    for operator, launcher, given in pairs:
        if dtype != torch.float64:
            assert torch.equal(operator(*given), launcher(*given))
        else:
            want = operator(*(one.cpu() for one in given))
            assert_close(operator(*given), want, max_relative=1e-12, rms=1e-12)
