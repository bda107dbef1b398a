"""Tests for a divergence of your own: `check_divergence(f)` holds it against what every f-divergence satisfies.

>>> import torch
>>> from fdiv.divergences import Divergence
>>> from fdiv.testing import check_divergence
>>> check_divergence(Divergence.from_generator("mine", lambda x: torch.exp(x) * x - x))  # silent: all properties hold
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fdiv.divergences import Divergence, DivergenceSpec, get_divergence
from fdiv.divergences.generator_checks import limit

__all__ = ["DivergenceError", "check_divergence"]

#: Where identities are tested: off t = 1 and off round numbers, where kinks stand.
_GRID = torch.linspace(-8.0, 8.0, 129, dtype=torch.float64) + 0.0123
_FAR = torch.cat([torch.linspace(-1e4, 1e4, 401), torch.linspace(-90.0, 90.0, 361), torch.tensor([0.0])])


class DivergenceError(AssertionError, ValueError):
    """A divergence lacks properties that every f-divergence has: a line each, with the place and the numbers."""


def check_divergence(
    divergence: DivergenceSpec | Callable[[Tensor], Tensor], *, tolerance: float = 1e-5, seed: int = 0
) -> None:
    """Raise unless `divergence` has the properties of an f-divergence that the objectives of this library rely on.

    Tested in float64 on |log t| ≤ 8, unless the property says otherwise:

    * limits: f(0⁺), f'(0⁺), f'(∞) are numbers, have the right signs, bound f and f', and are what both tend to
    * centring: f(1) = f'(1) = 0 and f ≥ 0; `curvature` is f''(1), or is refused where f' jumps at t = 1
    * convexity: f' does not fall, and every secant of f lies between the f' of its ends
    * Fenchel–Young: t·v ≤ f(t) + f*(v), with equality at v = f'(t); f*(0) = 0; f* and its gradient at both ends of the
      domain; (f')⁻¹ inverts f', or is refused
    * duality: the dual is t·f(1/t), swaps the arguments of `exact` and the limits, and its dual is f
    * the divergence: D_f(P‖P) = 0, D_f ≥ 0, `exact` is the sum of Q·f(P/Q), also with holes in the support, and
      `estimate` has that mean
    * data processing: D_f does not rise when outcomes are merged, nor through a random channel
    * finiteness: values and gradients of f, f', the capped score and the activation to |log t| = 1e4 in float32 and
      float64; no NaN from ±∞, NaN kept, half precision raised to float32, shapes kept
    * activation: increasing, below f'(∞), with a finite f*

    Args:
        divergence: a `Divergence`, a registered name, a mapping, or f itself as a torch function of log t (it goes
            through `Divergence.from_generator`).
        tolerance: relative, against the size of the terms compared. seed: of the random distributions.

    Raises:
        DivergenceError: with every property that fails; it is an AssertionError and a ValueError.
        TypeError: something that is no divergence.
    """
    if callable(divergence) and not isinstance(divergence, Divergence):
        try:
            divergence = Divergence.from_generator(getattr(divergence, "__name__", "f").strip("<>"), divergence)
        except ValueError as error:
            raise DivergenceError(str(error)) from error
    f = get_divergence(divergence)
    failures: list[str] = []
    for name, check in _CHECKS.items():
        try:
            failures += [f"{name}: {failure}" for failure in check(f, tolerance, seed)]
        except Exception as error:
            first_line = next(iter(str(error).strip().splitlines()), "")
            failures.append(f"{name}: raised {type(error).__name__}: {first_line}")
    if failures:
        raise DivergenceError(f"{f.label} is not a valid divergence here:\n  " + "\n  ".join(failures))


# ---------------------------------------------------------------- helpers
def _worst(what: str, got: Tensor, wanted: Tensor, allowed: Tensor, at: Tensor) -> Iterator[str]:
    """A failure that names the worst place where |got − wanted| > allowed, NaN counted as worst."""
    excess = torch.nan_to_num((got - wanted).abs() / allowed, nan=math.inf)
    excess = excess.masked_fill(got == wanted, 0.0)  # equal infinities
    if (excess > 1).any():
        i = int(excess.argmax())
        yield f"{what} is {got[i].item():.10g} at log t = {at[i].item():.6g}, should be {wanted[i].item():.10g}"


def _first(what: str, wrong: Tensor, at: Tensor) -> Iterator[str]:
    if wrong.any():
        yield f"{what} at log t = {at[wrong][0].item():.6g}"


def _scale(f: Divergence) -> float:
    """The size of f near t = 1: all tolerances are in its units."""
    return f.generator(torch.tensor([-1.0, 1.0], dtype=torch.float64)).abs().sum().item()


def _has_curvature(f: Divergence) -> bool:
    try:
        _ = f.curvature
    except ValueError:
        return False
    return True


def _smooth(f: Divergence, tolerance: float) -> Tensor:
    """Bool per point of the grid: f' is continuous and rising there, so that it can be inverted."""
    h = 1e-4
    left, right = f.derivative(_GRID - h), f.derivative(_GRID + h)
    rise = right - left
    wide = f.derivative(_GRID + 20 * h) - f.derivative(_GRID - 20 * h)
    return (rise > 1e-7 * (left.abs() + right.abs())) & (rise < 0.5 * wide) & torch.isfinite(rise)


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    point = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(point).sum(), point, materialize_grads=True)
    return gradient


