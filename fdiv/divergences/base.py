"""The `Divergence` object: what every entry of the registry offers, and the generic way to compute it.

Convention, everywhere: D_f(P‖Q) = E_Q[f(t)], t = P/Q, P the trained policy, Q the reference or target, f convex and
centred, so that f(1) = 0 and f'(1) = 0. Functions take `log_t` (or v in the range of f'); t itself stays bounded.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fdiv.divergences.cells import Cells
from fdiv.divergences.saturation import DEFAULT_MAX_EXPONENT, as_float, check_max_exponent


class Estimate(NamedTuple):
    """A Monte-Carlo estimate: `value` and its `standard_error` (NaN for one sample), both 0-d tensors."""

    value: Tensor
    standard_error: Tensor


class Divergence:
    """An f-divergence D_f(P‖Q) = E_Q[f(P/Q)], as functions of the log-ratio log t = log P − log Q.

    Subclasses give the attributes `at_zero`, `derivative_at_zero`, `slope_at_infinity`, and the hooks `_generator`,
    `_score` and (where a closed form exists) `_conjugate`, `_inverse_derivative`, `_activation`, `_make_dual`. All
    functions are element-wise: output shape = input shape; float32 and float64 are kept, bfloat16 and float16 are
    computed and returned in float32. They can be differentiated twice, in reverse and in forward mode. Treat instances
    as immutable.
    """

    #: Registry name.
    name: str = ""
    #: Other names the registry accepts for it.
    aliases: tuple[str, ...] = ()
    #: f(0⁺), f'(0⁺) and f'(∞) = lim f(t)/t; may be ±inf.
    at_zero: float = math.nan
    derivative_at_zero: float = math.nan
    slope_at_infinity: float = math.nan
    #: The k of every e^(k·log t) in f': what `max_exponent` caps. Empty where f' takes no unbounded exponential.
    exponents: tuple[float, ...] = ()

    _dual: Divergence | None = None
    #: Parameters by name, read-only.
    parameters: Mapping[str, float] = MappingProxyType({})

    # ---------------------------------------------------------------- description
    @property
    def label(self) -> str:
        """Short text for tables and file names: the name, with the parameters in brackets."""
        inside = ",".join(f"{value:g}" for value in self.parameters.values())
        return f"{self.name}({inside})" if inside else self.name

    def __repr__(self) -> str:
        return f"<Divergence {self.label}>"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash((type(self), self._identity()))

    def _identity(self) -> tuple:
        return (self.name, tuple(sorted(self.parameters.items())))

    @property
    def curvature(self) -> float:
        """f''(1): the scale of a small step. Raises ValueError where f has no curvature (total variation)."""
        raise NotImplementedError

    @property
    def conjugate_domain(self) -> tuple[float, float]:
        """(f'(0⁺), f'(∞)): the interior of the range of f', where `conjugate` is finite and strictly increasing."""
        return (self.derivative_at_zero, self.slope_at_infinity)

    # ---------------------------------------------------------------- functions of log t
    def generator(self, log_t: Tensor) -> Tensor:
        """f(t), centred: f(1) = f'(1) = 0, so f ≥ 0. At log t = −inf it is f(0⁺), at +inf it is +inf."""
        log_t = as_float(log_t, "log_t")
        infinite = torch.isinf(log_t)
        value = self._generator(log_t.masked_fill(infinite, 0.0))
        ends = torch.full_like(value, self.at_zero).masked_fill(log_t > 0, math.inf)
        return torch.where(infinite, ends, value)

    def derivative(self, log_t: Tensor) -> Tensor:
        """f'(t), with f'(1) = 0; at log t = ±inf it is `slope_at_infinity` / `derivative_at_zero`."""
        return self.score(log_t)

    def score(self, log_t: Tensor, max_exponent: float | None = None) -> Tensor:
        """f'(t) with the overflow policy chosen: exponentials in it go on logarithmically above `max_exponent`.

        Below the cap the value is `derivative(log_t)` bit for bit. Above it, on the overflowing side, value and
        gradient are finite and the gradient is not 0. None is the registry's own cap (exponent 60).
        Raises ValueError for a cap outside (0, 80].
        """
        return self._score(as_float(log_t, "log_t"), check_max_exponent(max_exponent))

    def density_weight(self, log_t: Tensor) -> Tensor:
        """t·f''(t) = d f'(t)/d log t ≥ 0: how strongly the objectives move a sample with density ratio t.

        The weight of f-distill (arXiv:2502.15681), the slope of the f-DPO score, f''(1) at t = 1. For `reverse_kl` it
        is 1 everywhere; where it falls with t, the f listens to samples that P has lost. It saturates as `derivative`
        does, and at ±inf it is its value at log t = ±1e4. Raises ValueError where f has no curvature at 1.
        """
        _ = self.curvature
        log_t = as_float(log_t, "log_t").clamp(-1e4, 1e4)
        return torch.func.grad(lambda x: self._score(x, DEFAULT_MAX_EXPONENT).sum())(log_t)

    def capped(self, log_t: Tensor, max_exponent: float | None = None) -> Tensor:
        """Bool tensor: where `score(log_t, max_exponent)` is on its continuation rather than exact."""
        log_t, cap = as_float(log_t, "log_t"), check_max_exponent(max_exponent)
        touched = torch.zeros_like(log_t, dtype=torch.bool)
        for exponent in self.exponents:
            touched |= exponent * log_t > cap
        return touched

    # ---------------------------------------------------------------- functions of v = f'(t)
    def conjugate(self, v: Tensor) -> Tensor:
        """f*(v) = sup over t ≥ 0 of t·v − f(t): −f(0⁺) for v ≤ f'(0⁺), +inf above f'(∞), the limit at f'(∞) itself."""
        given = as_float(v, "v")
        v = given.double()  # f'(∞) − v must keep its digits, and float32 rounds f'(∞) itself
        below, above = v <= self.derivative_at_zero, v >= self.slope_at_infinity
        value = self._conjugate(v.masked_fill(below | above, 0.0))
        end = math.inf if math.isinf(self.slope_at_infinity) else self._conjugate_at_slope()
        top = torch.full_like(v, end).masked_fill(v > self.slope_at_infinity, math.inf)
        return torch.where(below, -self.at_zero, torch.where(above, top, value)).to(given.dtype)

    def inverse_derivative(self, v: Tensor) -> Tensor:
        """log t with f'(t) = v: the map to the optimal policy. −inf for v ≤ f'(0⁺), +inf for v ≥ f'(∞).

        Raises ValueError where f' has no inverse (total variation).
        """
        given = as_float(v, "v")
        v = given.double()
        below, above = v <= self.derivative_at_zero, v >= self.slope_at_infinity
        value = self._inverse_derivative(v.masked_fill(below | above, 0.0))
        return torch.where(below, -math.inf, torch.where(above, math.inf, value)).to(given.dtype)

    def activation(self, x: Tensor) -> Tensor:
        """g_f(x): the f-GAN output activation ℝ → conjugate domain, shifted by the f'(1) that centring removed.

        −g(a) + f*(g(b)) has exactly the textbook value (Nowozin et al. 2016, Table 6; FLAT, arXiv:2410.11143). Entries
        without a textbook row use x where f'(∞) = ∞, else f'(∞) − softplus(−x). Values that rounding would put on
        f'(∞) are kept just below it, so that the conjugate of an activation is finite.
        """
        x = as_float(x, "x")
        value = self._activation(x)
        if math.isinf(self.slope_at_infinity):
            return value
        return value.clamp(max=_largest_below(self.slope_at_infinity, x.dtype))

    # ---------------------------------------------------------------- algebra
    def dual(self) -> Divergence:
        """The divergence with swapped arguments: generator t·f(1/t), so that D_dual(P‖Q) = D_f(Q‖P). Made once."""
        if self._dual is None:
            self._dual = self._make_dual()
        return self._dual

    def scaled(self, factor: float) -> Divergence:
        """factor · D_f. Raises ValueError unless factor is positive and finite."""
        from fdiv.divergences.derived import Scaled

        return Scaled(self, factor)

    def normalized(self) -> Divergence:
        """D_f / f''(1): curvature 1, so that one β means the same first step for every f.

        Raises ValueError where f has no curvature at 1 (total variation).
        """
        curvature = self.curvature
        return self if curvature == 1.0 else self.scaled(1.0 / curvature)

    def __add__(self, other: Divergence) -> Divergence:
        from fdiv.divergences.derived import Sum

        if not isinstance(other, Divergence):
            return NotImplemented
        return Sum(self, other)

    @staticmethod
    def from_generator(name: str, f: Callable[[Tensor], Tensor], **ends: float) -> Divergence:
        """A divergence from `f` alone, a torch function of log t; see `fdiv.divergences.derived.from_generator`."""
        from fdiv.divergences.derived import from_generator

        return from_generator(name, f, **ends)

    # ---------------------------------------------------------------- the divergence itself
    def exact(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """D_f(P‖Q) of categorical distributions given as log-probabilities [..., K] → [...].

        Sum over the last axis of Q·f(P/Q); where Q = 0 < P the term is P·f'(∞), where P = 0 < Q it is Q·f(0⁺). Terms
        with P > Q are computed as P·(f(t)/t), which does not overflow. Gradients flow to both arguments.
        """
        log_p, log_q = torch.broadcast_tensors(as_float(log_p, "log_p"), as_float(log_q, "log_q"))
        cells, no_p, no_q = _finite_cells(log_p, log_q)
        term = self._exact_mass(cells.log_p, cells.log_q)
        term = torch.where(no_p, _mass_times(log_q, no_p & ~no_q, self.at_zero), term)
        term = torch.where(no_q, _mass_times(log_p, no_q & ~no_p, self.slope_at_infinity), term)
        return term.sum(-1)

    def mass(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Q·f(P/Q) of each cell, same shape: the terms of `exact` by the fused forms, right to the rounding of P + Q.

        For sums over many cells, where speed counts: `exact` keeps the digits of a cell with P ≈ Q, too. No gradient
        is promised; `mass_derivative` is it.
        """
        log_p, log_q = torch.broadcast_tensors(as_float(log_p, "log_p"), as_float(log_q, "log_q"))
        cells, no_p, no_q = _finite_cells(log_p, log_q)
        term = self._mass(cells)
        term = torch.where(no_p, _mass_times(log_q, no_p & ~no_q, self.at_zero), term)
        return torch.where(no_q, _mass_times(log_p, no_q & ~no_p, self.slope_at_infinity), term)

    def mass_derivative(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """P·f'(P/Q) of each cell, same shape: the derivative of `mass`, Q·f(P/Q), in log P.

        With w = `mass_derivative` and P = softmax(z), ∂D_f(P‖Q)/∂z = w − P·∑w: what the gradient over a vocabulary
        needs. Bounded wherever D_f is; capped where the generator is (|log t| > 60). Where Q = 0 < P it is P·f'(∞).
        A cell without P has none, and one whose term is infinite none that is defined: both give 0.
        """
        log_p, log_q = torch.broadcast_tensors(as_float(log_p, "log_p"), as_float(log_q, "log_q"))
        cells, no_p, no_q = _finite_cells(log_p, log_q)
        weight = self._mass_derivative(cells)
        slope = 0.0 if math.isinf(self.slope_at_infinity) else self.slope_at_infinity
        weight = torch.where(no_q, _mass_times(log_p, no_q & ~no_p, slope), weight)
        return weight.masked_fill(no_p, 0.0)

    def estimate(self, log_t: Tensor, sampled_from: str = "q") -> Estimate:
        """Monte-Carlo D_f(P‖Q) from the log-ratios of samples, all elements alike: (value, standard_error).

        sampled_from="q": mean of f(t) over samples of Q; "p": mean of f(t)/t over samples of P. Both are unbiased
        where log t is exact, not where it holds an estimated normaliser; centring makes every term non-negative.

        The standard error trusts the central limit theorem: value ± 1.96 s.e. covers too rarely where the terms have
        heavy tails. A UserWarning says when 5 % of the terms (1 to 10 of them, of at least ten) carry more than half.
        Raises ValueError for no samples or another `sampled_from`.
        """
        log_t = as_float(log_t, "log_t").reshape(-1)
        if log_t.numel() == 0:
            raise ValueError("estimate needs at least one log-ratio, got an empty tensor")
        if sampled_from == "q":
            terms = self.generator(log_t)
        elif sampled_from == "p":
            terms = self._over_t_with_ends(log_t)
        else:
            raise ValueError(f"sampled_from must be 'q' (reference, target) or 'p' (policy), got {sampled_from!r}")
        _warn_of_few_terms(self.label, terms)
        spread = terms.std(correction=1) if terms.numel() > 1 else terms.new_tensor(math.nan)
        return Estimate(terms.mean(), spread / math.sqrt(terms.numel()))

    def _over_t_with_ends(self, log_t: Tensor) -> Tensor:
        """f(t)/t including log t = ±inf, where it is f'(∞) and (at 0, which P never samples) +inf."""
        infinite = torch.isinf(log_t)
        value = self._generator_over_t(log_t.masked_fill(infinite, 0.0))
        ends = torch.full_like(value, math.inf).masked_fill(log_t > 0, self.slope_at_infinity)
        return torch.where(infinite, ends, value)

    # ---------------------------------------------------------------- hooks, on finite input in the open domain
    def _make_dual(self) -> Divergence:
        from fdiv.divergences.derived import from_generator

        return from_generator(
            f"dual({self.label})",
            lambda x: torch.exp(x) * self._generator(-x),
            at_zero=self.slope_at_infinity,
            slope_at_infinity=self.at_zero,
        )

    def _exact_mass(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_t = log_p - log_q
        below = log_q.exp() * self._generator(log_t.clamp(max=0.0))
        above = log_p.exp() * self._generator_over_t(log_t.clamp(min=0.0))
        return torch.where(log_t <= 0, below, above)

    def _mass(self, cells: Cells) -> Tensor:
        return self._exact_mass(cells.log_p, cells.log_q)

    def _mass_derivative(self, cells: Cells) -> Tensor:
        with torch.enable_grad():
            log_p = cells.log_p.detach().requires_grad_()
            term = self._exact_mass(log_p, cells.log_q.detach())
            return torch.autograd.grad(term.sum(), log_p)[0]

    def _generator(self, log_t: Tensor) -> Tensor:
        raise NotImplementedError

    def _generator_over_t(self, log_t: Tensor) -> Tensor:
        return self.dual()._generator(-log_t)

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        raise NotImplementedError

    def _conjugate(self, v: Tensor) -> Tensor:
        # f*(f'(t)) = t f'(t) − f(t) = −(dual f)'(1/t): with a closed dual there is no cancellation for large t.
        return -self.dual().derivative(-self._inverse_derivative(v))

    def _conjugate_at_slope(self) -> float:
        return -self.dual().derivative_at_zero

    def _inverse_derivative(self, v: Tensor) -> Tensor:
        from fdiv.divergences.rootfinding import invert_increasing

        return invert_increasing(self.derivative, v)

    def _activation(self, x: Tensor) -> Tensor:
        return x if math.isinf(self.slope_at_infinity) else self.slope_at_infinity - F.softplus(-x)


#: The smallest parameter accepted: below it reciprocals and products of the parameter leave the range of float32.
_SMALLEST_PARAMETER = 1e-30


def open_unit_interval(divergence: str, parameter: str, value: float, limits: str) -> float:
    """`value` as a float in (0, 1), or ValueError naming the divergence, the parameter, the value and the limits."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < 1.0:
        raise ValueError(
            f"{divergence}: {parameter} must be a number strictly between 0 and 1, got {value!r} ({limits})"
        )
    if value < _SMALLEST_PARAMETER:
        raise ValueError(
            f"{divergence}: {parameter} must be at least {_SMALLEST_PARAMETER:g}, got {value!r}: float32 "
            f"underflows below ({limits})"
        )
    return float(value)


def _warn_of_few_terms(label: str, terms: Tensor) -> None:
    """Warn where the largest 5 % of the terms, 1 to 10 of them, carry more than half of the sum; not under tracing."""
    few = max(1, min(10, len(terms) // 20))
    if len(terms) < 10 or torch.compiler.is_compiling():
        return
    try:
        share = (terms.detach().topk(few).values.sum() / terms.detach().sum()).item()
    except RuntimeError:  # inside vmap there is no number to look at
        return
    if share > 0.5:
        warnings.warn(
            f"estimate of {label}: {few} of {len(terms)} terms carry {share:.0%} of the sum, so the value and its "
            "standard error are not to be trusted (most often both are too small): take more samples",
            stacklevel=3,
        )


def _largest_below(bound: float, dtype: torch.dtype) -> float:
    """The largest number of `dtype` strictly below `bound` (rounding `bound` to the type may round it up)."""
    number = torch.tensor(bound, dtype=torch.float64).to(dtype)
    if number.double().item() >= bound:
        number = torch.nextafter(number, torch.tensor(-math.inf, dtype=dtype))
    return number.item()


def _finite_cells(log_p: Tensor, log_q: Tensor) -> tuple[Cells, Tensor, Tensor]:
    """The cells, with log 1 = 0 in place of those where P or Q is 0, and where those are."""
    no_p, no_q = torch.isneginf(log_p), torch.isneginf(log_q)
    empty = no_p | no_q
    return Cells(log_p.masked_fill(empty, 0.0), log_q.masked_fill(empty, 0.0)), no_p, no_q


def _mass_times(log_mass: Tensor, where: Tensor, factor: float) -> Tensor:
    """e^log_mass · factor inside `where`, 0 outside; an infinite factor carries no gradient (it would be NaN)."""
    if math.isinf(factor):
        return torch.zeros_like(log_mass).masked_fill(where, factor)
    return log_mass.masked_fill(~where, -math.inf).exp() * factor
