"""Several units in one forward, each with the gradient that it has alone, to the bit: for units of one record and one
length.

What a forward and a backward cost besides arithmetic (decoding experts, reading weights, starting kernels) is then
shared. Each trained matrix stands in for U equal ones, one a unit, so that autograd returns every unit's own gradient;
weight gradients are products of a unit's own rows (`foedus_kernels.clip`), experts see rows padded to multiples of 16,
and each unit's logits and loss are calls of their own. The frozen products in between are the library's, over the rows
of all units. Whether a row's bits depend there on the other rows is a property of the library, the machine and the
number of threads: `packing_for` tries it, and gives nothing where they do.

A unit's arithmetic must not depend on who else was sampled. So whether a unit is packed is a function of its own
record, and a unit that may be packed takes this path also where it is alone. Mode `none`, whose bits are replayed,
never packs. Units of unlike length in one forward are left out: padding changes a unit's bits.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from foedus_kernels.clip import unit_gradients_torch
from foedus_kernels.cross_entropy import cross_entropy_torch
from foedus_kernels.expert_lora import ExpertLora
from foedus_model.experts import RoutedExperts
from foedus_model.loss import Record, batch_of
from numpy.typing import NDArray
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from foedus_client.noise import RandomBytes
from foedus_client.synthetic import SyntheticRecord, synthetic_record
from foedus_client.training import Adapter, unit_gradient

_LOG = logging.getLogger("foedus.client")

_ROW_MULTIPLE = 16  # Of an expert's rows: a CPU's product of fewer sums in another order.
_SHORTEST = 16  # Tokens.
_FRACTIONS = 4  # Lengths that are tried: max_tokens and its first three quarters.
_AGREE = 1e-4  # Of the gradient's norm, beside one unit a forward: another order of sums, nothing else.


@dataclass(frozen=True, kw_only=True)
class Packing:
    """What `packing_for` found to be equal to the bit here.

    Attributes:
        units: Units of one forward, at most.
        lengths: Tokens of a record.
    """

    units: int
    lengths: frozenset[int]

    def takes(self, records: Sequence[Record]) -> bool:
        """Whether a unit with these records takes this path, alone or not: a function of the unit alone."""
        return len(records) == 1 and len(records[0].tokens) in self.lengths and bool(records[0].loss_mask[1:].any())

    def gradients(self, adapter: Adapter, records: Sequence[Record]) -> NDArray[np.float32]:
        """The gradient of each unit's loss, one record a unit, all of one length.  # float32 (U, d)"""
        return packed_gradients(adapter, records)


def packed_gradients(adapter: Adapter, records: Sequence[Record]) -> NDArray[np.float32]:
    """`training.unit_gradient` of each of U units of one record and one length, with an answer token each.

    Raises:
        ValueError: Records of unlike length, or without an answer token.
    """
    if len({len(record.tokens) for record in records}) != 1 or not all(one.loss_mask[1:].any() for one in records):
        raise ValueError("expected records of one length with answer tokens: train others one unit a forward")
    batch = batch_of(records, adapter.trained[0].device)
    if batch is None:
        raise ValueError("expected records of two tokens and more: they have no loss")
    with _per_unit(adapter, len(records)) as leaves:
        hidden = adapter.model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state  # (U, T, K)
        losses = [
            cross_entropy_torch(states[:-1][answers], adapter.model.lm_head.weight, tokens[1:][answers]).mean()
            for states, answers, tokens in zip(hidden.unbind(), batch.answers, batch.tokens, strict=True)
        ]
        found = torch.autograd.grad(torch.stack(losses).sum(), leaves)
    return torch.cat([gradient.flatten(1).float() for gradient in found], dim=1).cpu().numpy()


@contextmanager
def _per_unit(adapter: Adapter, units: int) -> Iterator[list[torch.Tensor]]:
    """Let each trained matrix stand for one a unit, until the backward is done; gives them in the vector's order.

    Raises:
        ValueError: A trained matrix is not part of a linear layer or of a layer's expert pairs.
    """
    leaves = {id(one): one.detach().expand(units, *one.shape).requires_grad_() for one in adapter.trained}
    placed: set[int] = set()
    with ExitStack() as stack:

        def replace(module: nn.Module, forward: Callable[..., Any]) -> None:
            module.forward = forward
            stack.callback(delattr, module, "forward")
            placed.update(id(one) for one in module.parameters(recurse=False))

        for module in adapter.model.modules():
            if isinstance(module, RoutedExperts):
                module.row_multiple = _ROW_MULTIPLE
                stack.callback(setattr, module, "row_multiple", 1)
                if module.lora is not None:
                    replace(module.lora, _pairs(module.lora, leaves, units))
            elif isinstance(module, nn.Linear) and module.bias is None and id(module.weight) in leaves:
                replace(module, partial(_UnitLinear.apply, leaves[id(module.weight)]))
        strangers = len(leaves.keys() - placed)
        if strangers:
            raise ValueError(f"expected matrices of linear layers and experts' pairs, got {strangers} others")
        yield [leaves[id(parameter)] for parameter in adapter.trained]