# ---------------------------------------------------------------- the properties: each yields its failures
def _check_limits(f: Divergence, tolerance: float, seed: int) -> Iterator[str]:
    scale = _scale(f)
    for what, sign in (("at_zero", 1), ("derivative_at_zero", -1), ("slope_at_infinity", 1)):
        value = getattr(f, what)
        if not isinstance(value, int | float) or not value * sign > 0:
            yield f"{what} is {value!r}, should be {'> 0' if sign > 0 else '< 0'}: f is convex with f(1) = f'(1) = 0"
            return
    for what, function, side in (
        ("at_zero", f.generator, -1.0),
        ("derivative_at_zero", f.derivative, -1.0),
        ("slope_at_infinity", f.derivative, 1.0),
    ):
        given = getattr(f, what)
        end = function(torch.tensor([side * math.inf], dtype=torch.float64)).item()
        if not math.isclose(end, given, rel_tol=tolerance):
            yield f"{what} is {given:g}, but the function gives {end:g} at log t = {side * math.inf}"
        if math.isfinite(given):
            x = side * torch.linspace(0.1, 30.0, 300, dtype=torch.float64)
            rounding = 1e-15 * scale * torch.exp(x.abs()) if what == "derivative_at_zero" else 0.0
            beyond = function(x).abs() - abs(given) > tolerance * (scale + abs(given)) + rounding
            yield from _first(f"{what} is {given:g}, but the function goes beyond it", beyond, x)
        try:
            found = limit(f.label, what, function, side, scale)
        except ValueError:
            continue  # a slow approach: numbers cannot tell
        far = function(torch.tensor([side * 30.0], dtype=torch.float64)).item()
        if math.isinf(found) and abs(far) < abs(given):
            continue  # a limit further out than the numbers go
        if not math.isclose(found, given, rel_tol=1e-3, abs_tol=tolerance * scale):
            yield f"{what} is {given:g}, but the numbers tend to {found:g}"


def _check_centring(f: Divergence, tolerance: float, seed: int) -> Iterator[str]:
    scale = _scale(f)
    if not 0 < scale < math.inf:
        yield f"f(e) + f(1/e) is {scale:g}: f must be positive away from t = 1"
        return
    one = torch.zeros(1, dtype=torch.float64)
    for what, value in (("f(1)", f.generator(one).item()), ("f'(1)", f.derivative(one).item())):
        if not abs(value) <= tolerance * scale:
            yield f"{what} is {value:g}, should be 0: centre f"
    values = f.generator(_GRID)
    yield from _first("f is negative or not a number", ~(values >= -tolerance * scale), _GRID)
    h = 1e-4
    near = f.derivative(torch.tensor([-h, h], dtype=torch.float64))
    if _has_curvature(f):
        second = ((near[1] - near[0]) / (math.exp(h) - math.exp(-h))).item()
        if not math.isclose(second, f.curvature, rel_tol=1e-3):
            yield f"curvature is {f.curvature:g}, but f' rises by {second:g} per unit of t at t = 1"
        if f.normalized().curvature != 1.0 and not math.isclose(f.normalized().curvature, 1.0, rel_tol=tolerance):
            yield f"normalized().curvature is {f.normalized().curvature:g}, should be 1"
    elif near[1] - near[0] < 1e-2 * scale:
        yield "curvature is refused, but f' does not jump at t = 1"


def _check_convexity(f: Divergence, tolerance: float, seed: int) -> Iterator[str]:
    t, value, slope, scale = _GRID.exp(), f.generator(_GRID), f.derivative(_GRID), _scale(f)
    noise = tolerance * (scale + slope.abs())
    yield from _first("f is not convex: f' falls", slope.diff() < -noise[1:], _GRID[1:])
    rounding = 1e-12 * (value.abs()[1:] + value.abs()[:-1] + scale) / t.diff()
    secant = value.diff() / t.diff()
    yield from _first(
        "f' is above the secant of f that begins", slope[:-1] - secant > noise[:-1] + rounding, _GRID[:-1]
    )
    yield from _first("f' is below the secant of f that ends", secant - slope[1:] > noise[1:] + rounding, _GRID[1:])
    gradient = _gradient(f.generator, _GRID) / t
    smooth = _smooth(f, tolerance)
    allowed = 10 * noise + 1e-12 * (value.abs() + scale) / t
    yield from _worst("autograd's derivative of f", gradient[smooth], slope[smooth], allowed[smooth], _GRID[smooth])


