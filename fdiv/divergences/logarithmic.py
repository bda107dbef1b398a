"""The divergences whose generator holds a logarithm: both Kullback–Leibler directions, Jensen–Shannon, Jeffreys.

Every formula of this file and its neighbours `powers` and `bounded` is written in x = log t so that it loses no digits
near t = 1 and does not overflow far from it; where an exponential must grow, it saturates as
`fdiv.divergences.saturation` says. Sources: f-DPO (arXiv:2309.16240), f-DPG (arXiv:2302.08215), DPH-RL
(arXiv:2509.07430), f-GAN (Nowozin et al. 2016, arXiv:1606.00709).
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from functools import lru_cache
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from fdiv.divergences.base import Divergence, open_unit_interval
from fdiv.divergences.cells import Cells
from fdiv.divergences.rootfinding import solve_x_plus_expm1
from fdiv.divergences.saturation import (
    DEFAULT_MAX_EXPONENT,
    capped_expm1,
    exact_expm1,
    saturating_expm1,
    soft_cap,
)

_INF = math.inf
_LOG2 = math.log(2.0)
#: A weight nearer to 0 or 1 than this divides rounding into the digits of a fused form: the general one is taken.
_EXTREME = 0.02


class ReverseKL(Divergence):
    """KL(P‖Q): f(t) = t log t − t + 1, f' = log t, f* = e^v − 1. Mode seeking; f-DPO with it is DPO."""

    name = "reverse_kl"
    aliases = ("rkl",)
    at_zero, derivative_at_zero, slope_at_infinity = 1.0, -_INF, _INF
    curvature = 1.0

    def _make_dual(self) -> Divergence:
        return ForwardKL()

    def _generator(self, log_t: Tensor) -> Tensor:
        x = soft_cap(log_t)
        return torch.exp(x) * x - torch.expm1(x)

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return log_t

    def _mass(self, cells: Cells) -> Tensor:
        return cells.p * cells.log_t - cells.gap

    def _mass_derivative(self, cells: Cells) -> Tensor:
        return cells.p * cells.log_t

    def _conjugate(self, v: Tensor) -> Tensor:
        return saturating_expm1(v)

    def _inverse_derivative(self, v: Tensor) -> Tensor:
        return v

    def _activation(self, x: Tensor) -> Tensor:
        return x - 1.0


class ForwardKL(Divergence):
    """KL(Q‖P): f(t) = −log t + t − 1, f' = 1 − 1/t, f* = −log(1 − v). Mass covering."""

    name = "forward_kl"
    aliases = ("fkl",)
    at_zero, derivative_at_zero, slope_at_infinity = _INF, -_INF, 1.0
    curvature = 1.0
    exponents = (-1.0,)

    def _make_dual(self) -> Divergence:
        return ReverseKL()

    def _generator(self, log_t: Tensor) -> Tensor:
        x = soft_cap(log_t)
        return torch.expm1(x) - x

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return -capped_expm1(-log_t, cap)

    def _mass(self, cells: Cells) -> Tensor:
        return cells.gap - cells.q * cells.log_t

    def _mass_derivative(self, cells: Cells) -> Tensor:
        return cells.gap

    def _conjugate(self, v: Tensor) -> Tensor:
        return -torch.log1p(-v)

    def _inverse_derivative(self, v: Tensor) -> Tensor:
        return -torch.log1p(-v)

    def _activation(self, x: Tensor) -> Tensor:
        return -saturating_expm1(-x)


