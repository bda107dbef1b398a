"""The divergences whose generator is a power of t: the α family, squared Hellinger, both χ², and χPO's mixture.

Sources: f-DPO and DPH-RL for α (arXiv:2309.16240, arXiv:2509.07430), χPO (arXiv:2407.13399), FLAT (arXiv:2410.11143).
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor

from fdiv.divergences.base import Divergence, open_unit_interval
from fdiv.divergences.cells import Cells
from fdiv.divergences.logarithmic import ForwardKL, ReverseKL
from fdiv.divergences.rootfinding import solve_x_plus_expm1
from fdiv.divergences.saturation import (
    DEFAULT_MAX_EXPONENT,
    LARGEST_MAX_EXPONENT,
    capped_expm1,
    saturating_expm1,
    soft_cap,
)

_INF = math.inf
#: An α nearer to 0 or 1 than this divides rounding into the digits of a fused form: the general one is taken.
_EXTREME = 0.02


class Alpha(Divergence):
    """The α-divergence of f-DPO and DPH-RL, 0 < α < 1; α → 0 is reverse KL, α → 1 forward KL.

    f(t) = (t^{1−α} − (1−α)t − α)/(α(α−1)); f' = (1 − t^{−α})/α; f* = (t^{1−α} − 1)/(1−α) at t = (1−αv)^{−1/α}.
    TRL ≥ 0.29 and α-DPG count the other way round: their α is 1 − α here (`alpha_trl`, `alpha_dpg`).
    """

    name = "alpha"
    derivative_at_zero = -_INF

    curvature = 1.0

    def __init__(self, alpha: float) -> None:
        alpha = open_unit_interval(self.name, "alpha", alpha, "α → 0 is reverse_kl, α → 1 is forward_kl")
        self._set(alpha, 1.0 - alpha)

    def _set(self, alpha: float, rest: float) -> None:
        """α and 1 − α: the smaller one is exact, also where the other rounds to 1."""
        self.alpha, self._rest = alpha, rest
        self.parameters = MappingProxyType({"alpha": alpha})
        self.at_zero, _ = _reciprocal(rest, alpha)
        self.slope_at_infinity, self._slope_rest = _reciprocal(alpha, rest)
        self.exponents = (-alpha,)

    def _identity(self) -> tuple:
        return (self.name, self.alpha, self._rest if self.alpha == 1.0 else None)

    def _make_dual(self) -> Divergence:
        dual = object.__new__(Alpha)
        dual._set(self._rest, self.alpha)
        return dual

    def _generator(self, log_t: Tensor) -> Tensor:
        a, rest, x = self.alpha, self._rest, soft_cap(log_t)
        if a <= 0.5:  # (t f' − (t−1))/(1−α): keeps its digits as α → 0
            low = x.clamp(min=-DEFAULT_MAX_EXPONENT / a)  # t f' is 0 to the last bit beyond
            return (torch.exp(x) * _power_score(low, a, DEFAULT_MAX_EXPONENT) - torch.expm1(x)) / rest
        return (torch.expm1(x) + _power_score(-x, rest, LARGEST_MAX_EXPONENT)) / a  # the same as α → 1

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return _power_score(log_t, self.alpha, cap)

    def _mass(self, cells: Cells) -> Tensor:
        a, rest = self.alpha, self._rest
        if min(a, rest) < _EXTREME:
            return super()._mass(cells)
        return (rest * cells.p + a * cells.q - torch.exp(rest * cells.log_p + a * cells.log_q)) / (a * rest)

    def _mass_derivative(self, cells: Cells) -> Tensor:
        if min(self.alpha, self._rest) < _EXTREME:
            return super()._mass_derivative(cells)
        return (cells.p - torch.exp(self._rest * cells.log_p + self.alpha * cells.log_q)) / self.alpha

    def _conjugate(self, v: Tensor) -> Tensor:
        return -_power_score(-self._inverse_derivative(v), self._rest, DEFAULT_MAX_EXPONENT)

    def _inverse_derivative(self, v: Tensor) -> Tensor:
        a = self.alpha
        gap = (self.slope_at_infinity - v) + self._slope_rest
        close = gap < 0.5 * self.slope_at_infinity
        near = torch.log(a * torch.where(close, gap, 1.0))
        far = torch.log1p(-a * torch.where(close, 0.0, v))
        return -torch.where(close, near, far) / a


def _power_score(x: Tensor, rate: float, cap: float) -> Tensor:
    """(1 − e^{−rate·x})/rate, capped at the exponent `cap`.

    Where rate·x is small it is a series in x: the gradient of the quotient passes through 1/rate, which overflows.
    """
    y = rate * x
    small = y.abs() < 1e-4
    near, z = x.masked_fill(~small, 0.0), y.masked_fill(~small, 0.0)
    series = near * (1.0 - z / 2.0 * (1.0 - z / 3.0 * (1.0 - z / 4.0)))
    return torch.where(small, series, -capped_expm1(-y, cap) / rate)


@lru_cache(maxsize=256)
def _reciprocal(x: float, rest: float) -> tuple[float, float]:
    """1/x as a sum of two floats, for x + rest = 1 where the smaller of the two is exact."""
    exact = 1 / (Fraction(x) if x <= 0.5 else 1 - Fraction(rest))
    return float(exact), float(exact - Fraction(float(exact)))


class SquaredHellinger(Divergence):
    """∑(√P − √Q)²: f(t) = (√t − 1)², f' = 1 − t^{−1/2}, f* = v/(1−v). Half of `alpha` at ½."""

    name = "squared_hellinger"
    aliases = ("hellinger",)
    at_zero, derivative_at_zero, slope_at_infinity = 1.0, -_INF, 1.0
    curvature = 0.5
    exponents = (-0.5,)

    def _make_dual(self) -> Divergence:
        return self

    def _generator(self, log_t: Tensor) -> Tensor:
        return torch.expm1(0.5 * soft_cap(log_t)).square()

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return -capped_expm1(-0.5 * log_t, cap)

    def _mass(self, cells: Cells) -> Tensor:
        return (torch.exp(0.5 * cells.log_p) - torch.exp(0.5 * cells.log_q)).square_()

    def _mass_derivative(self, cells: Cells) -> Tensor:
        return cells.p - torch.exp(0.5 * (cells.log_p + cells.log_q))

    def _conjugate(self, v: Tensor) -> Tensor:
        return v / (1.0 - v)

    def _inverse_derivative(self, v: Tensor) -> Tensor:
        return -2.0 * torch.log1p(-v)

    def _activation(self, x: Tensor) -> Tensor:
        return -saturating_expm1(-x)


