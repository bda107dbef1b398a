"""Divergences made from others or from a user's function: `Scaled`, `Sum`, `from_generator`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from fdiv.divergences.base import Divergence
from fdiv.divergences.cells import Cells
from fdiv.divergences.generator_checks import check_generator, check_slopes, curvature_at_one, limit
from fdiv.divergences.rootfinding import invert_increasing
from fdiv.divergences.saturation import DEFAULT_MAX_EXPONENT, as_float, check_max_exponent, soft_cap

#: |log t| beyond which a user's f saturates: its exponent is not known, and e^(2·30) is the registry's own cap.
_USER_CAP = DEFAULT_MAX_EXPONENT / 2


class Scaled(Divergence):
    """c·D_f, c > 0: every member follows from f. f* = c f*(v/c), (c f)'⁻¹(v) = f'⁻¹(v/c), activation c·g_f."""

    base: Divergence
    factor: float

    def __init__(self, base: Divergence, factor: float) -> None:
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0.0 < factor < math.inf:
            raise ValueError(f"scaled: the factor must be a positive finite number, got {factor!r}")
        if isinstance(base, Scaled):
            factor = factor * base.factor
            base = base.base
        self.base = base
        self.factor = float(factor)
        self.name = f"{self.factor:g}*{base.label}"
        self.exponents = base.exponents
        self.at_zero = self.factor * base.at_zero
        self.derivative_at_zero = self.factor * base.derivative_at_zero
        self.slope_at_infinity = self.factor * base.slope_at_infinity

    @property
    def curvature(self) -> float:
        return self.factor * self.base.curvature

    def _identity(self) -> tuple:
        return (self.base, self.factor)

    def _make_dual(self) -> Divergence:
        return Scaled(self.base.dual(), self.factor)

    def inverse_derivative(self, v: Tensor) -> Tensor:
        return self.base.inverse_derivative(v / self.factor)

    def conjugate(self, v: Tensor) -> Tensor:
        return self.factor * self.base.conjugate(v / self.factor)

    def _generator(self, log_t: Tensor) -> Tensor:
        return self.factor * self.base._generator(log_t)

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return self.factor * self.base._score(log_t, cap)

    def _mass(self, cells: Cells) -> Tensor:
        return self.factor * self.base._mass(cells)

    def _mass_derivative(self, cells: Cells) -> Tensor:
        return self.factor * self.base._mass_derivative(cells)

    def _activation(self, x: Tensor) -> Tensor:
        return self.factor * self.base.activation(x)


class Sum(Divergence):
    """D_f + D_g: generator, score, limits and dual add; the inverse derivative is found by bisection."""

    def __init__(self, first: Divergence, second: Divergence) -> None:
        self.parts = (first, second)
        self.name = f"{first.label}+{second.label}"
        self.exponents = tuple(sorted({*first.exponents, *second.exponents}))
        self.at_zero = first.at_zero + second.at_zero
        self.derivative_at_zero = first.derivative_at_zero + second.derivative_at_zero
        self.slope_at_infinity = first.slope_at_infinity + second.slope_at_infinity

    @property
    def curvature(self) -> float:
        return self.parts[0].curvature + self.parts[1].curvature

    def _identity(self) -> tuple:
        return self.parts

    def _make_dual(self) -> Divergence:
        return Sum(self.parts[0].dual(), self.parts[1].dual())

    def inverse_derivative(self, v: Tensor) -> Tensor:
        _ = self.curvature  # a part with a kink (total variation) has no inverse derivative: say so
        return super().inverse_derivative(v)

    def _conjugate(self, v: Tensor) -> Tensor:
        try:
            _ = self.curvature
        except ValueError:  # at the kink f' jumps over v, and the supremum stays there: the gradient is t
            x = soft_cap(invert_increasing(self.derivative, v), rate=2.0)
            return torch.exp(x) * v - self._generator(x)
        return super()._conjugate(v)

    def _generator(self, log_t: Tensor) -> Tensor:
        return self.parts[0]._generator(log_t) + self.parts[1]._generator(log_t)

    def _generator_over_t(self, log_t: Tensor) -> Tensor:
        return self.parts[0]._generator_over_t(log_t) + self.parts[1]._generator_over_t(log_t)

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return self.parts[0]._score(log_t, cap) + self.parts[1]._score(log_t, cap)

    def _mass(self, cells: Cells) -> Tensor:
        return self.parts[0]._mass(cells) + self.parts[1]._mass(cells)

    def _mass_derivative(self, cells: Cells) -> Tensor:
        return self.parts[0]._mass_derivative(cells) + self.parts[1]._mass_derivative(cells)


class FromGenerator(Divergence):
    """A user's f, given as a function of log t; derivatives by autograd in float64, inverses by bisection.

    f' = e^{−x} d/dx f(e^x) − f'(1). Slower than a closed form, and as precise for small t as the autograd of `f` is:
    write exp(x) − 1 rather than expm1(x) and exponentials rather than tanh, whose gradients lose their digits below
    log t ≈ −15. Beyond |log t| = 30 (or `max_exponent`, if less) the argument saturates logarithmically, so that
    generators up to t² stay finite in float32. f may have kinks away from t = 1.
    """

    def __init__(self, name: str, f: Callable[[Tensor], Tensor], **ends: float) -> None:
        self.name, self._f = name, f
        check_generator(name, f)
        one = torch.zeros((), dtype=torch.float64)
        self._offset, self._slope = 0.0, 0.0
        self._offset = f(one).item()
        self._slope = self._derivative(one).item()
        self._curvature = curvature_at_one(name, self._derivative, self._slope)
        check_slopes(name, self._derivative, self._curvature + abs(self._slope) + abs(self._offset))
        for what, function, side in (
            ("at_zero", self._centred, -1.0),
            ("derivative_at_zero", self._derivative, -1.0),
            ("slope_at_infinity", self._derivative, 1.0),
        ):
            given = ends.get(what)
            setattr(self, what, limit(name, what, function, side, self._curvature) if given is None else float(given))
        self.exponents = (-1.0, 1.0)

    @property
    def curvature(self) -> float:
        return self._curvature

    def _identity(self) -> tuple:
        return (self.name, self._f)

    def _centred(self, x: Tensor) -> Tensor:
        return self._f(x) - self._offset - self._slope * torch.expm1(x)

    def _derivative(self, x: Tensor) -> Tensor:
        """f'(t) − f'(1), differentiable again in either mode."""
        return torch.exp(-x) * torch.func.grad(lambda y: self._f(y).sum())(x) - self._slope

    def _make_dual(self) -> Divergence:
        return from_generator(
            f"dual({self.name})",
            lambda x: torch.exp(x) * self._centred(-x),
            at_zero=self.slope_at_infinity,
            slope_at_infinity=self.at_zero,
        )

    def capped(self, log_t: Tensor, max_exponent: float | None = None) -> Tensor:
        return as_float(log_t, "log_t").abs() > min(check_max_exponent(max_exponent), _USER_CAP)

    def _generator(self, log_t: Tensor) -> Tensor:
        return self._centred(_two_sided_cap(log_t.double(), _USER_CAP)).to(log_t.dtype)

    def _generator_over_t(self, log_t: Tensor) -> Tensor:
        x = _two_sided_cap(log_t.double(), _USER_CAP)
        return (torch.exp(-x) * self._centred(x)).to(log_t.dtype)

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        infinite = torch.isinf(log_t)
        x = _two_sided_cap(log_t.masked_fill(infinite, 0.0).double(), min(cap, _USER_CAP))
        ends = torch.full_like(log_t, self.derivative_at_zero).masked_fill(log_t > 0, self.slope_at_infinity)
        return torch.where(infinite, ends, self._derivative(x).to(log_t.dtype))

    def _conjugate(self, v: Tensor) -> Tensor:
        # At a kink f' jumps over v and the supremum stays there: the inverse is constant, and the gradient is t.
        x = _two_sided_cap(self._inverse_derivative(v), _USER_CAP)
        return torch.exp(x) * v - self._centred(x)

    @cached_property
    def _top(self) -> float:
        def value(x: Tensor) -> Tensor:
            return torch.exp(x) * self._derivative(x) - self._centred(x)

        return limit(self.name, "f*(f'(∞))", value, 1.0, self._curvature)

    def _conjugate_at_slope(self) -> float:
        return self._top


def from_generator(name: str, f: Callable[[Tensor], Tensor], **ends: float) -> Divergence:
    """A `Divergence` from its generator alone: `f` maps a tensor of log t to f(t), element-wise, in torch operations.

    Centring, f', f'', f*, (f')⁻¹, `dual`, the limits at 0 and ∞ follow by autograd, extrapolation and bisection. The
    limits can be given instead, as `at_zero`, `derivative_at_zero`, `slope_at_infinity`, where extrapolation is not
    trusted or says that it cannot tell.

    Raises ValueError for an empty name, an unknown limit, a result that is not element-wise, an f that is cut from the
    graph of log t (`detach`, numpy, `no_grad`), values that are not finite near t = 1, a kink or no curvature at
    t = 1, and an f that is not convex. All tests are relative: c·f passes where f does.
    """
    if not name:
        raise ValueError("from_generator: the divergence needs a name")
    unknown = set(ends) - {"at_zero", "derivative_at_zero", "slope_at_infinity"}
    if unknown:
        known = "at_zero, derivative_at_zero, slope_at_infinity"
        raise ValueError(f"from_generator: unknown limit {min(unknown)!r}; known: {known}")
    return FromGenerator(name, f, **ends)


def _two_sided_cap(x: Tensor, cap: float) -> Tensor:
    excess = torch.relu(x.abs() - cap)
    return x.clamp(-cap, cap) + torch.sign(x) * torch.log1p(torch.log1p(excess))