def _log_blend(x: Tensor, weight: float, rest: float) -> Tensor:
    """log(weight·t + rest) for weight + rest = 1, precise for any weight and |x| ≤ 60, finite beyond."""
    low, middle, high = x.clamp(max=0.0), x.clamp(0.0, DEFAULT_MAX_EXPONENT), x.clamp(min=DEFAULT_MAX_EXPONENT)
    # t < 1: the sum of two positive parts where it is away from 1, else its distance from 1
    small = rest + weight * torch.exp(low) < 0.5
    away = torch.logaddexp(low + _log(weight, rest), torch.full_like(low, _log(rest, weight)))
    below = torch.where(small, away, torch.log1p(weight * exact_expm1(low.masked_fill(small, 0.0))))
    above = torch.log1p(weight * torch.expm1(middle))
    beyond = high + torch.log(weight + rest * torch.exp(-high))
    return torch.where(x < 0, below, torch.where(x <= DEFAULT_MAX_EXPONENT, above, beyond))


def _log(x: float, rest: float) -> float:
    """log x for x + rest = 1 where the smaller of the two is exact."""
    return math.log(x) if x <= 0.5 else math.log1p(-rest)


@lru_cache(maxsize=256)
def _minus_x_log_x(x: float, rest: float) -> tuple[float, float]:
    """−x log x as a sum of two floats, for x + rest = 1 where the smaller of the two is exact."""
    if x > 0.5 and rest < 1e-17:
        return rest, -1.5 * rest * rest  # log x = −rest − rest²/2 − …, and x = 1 − rest
    with localcontext() as context:
        context.prec = 50
        exact = Decimal(x) if x <= 0.5 else 1 - Decimal(rest)
        value = -exact * exact.ln()
        return float(value), float(value - Decimal(float(value)))


class SkewJensenShannon(Divergence):
    """w KL(P‖M) + (1−w) KL(Q‖M), M = w P + (1−w) Q, 0 < w < 1.

    f(t) = w t log t − m log m, m = w t + 1 − w; f' = w log(t/m); f* = −(1−w) log[(1 − w e^{v/w})/(1−w)]. w = ½ is half
    of `jensen_shannon`. Bounded; f'(∞) = −w log w.
    """

    name = "skew_jensen_shannon"
    aliases = ("skew_js",)
    derivative_at_zero = -_INF

    def __init__(self, weight: float) -> None:
        weight = open_unit_interval(self.name, "weight", weight, "w → 0 and w → 1 vanish")
        self._set(weight, 1.0 - weight)

    def _set(self, weight: float, rest: float) -> None:
        """The weights of P and of Q: the smaller one is exact, also where the other rounds to 1."""
        self.weight, self._rest = weight, rest
        self.parameters = MappingProxyType({"weight": weight})
        self.at_zero = _minus_x_log_x(rest, weight)[0]
        # f'(∞) as a sum of two floats, so that f'(∞) − v keeps its digits when v is close to it
        self.slope_at_infinity, self._slope_rest = _minus_x_log_x(weight, rest)

    def _identity(self) -> tuple:
        return (self.name, self.weight, self._rest if self.weight == 1.0 else None)

    @property
    def curvature(self) -> float:
        return self.weight * self._rest

    def _make_dual(self) -> Divergence:
        dual = object.__new__(SkewJensenShannon)
        dual._set(self._rest, self.weight)
        return dual

    def _generator(self, log_t: Tensor) -> Tensor:
        x = soft_cap(log_t)
        log_t_over_m, log_m = -_log_blend(-x, self._rest, self.weight), _log_blend(x, self.weight, self._rest)
        return self.weight * torch.exp(x) * log_t_over_m - self._rest * log_m

    def _generator_over_t(self, log_t: Tensor) -> Tensor:
        x = -soft_cap(-log_t)
        log_t_over_m, log_m = -_log_blend(-x, self._rest, self.weight), _log_blend(x, self.weight, self._rest)
        return self.weight * log_t_over_m - self._rest * torch.exp(-x) * log_m

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return -self.weight * _log_blend(-log_t, self._rest, self.weight)

    def _mass(self, cells: Cells) -> Tensor:
        if min(self.weight, self._rest) < _EXTREME:
            return super()._mass(cells)
        log_m = cells.blend(self.weight, self._rest)
        return self.weight * cells.p * (cells.log_p - log_m) + self._rest * cells.q * (cells.log_q - log_m)

    def _mass_derivative(self, cells: Cells) -> Tensor:
        if min(self.weight, self._rest) < _EXTREME:
            return super()._mass_derivative(cells)
        return self.weight * cells.p * (cells.log_p - cells.blend(self.weight, self._rest))

    def _conjugate(self, v: Tensor) -> Tensor:
        return self._rest * self._log_m(v)

    def _conjugate_at_slope(self) -> float:
        return _INF

    def _inverse_derivative(self, v: Tensor) -> Tensor:
        return v / self.weight + self._log_m(v)

    def _log_m(self, v: Tensor) -> Tensor:
        """log m at f'(t) = v: −log[(1 − w e^{v/w})/(1−w)], from the gap to f'(∞) when v is close to it."""
        w, rest = self.weight, self._rest
        gap = (self.slope_at_infinity - v) + self._slope_rest
        close = gap < 0.5 * self.slope_at_infinity
        near = _log(rest, w) - torch.log(-torch.expm1(-torch.where(close, gap, w) / w))
        far = -torch.log1p(-(w / rest) * torch.expm1(torch.where(close, 0.0, v) / w))
        return torch.where(close, near, far)


