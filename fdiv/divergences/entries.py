"""The built-in f-divergences, one class each: generator, limits, score, conjugate and inverse in closed form.

Every formula is written in x = log t so that it loses no digits near t = 1 and does not overflow far from it; where an
exponential must grow, it saturates as `fdiv.divergences.saturation` says. Sources: f-DPO (arXiv:2309.16240), f-DPG
(arXiv:2302.08215), FLAT (arXiv:2410.11143), DPH-RL (arXiv:2509.07430), χPO (arXiv:2407.13399), f-GAN (Nowozin 2016).
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from fdiv.divergences.base import Divergence
from fdiv.divergences.rootfinding import solve_x_plus_expm1
from fdiv.divergences.saturation import DEFAULT_MAX_EXPONENT, capped_expm1, half_sign, soft_cap

_INF = math.inf
_LOG2 = math.log(2.0)


def _expm1(exponent: Tensor) -> Tensor:
    return capped_expm1(exponent, DEFAULT_MAX_EXPONENT)


def _open_unit_interval(divergence: str, parameter: str, value: float, limits: str) -> float:
    """`value` as a float in (0, 1), or ValueError naming the divergence, the parameter, the value and the limits."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < 1.0:
        raise ValueError(
            f"{divergence}: {parameter} must be a number strictly between 0 and 1, got {value!r} ({limits})"
        )
    return float(value)


class ReverseKL(Divergence):
    """KL(P‖Q): f(t) = t log t − t + 1, f' = log t, f* = e^v − 1. Mode seeking; f-DPO with it is DPO."""

    name = "reverse_kl"
    aliases = ("rkl",)
    at_zero, derivative_at_zero, slope_at_infinity = 1.0, -_INF, _INF
    curvature = 1.0

    def dual(self) -> Divergence:
        return ForwardKL()

    def _generator(self, log_t: Tensor) -> Tensor:
        x = soft_cap(log_t)
        return torch.exp(x) * x - torch.expm1(x)

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return log_t

    def _conjugate(self, v: Tensor) -> Tensor:
        return _expm1(v)

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

    def dual(self) -> Divergence:
        return ReverseKL()

    def _generator(self, log_t: Tensor) -> Tensor:
        x = soft_cap(log_t)
        return torch.expm1(x) - x

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return -capped_expm1(-log_t, cap)

    def _conjugate(self, v: Tensor) -> Tensor:
        return -torch.log1p(-v)

    def _inverse_derivative(self, v: Tensor) -> Tensor:
        return -torch.log1p(-v)

    def _activation(self, x: Tensor) -> Tensor:
        return -_expm1(-x)