class NeymanChi2(Divergence):
    """∑(P − Q)²/P = χ²(Q‖P): f(t) = (1−t)²/t, f' = 1 − t⁻², f* = 2 − 2√(1−v). Very mass covering, heavy tails."""

    name = "neyman_chi2"
    aliases = ("neyman",)
    at_zero, derivative_at_zero, slope_at_infinity = _INF, -_INF, 1.0
    curvature = 2.0
    exponents = (-2.0,)

    def _make_dual(self) -> Divergence:
        return PearsonChi2()

    def _generator(self, log_t: Tensor) -> Tensor:
        x = -soft_cap(-soft_cap(log_t))
        return -torch.expm1(x) * torch.expm1(-x)

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return -capped_expm1(-2.0 * log_t, cap)

    def _mass(self, cells: Cells) -> Tensor:
        return cells.gap + (cells.square_over_p[0] - cells.q)  # P − 2Q + Q²/P

    def _mass_derivative(self, cells: Cells) -> Tensor:
        return cells.p - cells.square_over_p[1]

    def _conjugate(self, v: Tensor) -> Tensor:
        return 2.0 * v / (1.0 + torch.sqrt(1.0 - v))  # = 2 − 2√(1−v), without the cancellation

    def _inverse_derivative(self, v: Tensor) -> Tensor:
        return -0.5 * torch.log1p(-v)

    def _activation(self, x: Tensor) -> Tensor:
        return -saturating_expm1(-x)


class PearsonChi2(Divergence):
    """∑(P − Q)²/Q = χ²(P‖Q): f(t) = (t−1)², f' = 2(t−1), f* = v + v²/4 for v > −2, else −1."""

    name = "pearson_chi2"
    aliases = ("pearson",)
    at_zero, derivative_at_zero, slope_at_infinity = 1.0, -2.0, _INF
    curvature = 2.0
    exponents = (1.0,)

    def _make_dual(self) -> Divergence:
        return NeymanChi2()

    def _generator(self, log_t: Tensor) -> Tensor:
        return torch.expm1(soft_cap(log_t, rate=2.0)).square()

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return 2.0 * capped_expm1(log_t, cap)

    def _mass(self, cells: Cells) -> Tensor:
        return (cells.square_over_q[0] - cells.p) - cells.gap  # P²/Q − 2P + Q

    def _mass_derivative(self, cells: Cells) -> Tensor:
        square, slope = cells.square_over_q
        return square + slope - 2.0 * cells.p

    def _conjugate(self, v: Tensor) -> Tensor:
        small = v.clamp(max=1e12)
        large = torch.expm1(2.0 * soft_cap(self._inverse_derivative(v), rate=2.0))  # t² − 1, without overflow
        return torch.where(v < 1e12, small * (1.0 + 0.25 * small), large)

    def _inverse_derivative(self, v: Tensor) -> Tensor:
        return torch.log1p(0.5 * v)


class Chi2KL(Divergence):
    """χPO's mixture ½χ²(P‖Q) + KL(P‖Q): f(t) = ½(t−1)² + t log t − t + 1, f' = t − 1 + log t, f* = ½(t−1)(t+3)."""

    name = "chi2_kl"
    aliases = ("chi_po", "chipo", "xpo")
    at_zero, derivative_at_zero, slope_at_infinity = 1.5, -_INF, _INF
    curvature = 2.0
    exponents = (1.0,)
    _pearson, _reverse_kl = PearsonChi2(), ReverseKL()

    def _make_dual(self) -> Divergence:
        return NeymanChi2().scaled(0.5) + ForwardKL()

    def _generator(self, log_t: Tensor) -> Tensor:
        x = soft_cap(log_t, rate=2.0)
        return 0.5 * torch.expm1(x).square() + torch.exp(x) * x - torch.expm1(x)

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return log_t + capped_expm1(log_t, cap)

    def _mass(self, cells: Cells) -> Tensor:
        return 0.5 * self._pearson._mass(cells) + self._reverse_kl._mass(cells)

    def _mass_derivative(self, cells: Cells) -> Tensor:
        return 0.5 * self._pearson._mass_derivative(cells) + self._reverse_kl._mass_derivative(cells)

    def _conjugate(self, v: Tensor) -> Tensor:
        gain = torch.expm1(soft_cap(self._inverse_derivative(v), rate=2.0))
        return 0.5 * gain * (gain + 4.0)

    def _inverse_derivative(self, v: Tensor) -> Tensor:
        return solve_x_plus_expm1(v)
