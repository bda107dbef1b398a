"""What `from_generator` asks of a user's f, and the limits it reads. All tests are relative: c·f passes with f."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

#: Points in log t at which f is tested; 1/t magnifies the rounding of f by e^15 = 3e6 at the left end.
_GRID = torch.linspace(-15.0, 15.0, 601, dtype=torch.float64)

#: Rounding of f, as a share of its terms, that the tests allow for.
_ROUNDING = 1e-13


def check_generator(name: str, f: Callable[[Tensor], Tensor]) -> None:
    """Raise ValueError unless `f` maps log t element-wise, is convex in t, and its gradient belongs to its values."""
    for x in (torch.zeros((), dtype=torch.float64), _GRID):
        point = x.clone().requires_grad_()
        try:
            value = f(point)
        except (RuntimeError, TypeError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{name}: f fails on a float64 tensor of log t with shape {tuple(x.shape)} that wants a gradient: "
                f"{first_line}; write f in torch operations, without in-place ones"
            ) from error
        if not isinstance(value, Tensor) or value.shape != x.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{name}: f must map log t element-wise, shape {tuple(x.shape)} to the same shape; got {got}"
            )
        if not value.requires_grad:
            raise ValueError(f"{name}: the result of f {_DETACHED}")
    try:
        gradient = torch.func.grad(lambda y: f(y).sum())(_GRID)
    except RuntimeError as error:
        raise ValueError(
            f"{name}: f cannot be differentiated by torch.func.grad: {str(error).strip().splitlines()[0]}"
        ) from error
    _check_gradient(name, value.detach(), gradient)


_DETACHED = (
    "is cut from the graph of log t (detach, .data, numpy, no_grad), or does not depend on it: "
    "f' is found by autograd, so write f in differentiable torch operations of log t"
)


def _check_gradient(name: str, value: Tensor, gradient: Tensor) -> None:
    """Convexity from the values alone, then gradients against the secants of f between neighbours of the grid."""
    t = torch.exp(_GRID)
    slope = gradient / t
    if not (torch.isfinite(value).all() and torch.isfinite(slope).all()):
        return  # reported by the checks that follow, with the place
    secant = value.diff() / t.diff()
    noise = _ROUNDING * (value.abs()[1:] + value.abs()[:-1]) / t.diff()
    allowed = 1e-7 * secant.abs() + noise
    falls = secant.diff() < -(allowed[1:] + allowed[:-1])
    if falls.any():
        at = _GRID[1:-1][falls][0].item()
        raise ValueError(f"{name}: f is not convex: its slope falls near log t = {at:g}, so D_f is not a divergence")
    # A convex f lies above its tangents: f'(a) ≤ (f(b) − f(a))/(b − a) ≤ f'(b).
    allowed = 1e-6 * (slope[1:].abs() + slope[:-1].abs() + secant.abs()) + noise
    wrong = (slope[:-1] - secant > allowed) | (secant - slope[1:] > allowed)
    if wrong.any():
        at = _GRID[1:][wrong][0].item()
        raise ValueError(
            f"{name}: the gradient of f does not belong to its values near log t = {at:g}: a part of f {_DETACHED}"
        )


def curvature_at_one(name: str, derivative: Callable[[Tensor], Tensor], slope: float) -> float:
    """f''(1), from `derivative`, f' as a function of log t. Raises ValueError unless it is positive and finite."""
    curvature = torch.func.grad(derivative)(torch.zeros((), dtype=torch.float64)).item()
    if not curvature > _ROUNDING * abs(slope) or not math.isfinite(curvature):
        raise ValueError(f"{name}: f''(1) must be positive and finite, got {curvature:g}: a kink or a flat f at t = 1")
    return curvature


def check_slopes(name: str, derivative: Callable[[Tensor], Tensor], scale: float) -> None:
    """Raise ValueError unless f' is finite and increasing on the grid; `scale` is the size of the terms of f."""
    slopes = derivative(_GRID)
    if not torch.isfinite(slopes).all():
        at = _GRID[~torch.isfinite(slopes)][0].item()
        raise ValueError(f"{name}: f'(t) is not finite at log t = {at:g}; write f in log t without overflow")
    drops = slopes.diff() < -1e-8 * (scale + slopes[1:].abs())  # rounding of f, magnified by 1/t, stays below this
    if drops.any():
        at = _GRID[1:][drops][0].item()
        raise ValueError(f"{name}: f is not convex: f'(t) falls near log t = {at:g}, so D_f is not a divergence")


def limit(name: str, what: str, function: Callable[[Tensor], Tensor], side: float, scale: float) -> float:
    """Limit of a monotone `function` of log t at ±∞, from Aitken's extrapolation on two grids within |log t| ≤ 20.

    `scale` is f''(1): values are compared in its units. Further out, autograd through `expm1` and `tanh` has lost its
    digits. What approaches a limit exponentially in log t is extrapolated alike on both grids; what grows linearly or
    faster has a ratio of increments of 1 or more. Anything else (a logarithmic approach, a mixture of slow
    exponentials) cannot be told apart, and raises ValueError. A finite limit is checked against |log t| up to 150,
    where a small share of a function without a limit shows.
    """

    def at(points: tuple[float, ...]) -> list[float]:
        return (function(side * torch.tensor(points, dtype=torch.float64)) / scale).tolist()

    guesses = []
    for grid in ((10.0, 15.0, 20.0), (12.0, 16.0, 20.0)):
        first, second, third = at(grid)
        early, late = second - first, third - second
        if abs(late) <= 1e-7 * max(1.0, abs(third)):
            guesses.append(third)
            continue
        ratio = late / early if early else math.inf
        guesses.append(math.copysign(math.inf, late) if ratio > 0.9999 else third + late * ratio / (1.0 - ratio))
    coarse, fine = guesses
    if coarse != fine and not abs(fine - coarse) <= 1e-5 * max(1.0, abs(fine)):
        raise ValueError(
            f"{name}: cannot tell whether {what} is finite from numbers "
            f"({coarse * scale:g} or {fine * scale:g}?): pass {what}="
        )
    if math.isfinite(fine):
        first, second, third = at((50.0, 100.0, 150.0))
        early, late = second - first, third - second
        near = abs(first - fine) <= 1e-4 * abs(fine)  # else the digits of f are lost there
        if near and abs(late) > 1e-12 * abs(fine) and early * late > 0 and abs(late) > 0.9999 * abs(early):
            return math.copysign(math.inf, late)
    return fine * scale
