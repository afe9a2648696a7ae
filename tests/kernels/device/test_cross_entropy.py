"""The loss without logits where the model runs: against the CPU's float32, and never all logits at once."""

from __future__ import annotations

import pytest
import torch
from foedus_kernels import cross_entropy
from foedus_kernels.cross_entropy import cross_entropy_torch
from foedus_kernels.testing import assert_close


def test_equals_the_cpu(place, close, monkeypatch) -> None:
    """A few rows a chunk, with some left over."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 3 * 131)
    generator = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(10, 32, generator=generator), torch.randn(131, 32, generator=generator)
    targets = torch.randint(0, 131, (10,), generator=generator)
    results = []
    rounded = [x.to(place[1]) for x in (hidden, head)]
    for device, dtype in (place, (torch.device("cpu"), torch.float32)):
        rows, matrix = (x.to(device, dtype) for x in rounded)
        rows.requires_grad_()
        losses = cross_entropy_torch(rows, matrix, targets.to(device))
        results.append((losses, torch.autograd.grad(losses.sum(), rows)[0]))
    for name, got, want in zip(["losses", "hidden"], *results, strict=True):
        assert_close(got, want, **close, what=name)


@pytest.mark.gpu
def test_the_whole_vocabulary_is_never_held() -> None:
    """Of 2,048 rows and 201,088 words: 0.82 GB of logits in bfloat16 alone; a chunk is 67 MB in float32."""
    tokens, words, width = 2048, 201_088, 2880
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    head = torch.randn(words, width, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, words, (tokens,), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cross_entropy_torch(hidden, head, targets).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 6 * 4 * cross_entropy.CHUNK_ELEMENTS
    assert torch.isfinite(hidden.grad).all()
