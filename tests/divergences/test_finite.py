"""Finite values and gradients far outside the exact range, the overflow policy, and the behaviour at ±∞."""

import math

import pytest
import torch

from fdiv.divergences import get_divergence
from tests.divergences.reference import IDS, REFERENCES

SPECS = [r.spec for r in REFERENCES]
FAR = torch.cat([torch.linspace(-1e4, 1e4, 2001), torch.linspace(-100, 100, 1601), torch.tensor([0.0, 1e-30, -1e-30])])
every = pytest.mark.parametrize("spec", SPECS, ids=IDS)


def value_and_gradient(function, x):
    x = x.detach().clone().requires_grad_()
    value = function(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["generator", "derivative", "activation"])
def test_finite_to_1e4(spec, dtype, name):
    value, gradient = value_and_gradient(getattr(get_divergence(spec), name), FAR.to(dtype))
    assert value.dtype == (dtype if dtype in (torch.float32, torch.float64) else torch.float32)
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all()


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_inverse_functions_are_finite_inside_the_domain(spec, dtype):
    divergence = get_divergence(spec)
    if divergence.name == "total_variation":
        v = torch.linspace(-0.4999, 0.4999, 101).to(dtype)
        functions = [divergence.conjugate]
    else:
        low, high = divergence.conjugate_domain
        v = divergence.derivative(FAR.to(dtype)).detach()
        v = v[(v.double() > low) & (v.double() < high)]
        functions = [divergence.conjugate, divergence.inverse_derivative]
    assert len(v) > 50
    for function in functions:
        value, gradient = value_and_gradient(function, v)
        assert torch.isfinite(value).all() and torch.isfinite(gradient).all()


@every
def test_half_precision_is_computed_in_float32(spec):
    divergence = get_divergence(spec)
    for half in (torch.bfloat16, torch.float16):
        x = torch.linspace(-9, 9, 37, dtype=half)
        for function in (divergence.generator, divergence.derivative, divergence.activation, divergence.conjugate):
            assert function(x).dtype == torch.float32
            assert torch.equal(function(x), function(x.float()))


@every
def test_generator_stays_non_negative_and_monotone_on_each_side(spec):
    divergence = get_divergence(spec)
    right = divergence.generator(torch.logspace(-3, 4, 400, dtype=torch.float64))
    left = divergence.generator(-torch.logspace(-3, 4, 400, dtype=torch.float64))
    for side in (right, left):
        assert (side > 0).all()
        assert (side.diff() >= 0).all()


@every
def test_derivative_is_monotone_and_zero_at_one(spec):
    divergence = get_divergence(spec)
    slope = divergence.derivative(torch.linspace(-1e4, 1e4, 20001, dtype=torch.float64))
    assert (slope.diff() >= -1e-15).all()
    for dtype in (torch.float32, torch.float64):
        assert divergence.derivative(torch.zeros(1, dtype=dtype)).item() == 0.0
        assert divergence.generator(torch.zeros(1, dtype=dtype)).item() == 0.0


@every
@pytest.mark.parametrize("cap", [5.0, 10.0, 20.0, None])
def test_overflow_policy(spec, cap):
    """Exact bit for bit below the cap; above it C¹, growing, with a gradient that is neither 0 nor inf."""
    divergence = get_divergence(spec)
    if not divergence.exponents:
        x = FAR
        assert torch.equal(divergence.score(x, cap), divergence.derivative(x))
        assert not divergence.capped(x, cap).any()
        return
    limit = 60.0 if cap is None else cap
    (rate,) = divergence.exponents
    edge = limit / rate  # log t at which e^(rate·log t) reaches the cap
    inside = edge * torch.linspace(-1.0, 0.9999, 101)
    assert torch.equal(divergence.score(inside, cap), divergence.derivative(inside))
    assert not divergence.capped(inside, cap).any()
    outside = edge * torch.logspace(0.001, math.log10(1e4 / abs(edge)), 101)
    assert divergence.capped(outside, cap).all()
    value, gradient = value_and_gradient(lambda x: divergence.score(x, cap), outside)
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all() and (gradient > 0).all()
    # C¹: value and slope agree across the edge, where both grow by at most the step
    step = 1e-7 * edge
    two = torch.tensor([edge - step, edge + step], dtype=torch.float64)
    value, gradient = value_and_gradient(lambda x: divergence.score(x, cap), two)
    assert value[1].item() == pytest.approx(value[0].item(), rel=1e-4)
    assert gradient[1].item() == pytest.approx(gradient[0].item(), rel=1e-4)


