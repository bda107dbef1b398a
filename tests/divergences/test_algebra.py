"""dual, scaled, normalized, +, Fenchel–Young, exact and estimate: against each other and against hand values."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdiv.divergences import get_divergence
from tests.divergences.reference import IDS, REFERENCES

SPECS = [r.spec for r in REFERENCES]
every = pytest.mark.parametrize("spec", SPECS, ids=IDS)
smooth = pytest.mark.parametrize("spec", [s for s in SPECS if s != "total_variation"], ids=[i for i in IDS if i != "total_variation"])  # fmt: skip
X = torch.linspace(-8, 8, 161, dtype=torch.float64)

DUAL_PAIRS = [
    ("reverse_kl", "forward_kl"),
    ("jensen_shannon", "jensen_shannon"),
    ("jeffreys", "jeffreys"),
    ("squared_hellinger", "squared_hellinger"),
    ("neyman_chi2", "pearson_chi2"),
    ("le_cam", "le_cam"),
    ("total_variation", "total_variation"),
    ({"name": "alpha", "alpha": 0.3}, {"name": "alpha", "alpha": 0.7}),
    ({"name": "skew_jensen_shannon", "weight": 0.2}, {"name": "skew_jensen_shannon", "weight": 0.8}),
]


@every
def test_dual_is_t_f_of_one_over_t(spec):
    f, dual = get_divergence(spec), get_divergence(spec).dual()
    torch.testing.assert_close(dual.generator(X), X.exp() * f.generator(-X), rtol=1e-9, atol=1e-12)
    # (t f(1/t))' = f(1/t) − f'(1/t)/t
    torch.testing.assert_close(
        dual.derivative(X), f.generator(-X) - (-X).exp() * f.derivative(-X), rtol=1e-7, atol=1e-9
    )
    assert dual.at_zero == pytest.approx(f.slope_at_infinity)
    assert dual.slope_at_infinity == pytest.approx(f.at_zero)
    twice = dual.dual()
    torch.testing.assert_close(twice.generator(X), f.generator(X), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("spec", "other"), DUAL_PAIRS, ids=str)
def test_known_dual_pairs(spec, other):
    assert get_divergence(spec).dual() == get_divergence(other)


@every
def test_exact_swaps_under_dual(spec):
    p, q = torch.tensor([0.1, 0.2, 0.3, 0.4]).double().log(), torch.tensor([0.4, 0.1, 0.25, 0.25]).double().log()
    f = get_divergence(spec)
    assert f.dual().exact(p, q).item() == pytest.approx(f.exact(q, p).item(), rel=1e-13)


@smooth
def test_scaled_scales_every_member(spec):
    f = get_divergence(spec)
    g = f.scaled(2.5)
    v = f.derivative(X)
    v = v[(v > f.conjugate_domain[0] + 1e-9) & (v < f.conjugate_domain[1] - 1e-9)]
    torch.testing.assert_close(g.generator(X), 2.5 * f.generator(X))
    torch.testing.assert_close(g.derivative(X), 2.5 * f.derivative(X))
    torch.testing.assert_close(g.inverse_derivative(2.5 * v), f.inverse_derivative(v), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(g.conjugate(2.5 * v), 2.5 * f.conjugate(v), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(g.activation(X), 2.5 * f.activation(X))
    assert g.curvature == pytest.approx(2.5 * f.curvature)
    assert (g.at_zero, g.derivative_at_zero, g.slope_at_infinity) == (
        2.5 * f.at_zero, 2.5 * f.derivative_at_zero, 2.5 * f.slope_at_infinity,
    )  # fmt: skip
    assert g.scaled(2.0) == f.scaled(5.0)
    assert g.dual().generator(X).tolist() == pytest.approx((2.5 * f.dual().generator(X)).tolist())


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan, True, "2"])
def test_scaled_refuses(factor):
    with pytest.raises(ValueError, match="positive finite"):
        get_divergence("reverse_kl").scaled(factor)


@smooth
def test_normalized_has_curvature_one(spec):
    f = get_divergence(spec).normalized()
    assert f.curvature == pytest.approx(1.0, rel=1e-15)
    # f(1+h) = h²/2 to leading order, the same for all
    assert f.generator(torch.tensor([1e-4], dtype=torch.float64)).item() == pytest.approx(0.5e-8, rel=1e-3)


def test_sum_adds_and_inverts():
    """forward_kl + reverse_kl is jeffreys: a closed form for every member of the sum."""
    total, jeffreys = get_divergence("forward_kl") + get_divergence("reverse_kl"), get_divergence("jeffreys")
    v = jeffreys.derivative(X)
    torch.testing.assert_close(total.generator(X), jeffreys.generator(X), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(total.derivative(X), jeffreys.derivative(X), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(total.inverse_derivative(v), X, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total.conjugate(v), jeffreys.conjugate(v), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(total.dual().generator(X), jeffreys.generator(X), rtol=1e-12, atol=1e-14)
    assert total.curvature == 2.0
    assert total.conjugate_domain == (-math.inf, math.inf)
    assert (total.at_zero, total.slope_at_infinity) == (math.inf, math.inf)
    v = v[::20].clone().requires_grad_()
    (slope,) = torch.autograd.grad(total.inverse_derivative(v).sum(), v)
    torch.testing.assert_close(slope, 1 / (1 + torch.exp(-X[::20])), rtol=1e-9, atol=0)


def test_sum_with_a_kink_has_no_inverse():
    total = get_divergence("total_variation") + get_divergence("reverse_kl")
    assert total.generator(X).tolist() == pytest.approx(
        (get_divergence("total_variation").generator(X) + get_divergence("reverse_kl").generator(X)).tolist()
    )
    with pytest.raises(ValueError, match="kink"):
        total.inverse_derivative(X)
    # f* by brute force, also for the v that f' jumps over at t = 1, where f*(v) = v and its slope is 1
    v = torch.tensor([-2.0, -0.5, -0.3, 0.0, 0.3, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    grid = torch.linspace(-12, 8, 200_001, dtype=torch.float64)
    brute = (grid.exp() * v.detach()[:, None] - total.generator(grid)).amax(1)
    value = total.conjugate(v)
    torch.testing.assert_close(value.detach(), brute, rtol=1e-6, atol=1e-6)
    assert value[2:5].tolist() == pytest.approx(v[2:5].tolist(), abs=1e-12)
    (slope,) = torch.autograd.grad(value.sum(), v)
    assert slope[2:5].tolist() == pytest.approx([1.0, 1.0, 1.0])
    with pytest.raises(TypeError):
        get_divergence("reverse_kl") + 1.0


@smooth
@settings(max_examples=60, deadline=None)
@given(x=st.floats(-12, 12), y=st.floats(-12, 12))
def test_fenchel_young(spec, x, y):
    """t v ≤ f(t) + f*(v), with equality at v = f'(t)."""
    f = get_divergence(spec)
    log_t, other = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    t, v = log_t.exp(), f.derivative(other)
    if not f.conjugate_domain[0] < v < f.conjugate_domain[1]:
        return
    gap = (f.generator(log_t) + f.conjugate(v) - t * v).item()
    scale = abs(f.generator(log_t).item()) + abs(f.conjugate(v).item()) + abs((t * v).item())
    assert gap >= -1e-9 * (1 + scale)
    tight = (f.generator(other) + f.conjugate(v) - other.exp() * v).item()
    size = f.generator(other).item() + abs(f.conjugate(v).item()) + abs((other.exp() * v).item())
    assert abs(tight) <= 1e-8 * (1 + size)