class JensenShannon(Divergence):
    """KL(P‖M) + KL(Q‖M), M = (P+Q)/2: TWICE the textbook Jensen–Shannon divergence, as in f-DPO, f-DPG and f-GAN.

    f(t) = t log t − (1+t) log((1+t)/2); f' = log(2t/(1+t)); f* = −log(2 − e^v). At most 2 log 2.
    """

    name = "jensen_shannon"
    aliases = ("js", "jsd", "js_divergence", "jenson_shannon")
    at_zero, derivative_at_zero, slope_at_infinity = _LOG2, -_INF, _LOG2
    curvature = 0.5
    _half = SkewJensenShannon(0.5)

    def _make_dual(self) -> Divergence:
        return self

    def _generator(self, log_t: Tensor) -> Tensor:
        return 2.0 * self._half._generator(log_t)

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return F.logsigmoid(log_t) + _LOG2

    def _mass(self, cells: Cells) -> Tensor:
        log_m = cells.log_mean
        return cells.p * (cells.log_p - log_m) + cells.q * (cells.log_q - log_m)

    def _mass_derivative(self, cells: Cells) -> Tensor:
        return cells.p * (cells.log_p - cells.log_mean)

    def _conjugate(self, v: Tensor) -> Tensor:
        return 2.0 * self._half._conjugate(0.5 * v)

    def _inverse_derivative(self, v: Tensor) -> Tensor:
        return self._half._inverse_derivative(0.5 * v)

    def _activation(self, x: Tensor) -> Tensor:
        return _LOG2 - F.softplus(-x)


class Jeffreys(Divergence):
    """KL(P‖Q) + KL(Q‖P): f(t) = (t−1) log t, f' = log t + 1 − 1/t; f* = ω + 1/ω + v − 2, ω = W(e^{1−v})."""

    name = "jeffreys"
    aliases = ("jeffrey", "symmetric_kl")
    at_zero, derivative_at_zero, slope_at_infinity = _INF, -_INF, _INF
    curvature = 2.0
    exponents = (-1.0,)

    def _make_dual(self) -> Divergence:
        return self

    def _generator(self, log_t: Tensor) -> Tensor:
        x = soft_cap(log_t)
        return torch.expm1(x) * x

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return log_t - capped_expm1(-log_t, cap)

    def _mass(self, cells: Cells) -> Tensor:
        return cells.gap * cells.log_t

    def _mass_derivative(self, cells: Cells) -> Tensor:
        return cells.p * cells.log_t + cells.gap

    def _conjugate(self, v: Tensor) -> Tensor:
        x = self._inverse_derivative(v)
        return saturating_expm1(x) + x  # = ω + 1/ω + v − 2 with v written out

    def _inverse_derivative(self, v: Tensor) -> Tensor:
        return -solve_x_plus_expm1(-v)