def test_the_continuation_by_hand():
    """forward_kl at log t = −12 with cap 10: −(e^10 (1 + log 3) − 1); its slope in log t is e^10 / 3."""
    value, gradient = value_and_gradient(
        lambda x: get_divergence("forward_kl").score(x, 10.0), torch.tensor([-12.0], dtype=torch.float64)
    )
    assert value.item() == pytest.approx(1.0 - math.exp(10.0) * (1.0 + math.log(3.0)), rel=1e-14)
    assert gradient.item() == pytest.approx(math.exp(10.0) / 3.0, rel=1e-14)


@pytest.mark.parametrize("cap", [0.0, -1.0, 81.0, math.nan, math.inf])
def test_max_exponent_outside_its_range(cap):
    with pytest.raises(ValueError, match="max_exponent"):
        get_divergence("forward_kl").score(torch.zeros(1), cap)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_ends(spec, dtype):
    divergence = get_divergence(spec)
    ends = torch.tensor([-math.inf, math.inf, 1.0], dtype=dtype)
    slope, gradient = value_and_gradient(divergence.derivative, ends)
    assert not torch.isnan(gradient).any()
    if dtype == torch.float64:  # the limits are kept to the last bit of float64
        zero = torch.tensor([-math.inf], dtype=dtype)
        assert divergence.generator(zero).item() == divergence.at_zero
    assert slope[0].item() == pytest.approx(divergence.derivative_at_zero)
    assert slope[1].item() == pytest.approx(divergence.slope_at_infinity)
    value, gradient = value_and_gradient(divergence.generator, ends)
    assert not torch.isnan(gradient).any()
    assert value[0].item() == pytest.approx(divergence.at_zero)
    assert value[1].item() == math.inf


@every
def test_nan_is_not_hidden(spec):
    divergence = get_divergence(spec)
    x = torch.tensor([math.nan])
    for function in (divergence.generator, divergence.derivative, divergence.conjugate, divergence.activation):
        assert torch.isnan(function(x)).all(), function


@every
def test_conjugate_outside_the_range_of_the_derivative(spec):
    divergence = get_divergence(spec)
    low, high = divergence.conjugate_domain
    if not math.isinf(low):
        v = torch.tensor([low, low - 1e-6, low - 5.0], dtype=torch.float64)
        assert divergence.conjugate(v).tolist() == [-divergence.at_zero] * 3
    if not math.isinf(high):
        v = torch.tensor([high + 1e-6, high + 5.0], dtype=torch.float64)
        assert divergence.conjugate(v).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize(
    ("name", "limit"), [("neyman_chi2", 2.0), ("le_cam", 3.0), ("total_variation", 0.5), ("forward_kl", math.inf)]
)
def test_conjugate_at_the_end_of_its_domain(name, limit):
    """sup over t of t f'(∞) − f(t), by hand: finite for these three, infinite for forward KL."""
    divergence = get_divergence(name)
    v = torch.tensor([divergence.slope_at_infinity], dtype=torch.float64)
    assert divergence.conjugate(v).item() == limit


@pytest.mark.parametrize("values", [torch.arange(3), torch.tensor([True]), torch.tensor([1j])], ids=str)
def test_refuses_other_types(values):
    with pytest.raises(TypeError, match="floating-point"):
        get_divergence("reverse_kl").generator(values)


def test_total_variation_has_no_curvature_inverse_or_normalized():
    tv = get_divergence("total_variation")
    with pytest.raises(ValueError, match="kink"):
        _ = tv.curvature
    with pytest.raises(ValueError, match="kink"):
        tv.normalized()
    with pytest.raises(ValueError, match="no inverse derivative"):
        tv.inverse_derivative(torch.zeros(1))


@every
def test_scores_work_under_torch_func_and_twice(spec):
    """A per-example gradient by vmap(grad), and f'' by a second backward, equal plain autograd and differences."""
    divergence = get_divergence(spec)
    x = torch.linspace(-3, 3, 7, dtype=torch.float64) + 0.05
    _, plain = value_and_gradient(divergence.derivative, x)
    mapped = torch.func.vmap(torch.func.grad(lambda one: divergence.derivative(one).sum()))(x)
    torch.testing.assert_close(mapped, plain)
    if divergence.name == "total_variation":
        return
    point = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(divergence.derivative(point).sum(), point, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), point) if first.requires_grad else (torch.zeros_like(x),)
    h = 1e-5
    difference = (
        value_and_gradient(divergence.derivative, x + h)[1] - value_and_gradient(divergence.derivative, x - h)[1]
    ) / (2 * h)
    torch.testing.assert_close(second, difference, rtol=1e-5, atol=1e-8)


def test_the_gradient_of_a_decaying_exponential_keeps_its_digits():
    """d/dx −expm1(−x) = e^−x: autograd's own backward gives 0 at x = 30 in float32."""
    _, gradient = value_and_gradient(get_divergence("forward_kl").derivative, torch.tensor([30.0]))
    assert gradient.item() == pytest.approx(math.exp(-30.0), rel=1e-6)