# ---------------------------------------------------------------- activation
TEXTBOOK = {  # papers/flat_tofu_muse.md §1.2: −g(a) + f*(g(b)) as printed there, for the uncentred generators
    "reverse_kl": lambda a, b: -a + torch.exp(b - 1),
    "forward_kl": lambda a, b: torch.exp(-a) + b - 1,
    "jensen_shannon": lambda a, b: (
        torch.nn.functional.softplus(-a) + torch.nn.functional.softplus(b) - 2 * math.log(2)
    ),
    "pearson_chi2": lambda a, b: -a + b**2 / 4 + b,
    "neyman_chi2": lambda a, b: -(1 - torch.exp(-a)) + 2 - 2 * torch.exp(-b / 2),
    "squared_hellinger": lambda a, b: -(1 - torch.exp(-a)) + torch.exp(b) - 1,
    "total_variation": lambda a, b: (torch.tanh(b) - torch.tanh(a)) / 2,
}


@pytest.mark.parametrize("name", sorted(TEXTBOOK))
def test_activation_gives_the_textbook_value(name):
    f = get_divergence(name)
    a, b = torch.rand(50, generator=torch.Generator().manual_seed(0)).double(), torch.linspace(0, 1, 50).double()
    torch.testing.assert_close(
        -f.activation(a) + f.conjugate(f.activation(b)), TEXTBOOK[name](a, b), rtol=1e-12, atol=1e-12
    )