def _check_fenchel_young(f: Divergence, tolerance: float, seed: int) -> Iterator[str]:
    t, value, slope, scale = _GRID.exp(), f.generator(_GRID), f.derivative(_GRID), _scale(f)
    low, high = f.conjugate_domain
    inside = (slope > low) & (slope < high)
    x, v, own = _GRID[inside], slope[inside], t[inside] * slope[inside]
    conjugate = f.conjugate(v)
    size = tolerance * (scale + value[inside].abs() + own.abs() + t[inside] * 1e-9 * scale)
    yield from _worst("f*(f'(t))", conjugate, own - value[inside], size, x)
    gap = value[:, None] + conjugate - t[:, None] * v
    room = tolerance * (scale + value[:, None].abs() + conjugate.abs() + (t[:, None] * v).abs())
    if (gap < -room).any():
        i, j = divmod(int((gap / room).argmin()), len(v))
        yield f"t·v > f(t) + f*(v) at log t = {_GRID[i].item():.6g}, v = {v[j].item():.6g}: f* is too small"
    zero = f.conjugate(torch.zeros(1, dtype=torch.float64)).item()
    if not abs(zero) <= tolerance * scale:
        yield f"f*(0) is {zero:g}, should be −min f = 0"
    smooth = _smooth(f, tolerance)[inside]
    gradient = _gradient(f.conjugate, v)
    yield from _worst(
        "the gradient of f*", gradient[smooth], t[inside][smooth], 1e-3 * (1 + t[inside][smooth]), x[smooth]
    )
    yield from _check_ends_of_the_conjugate(f, low, high, tolerance)
    try:
        back = f.inverse_derivative(v)
    except ValueError:
        if _has_curvature(f):
            yield "inverse_derivative is refused, but f has a curvature"
        return
    yield from _worst("(f')⁻¹ of f'(t)", back[smooth], x[smooth], 1e-3 * (1 + x[smooth].abs()), x[smooth])


def _check_ends_of_the_conjugate(f: Divergence, low: float, high: float, tolerance: float) -> Iterator[str]:
    if math.isfinite(low):
        got = f.conjugate(torch.tensor([low, low - 1 - abs(low)], dtype=torch.float64)).tolist()
        if not all(math.isclose(value, -f.at_zero, rel_tol=tolerance) for value in got):
            yield f"f* at and below f'(0+) is {got}, should be −f(0+) = {-f.at_zero:g}"
    if math.isfinite(high):
        (got,) = f.conjugate(torch.tensor([high + 1 + abs(high)], dtype=torch.float64)).tolist()
        if got != math.inf:
            yield f"f* above f'(∞) is {got:g}, should be inf"


def _check_duality(f: Divergence, tolerance: float, seed: int) -> Iterator[str]:
    dual, scale, t = f.dual(), _scale(f), _GRID.exp()
    wanted = t * f.generator(-_GRID)
    allowed = 10 * tolerance * (scale * (1 + t) + wanted.abs())
    yield from _worst("the dual's generator", dual.generator(_GRID), wanted, allowed, _GRID)
    twice = dual.dual().generator(_GRID)
    yield from _worst("the dual of the dual", twice, f.generator(_GRID), allowed + allowed.flip(0), _GRID)
    for ours, theirs in (("at_zero", "slope_at_infinity"), ("slope_at_infinity", "at_zero")):
        got, want = getattr(dual, ours), getattr(f, theirs)
        if not math.isclose(got, want, rel_tol=tolerance):
            yield f"the dual's {ours} is {got:g}, should be {theirs} of f, {want:g}"
    log_p, log_q = _distributions(seed)
    got, want = dual.exact(log_p, log_q), f.exact(log_q, log_p)
    if not torch.allclose(got, want, rtol=10 * tolerance, atol=tolerance * scale):
        yield f"exact(P, Q) of the dual is {got[0].item():g}, but exact(Q, P) is {want[0].item():g}"


