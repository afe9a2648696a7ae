"""The step that every party takes on the published sum, with the same bits everywhere.

An organisation's vector is a clipped, noised sum of **gradients** over two constants, so the weighted mean g of the
vectors is a gradient estimate and the adapter moves against it. The optimisers are pure functions of public values:
under differential privacy their state is post-processing and costs nothing.

* ``adam`` (Kingma and Ba 2014), the default;
* ``sgd`` with heavy-ball momentum, as torch writes it;
* ``adambc`` (Tang et al. 2024, arXiv:2312.14334): Adam with the noise's known variance taken off the second moment,
  never below that variance itself.

Bits agree because arrays see fp32 ``+ - * / sqrt`` only, one numpy call each (IEEE 754 rounds these correctly and
nothing is fused), and scalars are Python floats under the same four operations; powers are repeated products.
``tests/vectors/rules.json`` fixes the outcome.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from foedus_protocols.errors import ConfigError, VerificationError
from foedus_protocols.rotation import CHUNK

Vector = NDArray[np.float32]
RuleName = Literal["adam", "sgd", "adambc"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An optimiser and its constants, as the charter has them. No schedule, no weight decay.

    Attributes:
        name: Which optimiser.
        rate: Length of a step.
        beta1: Decay of the first moment (adam, adambc).
        beta2: Decay of the second moment (adam, adambc).
        epsilon: Added to the root of the second moment (adam).
        momentum: Share of the last step kept (sgd).
        noise_variance: Variance of the noise in one coordinate of g (adambc); see `noise_variance`.
    """

    name: RuleName = "adam"
    rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8
    momentum: float = 0.0
    noise_variance: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in _STEPS:
            raise ConfigError(f"expected an optimiser of {', '.join(_STEPS)}, got {self.name}")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ConfigError(f"expected a positive, finite rate, got {self.rate}")
        for field in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, field) < 1:
                raise ConfigError(f"expected {field} of at least 0 and below 1, got {getattr(self, field)}")
        if self.name == "adam" and not 0 < _single(self.epsilon) < math.inf:
            raise ConfigError(f"expected an epsilon for adam that is positive in fp32, got {self.epsilon}: use 1e-8")
        if self.name == "adambc" and not 0 < _single(self.noise_variance) < math.inf:
            raise ConfigError(f"expected a positive noise variance for adambc, got {self.noise_variance}: use adam")


@dataclass(frozen=True, kw_only=True)
class State:
    """What an optimiser carries from round to round.

    Attributes:
        step: Rounds advanced so far.
        first: First moment, or the momentum buffer.  # (d,)
        second: Second moment (d,), or empty where the rule has none.
    """

    step: int
    first: Vector
    second: Vector


def initial_state(rule: Rule, length: int) -> State:
    """The state before the first round."""
    second = np.zeros(0 if rule.name == "sgd" else length, dtype=np.float32)
    return State(step=0, first=np.zeros(length, dtype=np.float32), second=second)


def noise_variance(parties: Sequence[tuple[float, float, float]]) -> float:
    """Variance of the noise in one coordinate of g when every party takes part.

    Args:
        parties: ``(weight, expected_units, noise_multiplier)`` of each.
    """
    total = math.fsum(weight for weight, _, _ in parties)
    return math.fsum((weight * noise / units / total) ** 2 for weight, units, noise in parties)


def mean_of_sum(decoded: Vector, weights: Sequence[float]) -> Vector:
    """The weighted mean of the survivors' vectors.

    Args:
        decoded: Sum over survivors of ``(w_i / max w) v_i``.  # (d,)
        weights: The same ``w_i / max w``, of the survivors only, in any order; max w is over all participants.

    Returns:
        g.  # (d,)

    Raises:
        VerificationError: No survivor, or a weight that is not positive.
    """
    if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise VerificationError(f"expected a positive weight for each survivor, got {len(weights)} weights")
    # fsum rounds once, so the order of the survivors cannot matter.
    return np.divide(decoded, np.float32(math.fsum(weights)), dtype=np.float32)