def _pairs(module: nn.Module, leaves: dict[int, torch.Tensor], units: int) -> Callable[[], ExpertLora]:
    """A layer's expert pairs with an axis of units: (U, P, R, in), (U, P, out, R)."""
    stacked = {
        name: leaves.get(id(one), one.detach().expand(units, *one.shape)) for name, one in module.named_parameters()
    }
    pairs: ExpertLora = functional_call(module, stacked)
    return lambda: pairs


class _UnitLinear(torch.autograd.Function):
    """``x W^T`` with one matrix for all units forward, and a gradient of each unit's own backward."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """weights [U, N, K], all equal; inputs [U, T, K] -> [U, T, N]."""
        ctx.save_for_backward(weights, inputs)
        return F.linear(inputs, weights[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A unit's matrix gradient is a product of its own rows."""
        weights, inputs = ctx.saved_tensors
        units, tokens = inputs.shape[:2]
        edges = torch.arange(units + 1, device=grad.device) * tokens
        own = unit_gradients_torch(grad.flatten(0, 1), inputs.flatten(0, 1), edges)  # (U, N, K)
        return own, grad @ weights[0] if ctx.needs_input_grad[1] else None


def packing_for(adapter: Adapter, *, units: int, max_tokens: int, rng: RandomBytes = os.urandom) -> Packing | None:
    """Try whether a unit has the same bits alone and in any batch, on this machine, in this process.

    For each of some lengths, units of random tokens (one repeats a single token, so that its rows crowd into a few
    experts; one has a single answer token) go through forward and backward alone, together, in reversed order, and in
    batches of every smaller number, with a random non-zero adapter. Gradients must be equal to the bit. A length where
    one is not, or is further than 1e-4 from one unit a forward, is not packed.

    Args:
        adapter: As the run attached it; its vector is put back.
        units: Units of one forward, at most.
        max_tokens: Tokens of a record of the run, at most: a constant of the charter.
        rng: Makes the tokens and the adapter. No record is looked at.

    Returns:
        What may be packed in a private run; None, and a line in the log, where nothing may.

    Guarantees:
        None beyond what was tried: it is evidence about the library's products and no proof. That a unit's matrix
        gradients, logits and loss are functions of its own rows does not rest on it.
    """
    fractions = {max_tokens * part // _FRACTIONS for part in range(1, _FRACTIONS + 1)}
    lengths = sorted(length for length in fractions if length >= _SHORTEST)
    with _random_adapter(adapter, rng):
        troubles = {length: _trouble(adapter, units, length, rng) for length in lengths}
    equal = frozenset(length for length, trouble in troubles.items() if trouble is None)
    for length, trouble in troubles.items():
        _LOG.info(
            "units of %d tokens, %d a forward: %s", length, units, trouble or "the same bits alone and in a batch"
        )
    if not equal:
        _LOG.warning("one unit a forward: nothing that was tried had the same bits alone and in a batch")
        return None
    return Packing(units=units, lengths=equal)


def _trouble(adapter: Adapter, units: int, length: int, rng: RandomBytes) -> str | None:
    """What speaks against packing units of a length, or None."""
    records = _records(int(adapter.model.config.vocab_size), units, length, rng)
    try:
        alone = [packed_gradients(adapter, [record])[0] for record in records]
        for record, gradient in zip(records, alone, strict=True):
            single = unit_gradient(adapter, [record])
            if not np.linalg.norm(gradient - single) <= _AGREE * np.linalg.norm(single):
                return "another gradient than one unit a forward"
        for chosen in _batches(units):
            together = packed_gradients(adapter, [records[index] for index in chosen])
            if any(not np.array_equal(row, alone[index]) for row, index in zip(together, chosen, strict=True)):
                return f"other bits alone than among {len(chosen)}"
    except (ValueError, torch.OutOfMemoryError) as error:
        return str(error)
    return None


def _batches(units: int) -> Iterator[list[int]]:
    """All units, all in reversed order, and one batch of every smaller number."""
    yield list(range(units))
    yield list(reversed(range(units)))
    for count in range(2, units):
        yield [(index + count) % units for index in range(count)]


def _records(vocabulary: int, units: int, length: int, rng: RandomBytes) -> list[SyntheticRecord]:
    """A record a unit: the first repeats one token, the last has one answer token."""
    records = [synthetic_record(vocabulary, length, rng) for _ in range(units)]
    records[0].tokens[:] = records[0].tokens[0]
    records[-1].loss_mask[:-1] = False
    return records


@contextmanager
def _random_adapter(adapter: Adapter, rng: RandomBytes) -> Iterator[None]:
    """Trained matrices of about the size of 1/sqrt(in), so that none of them hides another; put back after."""
    kept = [parameter.detach().clone() for parameter in adapter.trained]
    try:
        with torch.no_grad():
            for parameter in adapter.trained:
                words = np.frombuffer(rng(4 * parameter.numel()), "<u4").astype(np.float64)
                values = (words / 2.0**31 - 1.0) / np.sqrt(parameter.shape[-1])
                parameter.copy_(torch.from_numpy(values.reshape(parameter.shape)))
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(adapter.trained, kept, strict=True):
                parameter.copy_(values)
