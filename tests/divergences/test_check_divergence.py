"""`check_divergence`: silent on every divergence of the library, and each property is caught by one that lacks it."""

import math

import pytest
import torch
import torch.nn.functional as F

from fdiv.divergences import Divergence, get_divergence
from fdiv.divergences.bounded import LeCam
from fdiv.divergences.logarithmic import ForwardKL, ReverseKL
from fdiv.testing import DivergenceError, check_divergence
from tests.divergences.reference import IDS, REFERENCES
from tests.divergences.test_registry import USER

MORE = {
    "scaled": get_divergence("le_cam").scaled(1e-9),
    "sum": get_divergence("jeffreys") + get_divergence("pearson_chi2"),
    "sum with a kink": get_divergence("tv") + get_divergence("reverse_kl"),
    "dual of a user's": Divergence.from_generator("own", lambda x: x.exp() * x - x).dual(),
    "a kink away from 1": lambda x: x.exp() * x + 3 * F.relu(x.exp() - 3),
    "a flat piece": lambda x: torch.where(x.exp() < 2, (x.exp() - 1) ** 2, 2 * x.exp() - 3),
    "small": lambda x: 1e-9 * x.exp() * x,
    **{f"weight {w:g}": {"name": "skew_jensen_shannon", "weight": w} for w in (1e-20, 1e-9, 1 - 1e-12)},
    **{f"alpha {a:g}": {"name": "alpha", "alpha": a} for a in (1e-12, 1e-6, 1 - 1e-12)},
}


@pytest.mark.parametrize("spec", [r.spec for r in REFERENCES], ids=IDS)
def test_every_entry_passes(spec):
    check_divergence(spec)
    check_divergence(get_divergence(spec).dual())


@pytest.mark.parametrize("f", MORE.values(), ids=MORE)
def test_derived_ones_pass(f):
    check_divergence(f)


@pytest.mark.parametrize("name", sorted(USER))
def test_generators_of_a_user_pass(name):
    check_divergence(USER[name])


def broken(base=ReverseKL, **members):
    return type("Broken", (base,), {"name": "broken", **members})()


BROKEN = {
    "limits: slope_at_infinity is 5": broken(slope_at_infinity=5.0),
    "limits: slope_at_infinity is inf, but the function gives 1": broken(ForwardKL, slope_at_infinity=math.inf),
    "limits: derivative_at_zero is 3.0, should be < 0": broken(derivative_at_zero=3.0),
    "limits: at_zero is 2, but the function gives": broken(
        at_zero=2.0, generator=lambda self, x: ReverseKL.generator(ReverseKL(), x)
    ),
    "limits: at_zero is nan": broken(at_zero=math.nan),
    "centring: f\\(1\\) is 0.5": broken(_generator=lambda self, x: ReverseKL._generator(self, x) + 0.5),
    "centring: f'\\(1\\) is 0.5": broken(_score=lambda self, x, cap: x + 0.5),
    "centring: curvature is 3": broken(curvature=3.0),
    "convexity: f is not convex": broken(_score=lambda self, x, cap: torch.sin(x)),
    "convexity: f' is (above|below) the secant": broken(_score=lambda self, x, cap: 1.2 * x),
    "Fenchel–Young: f\\*\\(f'\\(t\\)\\)": broken(_conjugate=lambda self, v: 1.1 * torch.expm1(v)),
    "Fenchel–Young: t·v > f\\(t\\) \\+ f\\*\\(v\\)": broken(_conjugate=lambda self, v: 0.9 * torch.expm1(v)),
    "Fenchel–Young: f\\*\\(0\\)": broken(_conjugate=lambda self, v: torch.expm1(v) + 1.0),
    "Fenchel–Young: the gradient of f\\*": broken(_conjugate=lambda self, v: torch.expm1(v.detach()) + 0 * v),
    "Fenchel–Young: \\(f'\\)⁻¹": broken(_inverse_derivative=lambda self, v: 2 * v),
    "Fenchel–Young: f\\* at and below": broken(
        LeCam, conjugate=lambda self, v: LeCam.conjugate(self, v).clamp(min=-0.9)
    ),
    "Fenchel–Young: inverse_derivative is refused": broken(
        inverse_derivative=lambda self, v: get_divergence("tv").inverse_derivative(v)
    ),
    "duality: the dual's generator": broken(_make_dual=lambda self: ReverseKL()),
    "duality: the dual's at_zero": broken(_make_dual=lambda self: ReverseKL()),
    "the divergence: exact is": broken(exact=lambda self, p, q: ReverseKL.exact(self, p, q) + 0.1),
    "the divergence: D_f\\(P‖P\\)": broken(exact=lambda self, p, q: ReverseKL.exact(self, p, q) + 0.1),
    "data processing: merging outcomes raises": broken(exact=lambda self, p, q: -ReverseKL.exact(self, p, q)),
    "finiteness: derivative in torch.float32 is not finite": broken(
        ForwardKL, _score=lambda self, x, cap: 1 - torch.exp(-x)
    ),
    "finiteness: derivative hides a NaN": broken(_score=lambda self, x, cap: torch.nan_to_num(x)),
    "activation: g_f does not rise": broken(_activation=lambda self, x: -x),
    "activation: f\\*\\(g_f\\) is not finite": broken(ForwardKL, activation=lambda self, x: x + 1.0),
    "convexity: raised NotImplementedError": broken(_score=Divergence._score),
}


@pytest.mark.parametrize(("message", "f"), BROKEN.items(), ids=BROKEN)
def test_each_property_is_caught(message, f):
    with pytest.raises(DivergenceError, match=message) as error:
        check_divergence(f)
    assert isinstance(error.value, AssertionError) and isinstance(error.value, ValueError)
    assert str(error.value).startswith("broken is not a valid divergence here:\n  ")


def test_a_function_that_is_no_generator():
    def squared_po(x):
        return 0.5 * x * x

    with pytest.raises(DivergenceError, match="squared_po: f is not convex"):
        check_divergence(squared_po)
    with pytest.raises(ValueError, match="unknown divergence"):
        check_divergence("revers_kl")
    with pytest.raises(TypeError, match="float"):
        check_divergence(0.5)
