"""Derivatives of every order and mode: second derivatives, forward mode, vmap, and whole graphs under torch.compile."""

import math

import pytest
import torch
import torch.nn.functional as F

from fdiv.divergences import Divergence, get_divergence
from fdiv.divergences.rootfinding import solve_x_plus_expm1
from tests.divergences.reference import IDS, REFERENCES

SPECS = [r.spec for r in REFERENCES]
MADE = {
    "scaled": lambda: get_divergence("chi2_kl").scaled(2.5),
    "sum": lambda: get_divergence("jeffreys") + get_divergence("pearson_chi2"),
    "own": lambda: Divergence.from_generator("own", lambda x: torch.exp(x) * x - x),
    "own, with a kink": lambda: Divergence.from_generator("kink", lambda x: x.exp() * x + 3 * F.relu(x.exp() - 3)),
}
ALL = [*[pytest.param(lambda s=s: get_divergence(s), id=i) for s, i in zip(SPECS, IDS, strict=True)],
       *[pytest.param(make, id=name) for name, make in MADE.items()]]  # fmt: skip
X = torch.linspace(-3, 3, 13, dtype=torch.float64) + 0.03


def members(f: Divergence):
    """Every function of one tensor, with points inside its domain."""
    yield "generator", f.generator, X
    yield "derivative", f.derivative, X
    yield "score", lambda x: f.score(x, 2.0), X
    yield "activation", f.activation, X
    if f.name == "total_variation":
        yield "conjugate", f.conjugate, X / 8
        return
    v = f.derivative(X).detach()
    yield "inverse_derivative", f.inverse_derivative, v
    yield "conjugate", f.conjugate, v


def gradient(function, x, create_graph=False):
    point = x if create_graph else x.detach().requires_grad_()
    (value,) = torch.autograd.grad(function(point).sum(), point, create_graph=create_graph, materialize_grads=True)
    return value


@pytest.mark.parametrize("make", ALL)
def test_second_derivatives_are_the_derivative_of_the_first(make):
    """By central differences of the first derivative in float64."""
    for name, function, x in members(make()):
        point = x.clone().requires_grad_()
        first = gradient(function, point, create_graph=True)
        second = torch.autograd.grad(first.sum(), point)[0] if first.requires_grad else torch.zeros_like(x)
        h = 1e-5 * (1 + x.abs()).clamp(max=30)
        difference = (gradient(function, x + h) - gradient(function, x - h)) / (2 * h)
        scale = difference.abs().clamp(min=1e-3)
        assert ((second - difference).abs() / scale).max() < 1e-4, name


@pytest.mark.parametrize("make", ALL)
def test_forward_mode_equals_reverse_mode(make):
    for name, function, x in members(make()):
        reverse = gradient(function, x)
        value, forward = torch.func.jvp(function, (x,), (torch.ones_like(x),))
        torch.testing.assert_close(forward, reverse, rtol=1e-9, atol=1e-12, msg=name)
        assert torch.equal(value, function(x)), name
        # forward over reverse: a Hessian-vector product
        _, mixed = torch.func.jvp(torch.func.grad(lambda y: function(y).sum()), (x,), (torch.ones_like(x),))  # noqa: B023
        point = x.clone().requires_grad_()
        first = gradient(function, point, create_graph=True)
        second = torch.autograd.grad(first.sum(), point)[0] if first.requires_grad else torch.zeros_like(x)
        torch.testing.assert_close(mixed, second, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("make", ALL)
def test_vmap_of_the_gradient(make):
    for name, function, x in members(make()):
        mapped = torch.func.vmap(torch.func.grad(function))(x)
        torch.testing.assert_close(mapped, gradient(function, x), rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("spec", list({get_divergence(s).name: s for s in SPECS}.values()), ids=str)
def test_compiles_without_a_graph_break(spec):
    """All members in one function: fullgraph=True raises at a break; values and gradients equal those of eager mode."""
    f = get_divergence(spec)
    torch._dynamo.reset()
    log_q = torch.log_softmax(torch.linspace(-1, 1, 6, dtype=torch.float64), -1)

    def everything(x, v):
        parts = [f.generator(x), f.derivative(x), f.score(x, 2.0), f.activation(x), f.conjugate(v)]
        parts += [f.estimate(x).value, f.estimate(x, sampled_from="p").standard_error, f.dual().generator(x)]
        parts += [f.exact(torch.log_softmax(x, -1), log_q), f.capped(x, 2.0).sum()]
        if f.name != "total_variation":
            parts += [f.inverse_derivative(v), f.normalized().derivative(x)]
        return torch.stack([part.sum() for part in parts])

    compiled = torch.compile(everything, fullgraph=True, backend="eager")
    x = torch.linspace(-2, 2, 6, dtype=torch.float64)
    v = f.derivative(x) * 0.9
    results = []
    for function in (everything, compiled):
        inputs = x.clone().requires_grad_(), v.clone().requires_grad_()
        value = function(*inputs)
        results.append([value.detach(), *torch.autograd.grad(value.sum(), inputs)])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-12, atol=1e-14)


def test_second_derivatives_by_hand():
    """jeffreys: f' = log t + 1 − 1/t, so x' = 1/(1 + 1/t) and (f*)'' = t·x'; at t = 2: 2/3 and 4/3.

    chi2_kl: f' = t − 1 + log t, x' = 1/(1 + t) and (f*)'' = t·x'; at t = 2: 1/3 and 2/3. x'' = x'·d(x')/dx.
    """
    x = torch.tensor([math.log(2.0)], dtype=torch.float64)
    for name, first, second in (("jeffreys", 2 / 3, 2 / 3 * (2 / 9)), ("chi2_kl", 1 / 3, 1 / 3 * (-2 / 9))):
        f = get_divergence(name)
        v = f.derivative(x).requires_grad_()
        slope = gradient(f.inverse_derivative, v, create_graph=True)
        assert slope.item() == pytest.approx(first, rel=1e-13)
        assert torch.autograd.grad(slope, v)[0].item() == pytest.approx(second, rel=1e-12)
        t = gradient(f.conjugate, v, create_graph=True)
        assert t.item() == pytest.approx(2.0, rel=1e-13)
        assert torch.autograd.grad(t, v)[0].item() == pytest.approx(2.0 * first, rel=1e-12)


def test_newton_carries_three_derivatives():
    """y + e^y − 1 = v at y = 0: y' = 1/2, y'' = −e^y y'³ = −1/8, y''' = −1/32 + 3/32 … by the implicit function."""
    v = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    value = solve_x_plus_expm1(v)
    got = []
    for _ in range(3):
        (value,) = torch.autograd.grad(value.sum(), v, create_graph=True)
        got.append(value.item())
    # y' = 1/(1+e^y); y'' = −e^y/(1+e^y)³; y''' = e^y(2e^y − 1)/(1+e^y)^5
    assert got == pytest.approx([0.5, -0.125, 1 / 32], rel=1e-12)