def test_jeffreys_activation_and_lambert_w():
    """f*(v) = W + 1/W + v − 2 with W = W(e^{1−v}); at v = 1, W(1) = 0.567143290409784 (the omega constant)."""
    omega = 0.5671432904097838
    f = get_divergence("jeffreys")
    one = torch.ones(1, dtype=torch.float64)
    assert f.activation(one).item() == 1.0
    assert f.conjugate(one).item() == pytest.approx(omega + 1 / omega - 1, rel=1e-14)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_flat_objective_falls_in_template_and_rises_in_forget(spec, dtype):
    f = get_divergence(spec)
    p = torch.linspace(0.001, 0.999, 200, dtype=dtype).requires_grad_()
    (template,) = torch.autograd.grad(-f.activation(p).sum(), p)
    (forget,) = torch.autograd.grad(f.conjugate(f.activation(p)).sum(), p)
    assert (template < 0).all() and (forget > 0).all()


@every
def test_activation_stays_below_the_slope_at_infinity(spec):
    f = get_divergence(spec)
    for dtype in (torch.float32, torch.float64):
        value = f.activation(torch.tensor([30.0, 100.0, 1e4], dtype=dtype))
        assert (value.double() < f.slope_at_infinity).all()
        if not math.isinf(f.slope_at_infinity):
            assert torch.isfinite(f.conjugate(value)).all()


# ---------------------------------------------------------------- the divergence itself
def test_exact_by_hand():
    """P = (¾, ¼), Q = (½, ½): t = (3/2, 1/2)."""
    p, q = torch.tensor([0.75, 0.25]).double().log(), torch.tensor([0.5, 0.5]).double().log()
    expected = {
        "reverse_kl": 0.75 * math.log(1.5) + 0.25 * math.log(0.5),
        "forward_kl": -0.5 * math.log(1.5) - 0.5 * math.log(0.5),
        "pearson_chi2": 0.25,
        "neyman_chi2": 0.5 * (0.25 / 1.5 + 0.25 / 0.5),
        "total_variation": 0.25,
        "squared_hellinger": 0.5 * ((math.sqrt(1.5) - 1) ** 2 + (math.sqrt(0.5) - 1) ** 2),
        "jeffreys": 0.25 * math.log(1.5) - 0.25 * math.log(0.5),
        "le_cam": 0.5 * (0.25 / 2.5 + 0.25 / 1.5),
    }
    for name, value in expected.items():
        assert get_divergence(name).exact(p, q).item() == pytest.approx(value, rel=1e-13), name


