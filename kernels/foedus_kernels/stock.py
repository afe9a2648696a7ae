"""The library's fused attention as a building block: one piece of keys, forward with LSE and backward from (out, LSE).

Attention over several pieces of keys is the pieces' outputs, weighed by their log-sum-exp (LSE)::

    lse' = logaddexp(lse_1, lse_2, ...)      out' = sum_i exp(lse_i - lse') out_i

and the fused backward of *each* piece, called with the whole's (out', lse') instead of its own, yields exactly that
piece's share of the gradients: it computes P = exp(S - lse') and dS = P (dP - rowsum(dOut out')) from what it is given.
An attention sink is a piece with one logit and no value, so sinks, windows, caches and sparse patterns all reduce to
this module. Differentiating through a fused kernel's LSE instead is wrong on back ends that drop its gradient.

On a CPU the kernel is ATen's flash attention, on CUDA its memory-efficient one (which takes masks and float32); both
use memory linear in the sequence. Left to itself, the backward on CUDA splits the keys by how many rows and heads a
call has, and adds the parts to the queries' gradient in the order in which they are done: the same call twice has other
bits, and a row's follow from who else is in the batch. Here it does not split, as under torch's deterministic
algorithms; calls of few rows and heads then fill less of a GPU. Left out: dropout, and masks that differ between rows
or heads.
"""

from __future__ import annotations

import torch

_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_CUDA = torch.ops.aten._scaled_dot_product_efficient_attention
# Not the backward of the same name: that one calls this, and leaves the number of splits to it.
_CUDA_BACKWARD = torch.ops.aten._efficient_attention_backward
_NO_MASK, _CAUSAL = 0, 1  # Its masks: none, and query t sees the keys 0 to t.

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which log-sum-exps are kept: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def band(queries: int, keys: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """The additive mask of queries that are the last of their keys: causal, and no further back than a window.

    Args:
        queries: Tq.
        keys: Tk >= Tq; query t stands at key Tk - Tq + t.
        window: Keys that a query sees, itself included; None sees all earlier ones.
        like: A tensor of the type and place to make it in.

    Returns:
        [Tq, Tk], 0 where a key is seen and -inf elsewhere.
    """
    back = torch.arange(keys - queries, keys, device=like.device).unsqueeze(1) - torch.arange(keys, device=like.device)
    hidden = back < 0 if window is None else (back < 0) | (back >= window)
    return torch.zeros(queries, keys, dtype=like.dtype, device=like.device).masked_fill_(hidden, -float("inf"))


def check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> None:
    """Raise ValueError where the four tensors of an attention do not belong together."""
    fits = (
        q.dim() == k.dim() == 4
        and k.shape == v.shape
        and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
        and q.shape[1] % k.shape[1] == 0
        and sinks.shape == (q.shape[1],)
        and q.dtype == k.dtype == v.dtype
        and 1 <= q.shape[2] <= k.shape[2]
    )
    if not fits:
        raise ValueError(
            "expected q [B, H, Tq, D], k and v [B, Hkv, T, D] of one type, sinks [H], H a multiple of Hkv, Tq <= T, "
            f"got {tuple(q.shape)} {q.dtype}, {tuple(k.shape)} {k.dtype}, {tuple(v.shape)} {v.dtype} and "
            f"{tuple(sinks.shape)}"
        )


def sinks_gradient(sinks: torch.Tensor, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """-sum over rows and queries of exp(sink - lse) (grad . out): [B, H, Tq, D] -> [H]."""
    shares = (sinks.to(lse.dtype).view(1, -1, 1) - lse).exp()  # (B, H, Tq)
    return -(shares * (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)).sum((0, 2)).to(sinks.dtype)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, mask: torch.Tensor | None, causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over one piece of keys, without a sink.

    Args:
        q: [B, H, Tq, D].
        k: [B, Hkv, Tk, D], H a multiple of Hkv.
        v: [B, Hkv, Tk, D].
        scale: Of the products q k.
        mask: Additive [Tq, Tk] in the type of q; every query must see a key.
        causal: Query t sees the keys 0 to t; instead of a mask.

    Returns:
        The output [B, H, Tq, D] and its log-sum-exp [B, H, Tq] (`lse_dtype`).

    Raises:
        ValueError: A device without a fused kernel.
    """
    if q.device.type == "cpu":
        return _CPU(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    _require_cuda(q)
    keys, values = _every_head(k, q.shape[1]), _every_head(v, q.shape[1])
    out, lse, *_ = _CUDA(q, keys, values, _bias(mask, q), True, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]]  # The kernel pads its LSE to multiples of 32.


def attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None,
    causal: bool = False,
) -> Gradients:
    """One piece's share of the gradients of an attention whose whole has this output and log-sum-exp.

    Args:
        grad: Gradient of the whole's output [B, H, Tq, D].
        q, k, v, scale, mask, causal: As they were given to `attend`.
        out: Output of the whole [B, H, Tq, D].
        lse: Log-sum-exp of the whole [B, H, Tq].

    Returns:
        The gradients of q, k and v, in their shapes.
    """
    if q.device.type == "cpu":
        dq, dk, dv = _CPU_BACKWARD(grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
        return dq, dk, dv
    _require_cuda(q)
    return _backward_on_cuda(grad, q, k, v, out, lse, scale, mask, causal)


def _backward_on_cuda(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    causal: bool,
) -> Gradients:
    queries, padded = q.shape[2], -(-q.shape[2] // 32) * 32
    lse = torch.nn.functional.pad(lse, (0, padded - queries), value=float("inf"))
    keys, values = _every_head(k, q.shape[1]), _every_head(v, q.shape[1])
    if grad.stride(3) != 1:  # A sum's gradient is one number, expanded; the kernel takes rows side by side only.
        grad = grad.contiguous()
    seed = torch.zeros((), dtype=torch.int64, device="cpu")  # Of the dropout that there is none of.
    turned = [x.transpose(1, 2) for x in (grad, q, keys, values)]  # (B, T, H, D)
    # In 16 bits the kernel reads `out` by the strides that its own forward gives it, whatever its strides are.
    written = out.transpose(1, 2).contiguous()  # (B, T, H, D)
    dq, dk, dv, _ = _CUDA_BACKWARD(
        *(*turned, _bias(mask, q), written, None, None, queries, k.shape[2], lse, 0.0, seed, seed),
        *(_CAUSAL if causal else _NO_MASK, False),
        scale=scale,
        num_splits_key=1,
    )
    dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    return dq, dk.view(*k.shape[:2], -1, *k.shape[2:]).sum(2), dv.view(*v.shape[:2], -1, *v.shape[2:]).sum(2)


def _require_cuda(q: torch.Tensor) -> None:
    if q.device.type != "cuda":
        raise ValueError(f"expected tensors on a CPU or CUDA device, got {q.device}; use transformers' eager attention")


def _every_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def _bias(mask: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """A mask as the CUDA kernel wants it: expanded, with rows that start at multiples of 16 elements."""
    if mask is None:
        return None
    keys = mask.shape[1]
    aligned = torch.nn.functional.pad(mask, (0, -keys % 16))[:, :keys]
    return aligned.expand(*q.shape[:2], *mask.shape)