def advance(adapter: Vector, g: Vector, *, rule: Rule, state: State, in_place: bool = False) -> tuple[Vector, State]:
    """One step against g.

    Args:
        adapter: Trained matrices as a vector.  # (d,)
        g: Gradient estimate.  # (d,)
        rule: The charter's optimiser.
        state: From `initial_state` or the last call.
        in_place: Write the result over the arrays of `adapter` and `state`, which are not to be used any more: three
            vectors less in memory.

    Returns:
        The next adapter and the next state, in new arrays unless `in_place`.

    Raises:
        VerificationError: A vector is not fp32 or of another length.

    *Guarantees.* Equal inputs give equal bits on every machine with IEEE 754 fp32 and fp64, rounding to nearest,
    subnormal numbers kept.
    """
    for name, vector in (("adapter", adapter), ("gradient", g), ("moment", state.first)):
        if vector.dtype != np.float32 or vector.shape != adapter.shape:
            raise VerificationError(f"expected a float32 {name} of {adapter.shape}, got {vector.dtype} {vector.shape}")
    following, first, second = (old if in_place else np.empty_like(old) for old in (adapter, state.first, state.second))
    # A piece at a time, so that a step's intermediates stay in a core's cache: three times as fast at 10 million.
    for start in range(0, adapter.size, CHUNK):
        piece = slice(start, start + CHUNK)
        before = State(step=state.step, first=state.first[piece], second=state.second[piece])
        update, after = _STEPS[rule.name](g[piece], rule, before)
        np.subtract(adapter[piece], update, out=following[piece])
        first[piece], second[piece] = after.first, after.second
    return following, State(step=state.step + 1, first=first, second=second)


def _adam(g: Vector, rule: Rule, state: State) -> tuple[Vector, State]:
    after = _moments(g, rule, state)
    rate, root_correction = _corrections(rule, after.step)
    # rate * m_hat / (sqrt(v_hat) + epsilon), with both corrections moved into scalars.
    root: Vector = np.sqrt(after.second)
    denominator = root / np.float32(root_correction) + np.float32(rule.epsilon)
    return np.float32(rate) * after.first / denominator, after


def _adambc(g: Vector, rule: Rule, state: State) -> tuple[Vector, State]:
    after = _moments(g, rule, state)
    rate, root_correction = _corrections(rule, after.step)
    noise = np.float32(rule.noise_variance)
    corrected = after.second / np.float32(root_correction * root_correction) - noise
    return np.float32(rate) * after.first / np.sqrt(np.maximum(corrected, noise)), after


def _sgd(g: Vector, rule: Rule, state: State) -> tuple[Vector, State]:
    first = np.float32(rule.momentum) * state.first + g
    return np.float32(rule.rate) * first, State(step=state.step + 1, first=first, second=state.second)


def _moments(g: Vector, rule: Rule, state: State) -> State:
    first = np.float32(rule.beta1) * state.first + np.float32(1 - rule.beta1) * g
    second = np.float32(rule.beta2) * state.second + np.float32(1 - rule.beta2) * (g * g)
    return State(step=state.step + 1, first=first, second=second)


@lru_cache(maxsize=16)  # The same for every piece of a vector.
def _corrections(rule: Rule, step: int) -> tuple[float, float]:
    """The rate over the first moment's bias, and the root of the second moment's."""
    power1 = power2 = 1.0
    for _ in range(step):
        power1 *= rule.beta1
        power2 *= rule.beta2
    return rule.rate / (1 - power1), math.sqrt(1 - power2)


def _single(value: float) -> float:
    """The value as the step sees it: an epsilon that is 0 in fp32 would divide 0 by 0."""
    with np.errstate(over="ignore", under="ignore"):
        return float(np.float32(value))


_STEPS = {"adam": _adam, "sgd": _sgd, "adambc": _adambc}