@every
def test_exact_with_holes_in_the_support(spec):
    """P = (½, ½, 0), Q = (½, 0, ½): ½·f'(∞) + ½·f(0⁺), infinite where either is; both empty counts nothing."""
    f = get_divergence(spec)
    minus = -math.inf
    half = math.log(0.5)
    p = torch.tensor([half, half, minus, minus], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([half, minus, half, minus], dtype=torch.float64, requires_grad=True)
    value = f.exact(p, q)
    assert value.item() == pytest.approx(0.5 * (f.slope_at_infinity + f.at_zero))
    gradients = torch.autograd.grad(value, (p, q))
    assert not any(torch.isnan(g).any() for g in gradients)


@pytest.mark.parametrize("name", ["reverse_kl", "jensen_shannon", "jeffreys", "total_variation", "le_cam"])
def test_exact_does_not_saturate(name):
    """Q of the first outcome is e^−700: far beyond the cap of the generators, still right."""
    log_q = torch.tensor([-700.0, 0.0], dtype=torch.float64)
    p = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    ln2 = math.log(2)
    expected = {
        "reverse_kl": 0.5 * (700 - ln2) - 0.5 * ln2,
        "jensen_shannon": 0.5 * ln2 + 0.5 * math.log(0.5 / 0.75) + math.log(1 / 0.75),
        "jeffreys": 0.5 * (700 - ln2) + 0.5 * ln2,
        "total_variation": 0.5,
        "le_cam": 0.5 + 0.25 / 1.5,
    }
    assert get_divergence(name).exact(p, log_q).item() == pytest.approx(expected[name], rel=1e-12)


@every
def test_estimate_is_unbiased_by_enumeration(spec):
    """The mean of the summand over each sampling law is D_f exactly; the s.e. is the sample s.d. / √n."""
    f = get_divergence(spec)
    p, q = torch.tensor([0.2, 0.3, 0.5]).double(), torch.tensor([0.5, 0.25, 0.25]).double()
    log_t = p.log() - q.log()
    exact = f.exact(p.log(), q.log())
    for law, name in ((q, "q"), (p, "p")):
        terms = torch.stack([f.estimate(log_t[i : i + 1], sampled_from=name).value for i in range(3)])
        assert (law * terms).sum().item() == pytest.approx(exact.item(), rel=1e-12)
    rows = torch.tensor([0, 0, 1, 2])
    estimate = f.estimate(log_t[rows].reshape(2, 2))
    terms = f.generator(log_t[rows])
    assert estimate.value.item() == pytest.approx(terms.mean().item())
    assert estimate.standard_error.item() == pytest.approx(terms.std(correction=1).item() / 2)


def test_estimate_edges():
    f = get_divergence("jensen_shannon")
    assert math.isnan(f.estimate(torch.tensor([0.3])).standard_error.item())
    assert f.estimate(torch.tensor([math.inf]), sampled_from="p").value.item() == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="at least one"):
        f.estimate(torch.zeros(0))
    with pytest.raises(ValueError, match="sampled_from"):
        f.estimate(torch.zeros(1), sampled_from="policy")


def test_estimate_warns_when_few_terms_carry_the_sum():
    f = get_divergence("pearson_chi2")  # f(t) = (t−1)²: log t = log 2 gives 1, log 11 gives 100
    one, hundred = math.log(2.0), math.log(11.0)
    heavy = torch.tensor([hundred] + [one] * 40, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"estimate of pearson_chi2: 2 of 41 terms carry 72% of the sum"):
        value = f.estimate(heavy).value
    assert value.item() == pytest.approx(140 / 41)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f.estimate(torch.full((41,), one))
        f.estimate(torch.zeros(41))
        f.estimate(heavy[:5])  # too few to tell
        f.estimate(torch.randn(400, generator=torch.Generator().manual_seed(0)) * 0.3)
        torch.func.vmap(lambda x: f.estimate(x).value)(heavy.repeat(2, 1))
