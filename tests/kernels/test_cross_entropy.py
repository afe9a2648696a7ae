"""The head's loss in chunks against the library's on all logits: values, gradients, memory, refusals."""

from __future__ import annotations

import pytest
import torch
from foedus_kernels import cross_entropy
from foedus_kernels.cross_entropy import cross_entropy_forward, cross_entropy_torch
from support.attention import peak_bytes
from torch.nn import functional

V, K = 61, 9


def inputs_of(tokens, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, K, generator=generator, dtype=torch.float64).mul(scale).to(dtype).requires_grad_()
    head = torch.randn(V, K, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, head, torch.randint(0, V, (tokens,), generator=generator)


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 8])
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_values_and_gradients_equal_the_librarys(tokens, rows, monkeypatch) -> None:
    """A row at a time, two (with one left over), all."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", rows * V)
    hidden, head, targets = inputs_of(tokens)
    upstream = torch.linspace(-1.0, 2.0, tokens, dtype=torch.float64)
    want = functional.cross_entropy(hidden @ head.T, targets, reduction="none")
    got = cross_entropy_torch(hidden, head, targets)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(one, hidden, upstream)[0] for one in (got, want))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_in_the_models_types_also_at_large_logits(dtype, tolerance, scale) -> None:
    hidden, head, targets = inputs_of(12, dtype, scale)
    want = functional.cross_entropy((hidden @ head.T).float(), targets, reduction="none")
    got = cross_entropy_torch(hidden, head, targets)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    ours, theirs = (torch.autograd.grad(one.sum(), hidden)[0] for one in (got, want))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


def test_gradcheck(monkeypatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 2 * V)
    hidden, head, targets = inputs_of(5)
    assert torch.autograd.gradcheck(lambda one: cross_entropy_torch(one, head, targets), (hidden,))


def test_never_holds_the_logits() -> None:
    """Of 2,048 rows and 4,096 words in float32: 34 MB of logits. Ours holds a chunk, made and taken to its softmax."""
    tokens, vocabulary, width = 2048, 4096, 16
    hidden = torch.randn(tokens, width).requires_grad_()
    head, targets = torch.randn(vocabulary, width), torch.zeros(tokens, dtype=torch.int64)
    logits = tokens * vocabulary * 4

    def job(loss):
        loss(hidden, head, targets).sum().backward()
        hidden.grad = None

    cross_entropy_chunk = 2 * 64 * vocabulary
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "CHUNK_ELEMENTS", cross_entropy_chunk)
        ours = peak_bytes(lambda: job(cross_entropy_torch))
    theirs = peak_bytes(lambda: job(lambda x, w, t: functional.cross_entropy(x @ w.T, t, reduction="none")))
    assert theirs >= 2 * logits  # the measure sees what it is asked about
    assert ours <= 3 * 4 * cross_entropy_chunk + 8 * hidden.nbytes


def test_without_a_gradient_to_come_none_is_made() -> None:
    hidden, head, targets = inputs_of(6)
    with torch.no_grad():
        assert not cross_entropy_torch(hidden, head, targets).requires_grad
    _, slopes = cross_entropy_forward(hidden.detach(), head, targets, False)
    assert slopes.shape == (0, K)


def test_what_does_not_fit_is_refused() -> None:
    hidden, head, targets = inputs_of(6)
    for wrong in ((hidden, head[:, :5], targets), (hidden.float(), head, targets), (hidden[0], head, targets)):
        with pytest.raises(ValueError, match=r"expected hidden states \(T, K\) and a head"):
            cross_entropy_torch(*wrong)
    for wrong in (targets[:5], targets.int()):
        with pytest.raises(ValueError, match=r"expected int64 targets \(6,\)"):
            cross_entropy_torch(hidden, head, wrong)
    with pytest.raises(ValueError, match="expected a frozen head"):
        cross_entropy_torch(hidden, head.clone().requires_grad_(), targets)


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_the_operator_is_registered_with_fakes(tokens, needs_grad) -> None:
    hidden, head, targets = inputs_of(tokens, torch.float32)
    given = (hidden if needs_grad else hidden.detach(), head, targets, needs_grad)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(cross_entropy_forward, given, test_utils=checks)