def _check_divergence_itself(f: Divergence, tolerance: float, seed: int) -> Iterator[str]:
    log_p, log_q = _distributions(seed)
    scale, exact = _scale(f), f.exact(log_p, log_q)
    by_hand = (log_q.exp() * f.generator(log_p - log_q)).sum(-1)
    if not torch.allclose(exact, by_hand, rtol=tolerance, atol=tolerance * scale):
        yield f"exact is {exact[0].item():g}, but the sum of Q·f(P/Q) is {by_hand[0].item():g}"
    if not (exact >= -tolerance * scale).all():
        yield f"exact is negative: {exact.min().item():g}"
    same = f.exact(log_p, log_p).abs().max().item()
    if not same <= tolerance * scale:
        yield f"D_f(P‖P) is {same:g}, should be 0"
    half, none = math.log(0.5), -math.inf
    holes = f.exact(
        torch.tensor([half, half, none], dtype=torch.float64), torch.tensor([half, none, half], dtype=torch.float64)
    ).item()
    if not math.isclose(holes, 0.5 * (f.at_zero + f.slope_at_infinity), rel_tol=tolerance):
        yield f"exact with holes in the support is {holes:g}, should be ½f(0+) + ½f'(∞)"
    for law, log_law in (("q", log_q[0]), ("p", log_p[0])):
        terms = torch.stack([f.estimate(one, sampled_from=law).value for one in log_p[0] - log_q[0]])
        mean = (log_law.exp() * terms).sum().item()
        if not math.isclose(mean, exact[0].item(), rel_tol=10 * tolerance, abs_tol=tolerance * scale):
            yield f"the mean of estimate(sampled_from={law!r}) is {mean:g}, but exact is {exact[0].item():g}"


def _check_data_processing(f: Divergence, tolerance: float, seed: int) -> Iterator[str]:
    log_p, log_q = _distributions(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    before, room = f.exact(log_p, log_q), tolerance * _scale(f)
    size = log_p.size(-1)
    merge = torch.zeros(size, size // 2, dtype=torch.float64)
    merge[torch.arange(size), torch.arange(size) % (size // 2)] = 1.0
    channel = torch.rand(size, size, generator=generator, dtype=torch.float64)
    for what, kernel in (("merging outcomes", merge), ("a random channel", channel / channel.sum(-1, keepdim=True))):
        after = f.exact((log_p.exp() @ kernel).log(), (log_q.exp() @ kernel).log())
        rise = after - before * (1 + tolerance)
        if (rise > room).any():
            i = int(rise.argmax())
            yield f"{what} raises D_f from {before[i].item():g} to {after[i].item():g}: f is not convex"


def _distributions(seed: int) -> tuple[Tensor, Tensor]:
    """Twenty pairs of categorical distributions over eight outcomes, from near to far apart."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.2, 2.0, 20, dtype=torch.float64)[:, None]
    p, q = (torch.randn(20, 8, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    return torch.log_softmax(p, -1), torch.log_softmax(q, -1)


def _check_finiteness(f: Divergence, tolerance: float, seed: int) -> Iterator[str]:
    functions = {
        "generator": f.generator,
        "derivative": f.derivative,
        "score with max_exponent 10": lambda x: f.score(x, 10.0),
        "activation": f.activation,
    }
    for what, function in functions.items():
        for dtype in (torch.float32, torch.float64):
            x = _FAR.to(dtype)
            value, gradient = function(x), _gradient(function, x)
            yield from _first(f"{what} in {dtype} is not finite", ~torch.isfinite(value), x)
            yield from _first(f"the gradient of {what} in {dtype} is not finite", ~torch.isfinite(gradient), x)
            if value.dtype != dtype or value.shape != x.shape:
                yield f"{what} of {dtype} {tuple(x.shape)} is {value.dtype} {tuple(value.shape)}"
        if what != "activation":
            ends = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
            if torch.isnan(function(ends)).any() or torch.isnan(_gradient(function, ends)).any():
                yield f"{what} or its gradient is NaN at log t = ±inf"
        if not torch.isnan(function(torch.tensor([math.nan]))).all():
            yield f"{what} hides a NaN"
        if function(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype != torch.float32:
            yield f"{what} of bfloat16 is not float32"
        if function(torch.zeros(0)).shape != (0,):
            yield f"{what} of an empty tensor is not empty"


def _check_activation(f: Divergence, tolerance: float, seed: int) -> Iterator[str]:
    x = torch.linspace(-5.0, 5.0, 101, dtype=torch.float64)
    value = f.activation(x)
    yield from _first("g_f does not rise (x in place of log t)", value.diff() <= 0, x[1:])
    yield from _first("g_f is not below f'(∞) (x in place of log t)", value >= f.slope_at_infinity, x)
    yield from _first("f*(g_f) is not finite (x in place of log t)", ~torch.isfinite(f.conjugate(value)), x)


_CHECKS: dict[str, Callable[[Divergence, float, int], Iterator[str]]] = {
    "limits": _check_limits,
    "centring": _check_centring,
    "convexity": _check_convexity,
    "Fenchel–Young": _check_fenchel_young,
    "duality": _check_duality,
    "the divergence": _check_divergence_itself,
    "data processing": _check_data_processing,
    "finiteness": _check_finiteness,
    "activation": _check_activation,
}