def _log_mixture(x: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """(log t − log m, log m) with m = w·t + 1 − w, each to full relative precision on its own side of t = 1."""
    right = torch.log1p((1.0 - weight) * torch.expm1(-x.clamp(min=0.0)))
    left = torch.log1p(weight * torch.expm1(x.clamp(max=0.0)))
    return torch.where(x < 0, x - left, -right), torch.where(x < 0, left, x + right)


class SkewJensenShannon(Divergence):
    """w KL(P‖M) + (1−w) KL(Q‖M), M = w P + (1−w) Q, 0 < w < 1.

    f(t) = w t log t − m log m, m = w t + 1 − w; f' = w log(t/m); f* = −(1−w) log[(1 − w e^{v/w})/(1−w)]. w = ½ is half
    of `jensen_shannon`. Bounded; f'(∞) = −w log w.
    """

    name = "skew_jensen_shannon"
    aliases = ("skew_js",)
    derivative_at_zero = -_INF

    def __init__(self, weight: float) -> None:
        self.weight = _open_unit_interval(self.name, "weight", weight, "w → 0 and w → 1 vanish")
        self.parameters = MappingProxyType({"weight": self.weight})
        self.at_zero = -(1.0 - self.weight) * math.log1p(-self.weight)
        # f'(∞) as a sum of two floats, so that f'(∞) − v keeps its digits when v is close to it
        with localcontext() as context:
            context.prec = 50
            slope = -Decimal(self.weight) * Decimal(self.weight).ln()
            self.slope_at_infinity = float(slope)
            self._slope_rest = float(slope - Decimal(self.slope_at_infinity))

    @property
    def curvature(self) -> float:
        return self.weight * (1.0 - self.weight)

    def dual(self) -> Divergence:
        return SkewJensenShannon(1.0 - self.weight)

    def _generator(self, log_t: Tensor) -> Tensor:
        x = soft_cap(log_t)
        log_t_over_m, log_m = _log_mixture(x, self.weight)
        return self.weight * torch.exp(x) * log_t_over_m - (1.0 - self.weight) * log_m

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        # w log(t/m) = −w (log w + softplus(c − x)), c = log((1−w)/w); minus its own rounding at t = 1
        odds = math.log1p(-self.weight) - math.log(self.weight)
        at_one = F.softplus(log_t.new_tensor(odds))
        return (F.softplus(odds - log_t) - at_one) * -self.weight

    def _conjugate(self, v: Tensor) -> Tensor:
        return (1.0 - self.weight) * self._log_m(v)

    def _inverse_derivative(self, v: Tensor) -> Tensor:
        return v / self.weight + self._log_m(v)

    def _log_m(self, v: Tensor) -> Tensor:
        """log m at f'(t) = v: −log[(1 − w e^{v/w})/(1−w)], from the gap to f'(∞) when v is close to it."""
        w = self.weight
        gap = (self.slope_at_infinity - v) + self._slope_rest
        close = gap < 0.5 * self.slope_at_infinity
        near = math.log1p(-w) - torch.log(-torch.expm1(-torch.where(close, gap, 1.0) / w))
        far = -torch.log1p(-(w / (1.0 - w)) * torch.expm1(torch.where(close, 0.0, v) / w))
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

    def dual(self) -> Divergence:
        return self

    def _generator(self, log_t: Tensor) -> Tensor:
        return 2.0 * self._half._generator(log_t)

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return F.logsigmoid(log_t) + _LOG2

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

    def dual(self) -> Divergence:
        return self

    def _generator(self, log_t: Tensor) -> Tensor:
        x = soft_cap(log_t)
        return torch.expm1(x) * x

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return log_t - capped_expm1(-log_t, cap)

    def _conjugate(self, v: Tensor) -> Tensor:
        x = self._inverse_derivative(v)
        return _expm1(x) + x  # = ω + 1/ω + v − 2 with v written out

    def _inverse_derivative(self, v: Tensor) -> Tensor:
        return -solve_x_plus_expm1(-v)


class Alpha(Divergence):
    """The α-divergence of f-DPO and DPH-RL, 0 < α < 1; α → 0 is reverse KL, α → 1 forward KL.

    f(t) = (t^{1−α} − (1−α)t − α)/(α(α−1)); f' = (1 − t^{−α})/α; f* = (t^{1−α} − 1)/(1−α) at t = (1−αv)^{−1/α}.
    TRL ≥ 0.29 and α-DPG count the other way round: their α is 1 − α here (`alpha_trl`, `alpha_dpg`).
    """

    name = "alpha"
    derivative_at_zero = -_INF

    def __init__(self, alpha: float) -> None:
        self.alpha = _open_unit_interval(self.name, "alpha", alpha, "α → 0 is reverse_kl, α → 1 is forward_kl")
        self.parameters = MappingProxyType({"alpha": self.alpha})
        self.at_zero = 1.0 / (1.0 - self.alpha)
        self.slope_at_infinity = 1.0 / self.alpha
        self._slope_rest = float(1 / Fraction(self.alpha) - Fraction(self.slope_at_infinity))
        self.exponents = (-self.alpha,)

    curvature = 1.0

    def dual(self) -> Divergence:
        return Alpha(1.0 - self.alpha)

    def _generator(self, log_t: Tensor) -> Tensor:
        a, x = self.alpha, soft_cap(log_t)
        if a <= 0.5:  # (t f' − (t−1))/(1−α): keeps its digits as α → 0
            low = x.clamp(min=-DEFAULT_MAX_EXPONENT / a)  # t f' is 0 to the last bit beyond
            return (-torch.exp(x) * torch.expm1(-a * low) / a - torch.expm1(x)) / (1.0 - a)
        return (torch.expm1(x) - torch.expm1((1.0 - a) * x) / (1.0 - a)) / a  # likewise as α → 1

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return -capped_expm1(-self.alpha * log_t, cap) / self.alpha

    def _conjugate(self, v: Tensor) -> Tensor:
        return _expm1((1.0 - self.alpha) * self._inverse_derivative(v)) / (1.0 - self.alpha)

    def _inverse_derivative(self, v: Tensor) -> Tensor:
        a = self.alpha
        gap = (self.slope_at_infinity - v) + self._slope_rest
        close = gap < 0.5 * self.slope_at_infinity
        near = torch.log(a * torch.where(close, gap, 1.0))
        far = torch.log1p(-a * torch.where(close, 0.0, v))
        return -torch.where(close, near, far) / a


class SquaredHellinger(Divergence):
    """∑(√P − √Q)²: f(t) = (√t − 1)², f' = 1 − t^{−1/2}, f* = v/(1−v). Half of `alpha` at ½."""

    name = "squared_hellinger"
    aliases = ("hellinger",)
    at_zero, derivative_at_zero, slope_at_infinity = 1.0, -_INF, 1.0
    curvature = 0.5
    exponents = (-0.5,)

    def dual(self) -> Divergence:
        return self

    def _generator(self, log_t: Tensor) -> Tensor:
        return torch.expm1(0.5 * soft_cap(log_t)).square()

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return -capped_expm1(-0.5 * log_t, cap)

    def _conjugate(self, v: Tensor) -> Tensor:
        return v / (1.0 - v)

    def _inverse_derivative(self, v: Tensor) -> Tensor:
        return -2.0 * torch.log1p(-v)

    def _activation(self, x: Tensor) -> Tensor:
        return -_expm1(-x)


class NeymanChi2(Divergence):
    """∑(P − Q)²/P = χ²(Q‖P): f(t) = (1−t)²/t, f' = 1 − t⁻², f* = 2 − 2√(1−v). Very mass covering, heavy tails."""

    name = "neyman_chi2"
    aliases = ("neyman",)
    at_zero, derivative_at_zero, slope_at_infinity = _INF, -_INF, 1.0
    curvature = 2.0
    exponents = (-2.0,)

    def dual(self) -> Divergence:
        return PearsonChi2()

    def _generator(self, log_t: Tensor) -> Tensor:
        x = -soft_cap(-soft_cap(log_t))
        return -torch.expm1(x) * torch.expm1(-x)

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return -capped_expm1(-2.0 * log_t, cap)

    def _conjugate(self, v: Tensor) -> Tensor:
        return 2.0 * v / (1.0 + torch.sqrt(1.0 - v))  # = 2 − 2√(1−v), without the cancellation

    def _inverse_derivative(self, v: Tensor) -> Tensor:
        return -0.5 * torch.log1p(-v)

    def _activation(self, x: Tensor) -> Tensor:
        return -_expm1(-x)


class PearsonChi2(Divergence):
    """∑(P − Q)²/Q = χ²(P‖Q): f(t) = (t−1)², f' = 2(t−1), f* = v + v²/4 for v > −2, else −1."""

    name = "pearson_chi2"
    aliases = ("pearson",)
    at_zero, derivative_at_zero, slope_at_infinity = 1.0, -2.0, _INF
    curvature = 2.0
    exponents = (1.0,)

    def dual(self) -> Divergence:
        return NeymanChi2()

    def _generator(self, log_t: Tensor) -> Tensor:
        return torch.expm1(soft_cap(log_t, rate=2.0)).square()

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return 2.0 * capped_expm1(log_t, cap)

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

    def dual(self) -> Divergence:
        return NeymanChi2().scaled(0.5) + ForwardKL()

    def _generator(self, log_t: Tensor) -> Tensor:
        x = soft_cap(log_t, rate=2.0)
        return 0.5 * torch.expm1(x).square() + torch.exp(x) * x - torch.expm1(x)

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return log_t + capped_expm1(log_t, cap)

    def _conjugate(self, v: Tensor) -> Tensor:
        gain = torch.expm1(soft_cap(self._inverse_derivative(v), rate=2.0))
        return 0.5 * gain * (gain + 4.0)

    def _inverse_derivative(self, v: Tensor) -> Tensor:
        return solve_x_plus_expm1(v)


class LeCam(Divergence):
    """∑(P − Q)²/(P + Q), the triangular discrimination: f(t) = (t−1)²/(t+1), f' = (t−1)(t+3)/(t+1)². Bounded by 2.

    With q = 1/(1+t): f' = 1 − 4q², so f* = v(3−2q)/(1+2q) with q = √(1−v)/2.
    """

    name = "le_cam"
    aliases = ("triangular_discrimination",)
    at_zero, derivative_at_zero, slope_at_infinity = 1.0, -3.0, 1.0
    curvature = 1.0

    def dual(self) -> Divergence:
        return self

    def _generator(self, log_t: Tensor) -> Tensor:
        x = soft_cap(log_t)
        return torch.expm1(x) * torch.tanh(0.5 * x)

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return torch.tanh(0.5 * log_t) * (1.0 + 2.0 * torch.sigmoid(-log_t))

    def _conjugate(self, v: Tensor) -> Tensor:
        q = 0.5 * torch.sqrt(1.0 - v)
        return v * (3.0 - 2.0 * q) / (1.0 + 2.0 * q)

    def _inverse_derivative(self, v: Tensor) -> Tensor:
        q = 0.5 * torch.sqrt(1.0 - v)
        return torch.log((3.0 + v) / (4.0 * (1.0 + q))) - torch.log(q)  # 1 − q = (3+v)/(4(1+q)), exact near v = −3


class TotalVariation(Divergence):
    """½∑|P − Q|: f(t) = ½|t−1|, f' = ±½ (0 at t = 1), f* = v on [−½, ½]. No curvature and no inverse derivative."""

    name = "total_variation"
    aliases = ("tv",)
    at_zero, derivative_at_zero, slope_at_infinity = 0.5, -0.5, 0.5

    @property
    def curvature(self) -> float:
        raise ValueError(
            "total_variation has no curvature: f(t) = ½|t−1| has a kink at t = 1, so it cannot be normalized"
        )

    def dual(self) -> Divergence:
        return self

    def _generator(self, log_t: Tensor) -> Tensor:
        return 0.5 * torch.expm1(soft_cap(log_t)).abs()

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return half_sign(log_t)

    def _conjugate(self, v: Tensor) -> Tensor:
        return v

    def inverse_derivative(self, v: Tensor) -> Tensor:
        raise ValueError("total_variation has no inverse derivative: f' takes only the values −½, 0 and ½")

    def _activation(self, x: Tensor) -> Tensor:
        return (0.5 * torch.tanh(x)).clamp(min=-0.5 + 2.0**-25)


#: Name → class, the table the registry starts from.
ENTRIES: dict[str, type[Divergence]] = {
    entry.name: entry
    for entry in (
        ReverseKL,
        ForwardKL,
        JensenShannon,
        SkewJensenShannon,
        Jeffreys,
        Alpha,
        SquaredHellinger,
        NeymanChi2,
        PearsonChi2,
        Chi2KL,
        LeCam,
        TotalVariation,
    )
}
