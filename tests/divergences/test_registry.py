"""Names, aliases, refusals, parameters, registration, and divergences from a generator alone."""

import math
import subprocess
import sys

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F

from fdiv.divergences import (
    Divergence,
    aliases_of,
    get_divergence,
    list_divergences,
    parameters_of,
    register_divergence,
    registry,
)

NAMES = [
    "alpha", "chi2_kl", "forward_kl", "jeffreys", "jensen_shannon", "le_cam", "neyman_chi2", "pearson_chi2",
    "reverse_kl", "skew_jensen_shannon", "squared_hellinger", "total_variation",
]  # fmt: skip


@pytest.fixture
def scratch(monkeypatch):
    """A registry that forgets what the test registers."""
    monkeypatch.setattr(registry, "_factories", dict(registry._factories))
    monkeypatch.setattr(registry, "_aliases", dict(registry._aliases))


def test_list_is_sorted_and_complete():
    assert list_divergences() == NAMES


def test_the_three_kinds_of_spec():
    by_name, by_mapping = get_divergence("Jensen-Shannon"), get_divergence({"name": "jensen_shannon"})
    assert by_name == by_mapping == get_divergence(by_name)
    alpha = get_divergence({"name": "alpha", "alpha": 0.3})
    assert alpha.parameters == {"alpha": 0.3} and alpha.label == "alpha(0.3)"
    assert alpha != get_divergence({"name": "alpha", "alpha": 0.4})
    assert len({alpha, get_divergence({"name": "alpha", "alpha": 0.3})}) == 1


@pytest.mark.parametrize(
    ("alias", "name"),
    [("rkl", "reverse_kl"), ("fkl", "forward_kl"), ("js", "jensen_shannon"), ("js_divergence", "jensen_shannon"),
     ("tv", "total_variation"), ("hellinger", "squared_hellinger"), ("pearson", "pearson_chi2"),
     ("neyman", "neyman_chi2"), ("chi_po", "chi2_kl"), ("Jeffrey", "jeffreys"), ("Jenson-Shannon", "jensen_shannon"),
     ("Squared-Hellinger", "squared_hellinger"), ("Total-Variation", "total_variation")],
)  # fmt: skip
def test_aliases(alias, name):
    assert get_divergence(alias).name == name


def test_alias_and_parameter_listing():
    assert aliases_of("jensen_shannon") == ["jenson_shannon", "js", "js_divergence", "jsd"]
    assert parameters_of("alpha") == ["alpha"] and parameters_of("reverse_kl") == []


@pytest.mark.parametrize("name", ["kl", "KL", "chi2", "chi-squared", "alpha_divergence"])
def test_ambiguous_names_are_refused_with_both_candidates(name):
    with pytest.raises(ValueError, match="ambiguous") as error:
        get_divergence(name)
    assert " or " in str(error.value)


def test_unknown_names_get_a_suggestion():
    with pytest.raises(ValueError, match=r"unknown divergence 'revers_kl' \(did you mean reverse_kl"):
        get_divergence("revers_kl")
    with pytest.raises(ValueError, match="known: alpha, chi2_kl"):
        get_divergence("zzz")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("alpha", r"needs the parameter 'alpha': write \{name: alpha, alpha: 0.3\}"),
        ({"name": "alpha"}, "needs the parameter 'alpha'"),
        ({"name": "skew_jensen_shannon"}, "needs the parameter 'weight'"),
        ({"name": "alpha", "alpha": 0.3, "beta": 1}, "no parameter 'beta': it takes alpha"),
        ({"name": "reverse_kl", "alpha": 0.3}, "no parameter 'alpha': it takes none"),
        ({"alpha": 0.3}, "needs a `name`"),
        ({"name": "alpha", "alpha": 0.0}, "strictly between 0 and 1, got 0.0"),
        ({"name": "alpha", "alpha": 1}, "strictly between 0 and 1, got 1 .*forward_kl"),
        ({"name": "alpha", "alpha": -0.2}, "strictly between 0 and 1"),
        ({"name": "alpha", "alpha": math.nan}, "strictly between 0 and 1"),
        ({"name": "alpha", "alpha": "0.3"}, "strictly between 0 and 1"),
        ({"name": "alpha", "alpha": True}, "strictly between 0 and 1"),
        ({"name": "skew_jensen_shannon", "weight": 1.0}, "weight must be a number strictly between 0 and 1"),
        ({"name": "alpha_trl", "alpha": 1.0}, "1 is reverse_kl"),
    ],
    ids=str,
)
def test_bad_parameters(spec, message):
    with pytest.raises(ValueError, match=message):
        get_divergence(spec)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="float: 0.5"):
        get_divergence(0.5)


def test_register_a_divergence(scratch):
    mine = Divergence.from_generator("mine", lambda x: torch.exp(x) * x - torch.expm1(x))
    register_divergence(mine)
    assert get_divergence("mine") is mine and "mine" in list_divergences()
    register_divergence("blend", lambda weight: mine.scaled(weight), aliases=("mix",))
    assert get_divergence({"name": "mix", "weight": 2.0}).curvature == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["reverse_kl", "js", "kl", "Not Lower", "9lives"])
def test_registration_refuses(scratch, name):
    with pytest.raises(ValueError):
        register_divergence(name, get_divergence("reverse_kl"))
    with pytest.raises(TypeError):
        register_divergence("fine", 3.0)


# ---------------------------------------------------------------- from_generator
X = torch.linspace(-20, 20, 81, dtype=torch.float64)
# the same functions as built-ins, written in log t as a user would, none of them centred but the first
USER = {
    "reverse_kl": lambda x: torch.exp(x) * x,
    "forward_kl": lambda x: -x,
    "jensen_shannon": lambda x: torch.exp(x) * x - (1 + torch.exp(x)) * (F.softplus(x) - math.log(2)),
    "jeffreys": lambda x: (torch.exp(x) - 1) * x,
    "squared_hellinger": lambda x: (torch.exp(x / 2) - 1) ** 2,
    "neyman_chi2": lambda x: torch.exp(x) - 2 + torch.exp(-x),
    "pearson_chi2": lambda x: (torch.exp(x) - 1) ** 2,
    "chi2_kl": lambda x: 0.5 * (torch.exp(x) - 1) ** 2 + torch.exp(x) * x,
    "le_cam": lambda x: (torch.exp(x) - 1) ** 2 / (torch.exp(x) + 1),
}


@pytest.mark.parametrize("name", sorted(USER))
def test_from_generator_agrees_with_the_closed_forms(name):
    mine, known = Divergence.from_generator("mine", USER[name]), get_divergence(name)
    torch.testing.assert_close(mine.generator(X), known.generator(X), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(mine.derivative(X), known.derivative(X), rtol=1e-6, atol=1e-8)
    assert mine.curvature == pytest.approx(known.curvature, rel=1e-9)
    assert mine.at_zero == pytest.approx(known.at_zero, rel=1e-6)
    assert mine.derivative_at_zero == pytest.approx(known.derivative_at_zero, rel=1e-6)
    assert mine.slope_at_infinity == pytest.approx(known.slope_at_infinity, rel=1e-6)
    v = known.derivative(torch.linspace(-8, 8, 33, dtype=torch.float64))
    torch.testing.assert_close(mine.inverse_derivative(v), known.inverse_derivative(v), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.conjugate(v), known.conjugate(v), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.activation(v).isfinite(), torch.ones_like(v, dtype=torch.bool))
    near = torch.linspace(-6, 6, 25, dtype=torch.float64)
    torch.testing.assert_close(mine.dual().generator(near), known.dual().generator(near), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(mine.dual().derivative(near), known.dual().derivative(near), rtol=1e-6, atol=1e-8)
    p, q = torch.tensor([0.1, 0.9]).double().log(), torch.tensor([0.6, 0.4]).double().log()
    assert mine.exact(p, q).item() == pytest.approx(known.exact(p, q).item(), rel=1e-9)


@pytest.mark.parametrize("name", sorted(USER))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_from_generator_is_finite_far_out(name, dtype):
    mine = Divergence.from_generator("mine", USER[name])
    for function in (mine.generator, mine.derivative):
        x = torch.linspace(-1e4, 1e4, 401).to(dtype).requires_grad_()
        value = function(x)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        assert torch.isfinite(value).all() and torch.isfinite(gradient).all()


def test_limits_can_be_given_and_are_asked_for_when_numbers_cannot_tell():
    slow = {"name": "alpha", "alpha": 0.01}
    f, known = lambda x: -torch.expm1(0.99 * x) / (0.01 * 0.99), get_divergence(slow)
    mine = Divergence.from_generator("mine", f, slope_at_infinity=100.0, at_zero=known.at_zero)
    assert mine.slope_at_infinity == 100.0
    # f' = log(1 + log(1 + t)) − … grows without bound, but too slowly to see
    with pytest.raises(ValueError, match="pass slope_at_infinity="):
        Divergence.from_generator("mine", lambda x: torch.exp(x) * torch.log1p(F.softplus(x)))


def test_from_generator_gradients():
    mine = Divergence.from_generator("mine", USER["forward_kl"])
    x = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(mine.derivative(x).sum(), x)
    torch.testing.assert_close(slope, torch.exp(-x.detach()), rtol=1e-9, atol=0)
    v = mine.derivative(x.detach()).requires_grad_()
    (slope,) = torch.autograd.grad(mine.conjugate(v).sum(), v)
    torch.testing.assert_close(slope, torch.exp(x.detach()), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda x: 0.5 * torch.expm1(x).abs(), "kink or a flat f"),
        (lambda x: torch.expm1(x), "kink or a flat f"),
        (lambda x: 0.5 * x * x, "not convex"),  # SquaredPO: non-monotone score
        (lambda x: (torch.exp(x) * x).sum(), "element-wise"),
        (lambda x: torch.sqrt(x), "positive and finite"),
    ],
    ids=["total variation", "linear", "SquaredPO", "reduction", "nan"],
)
def test_from_generator_refuses(f, message):
    with pytest.raises(ValueError, match=message):
        Divergence.from_generator("mine", f)
    with pytest.raises(ValueError, match="needs a name"):
        Divergence.from_generator("", f)
    with pytest.raises(ValueError, match="unknown limit 'top'"):
        Divergence.from_generator("mine", f, top=1.0)


@pytest.mark.parametrize("name", sorted(USER))
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-9, 1e6, 1e12])
def test_from_generator_is_relative(name, scale):
    """scale·f has the limits of f, scaled, and the same verdicts: 1e-9·t log t is unbounded like t log t."""
    mine, known = Divergence.from_generator("mine", lambda x: scale * USER[name](x)), get_divergence(name)
    for what in ("at_zero", "derivative_at_zero", "slope_at_infinity"):
        assert getattr(mine, what) == pytest.approx(scale * getattr(known, what), rel=1e-6, abs=0), what
    assert mine.curvature == pytest.approx(scale * known.curvature, rel=1e-9, abs=0)


def test_a_small_share_without_a_limit_is_seen():
    mixed = Divergence.from_generator("mixed", lambda x: -x + 1e-9 * torch.exp(x) * x)
    assert (mixed.at_zero, mixed.derivative_at_zero, mixed.slope_at_infinity) == (math.inf, -math.inf, math.inf)
    other = Divergence.from_generator("other", lambda x: (torch.exp(x) - 1) ** 2 + 1e-9 * torch.exp(x) * x)
    assert (other.derivative_at_zero, other.slope_at_infinity) == (-math.inf, math.inf)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda x: (torch.exp(x) * x).detach(), "mine: the result of f is cut from the graph of log t"),
        (lambda x: torch.exp(x.data) * x.data, "mine: the result of f is cut from the graph"),
        (lambda x: torch.exp(x.detach()) * x, "mine: the gradient of f does not belong to its values"),
        (lambda x: torch.exp(x) * x + ((torch.exp(x) - 1) ** 2).detach(), "mine: the gradient of f does not belong"),
        (lambda x: torch.from_numpy(x.numpy()), "mine: f fails on a float64 tensor"),
        (lambda x: x.clone().exp_().mul_(x).numpy(), "mine: f fails on a float64 tensor"),
        (lambda x: torch.zeros_like(x), "mine: the result of f is cut from the graph .*, or does not depend on it"),
        (lambda x: 0.5 * x * x, "mine: f is not convex"),
        (lambda x: 0.1 * torch.exp(x) + 0.2 * torch.exp(x), "flat f"),
    ],
    ids=["detach", "data", "detached factor", "detached term", "numpy", "in place", "constant", "concave", "linear"],
)
def test_from_generator_refuses_at_any_scale(scale, f, message):
    with pytest.raises(ValueError, match=message):
        Divergence.from_generator("mine", lambda x: scale * f(x))


@pytest.mark.parametrize(("at", "jump"), [(2.0, 3.0), (0.3, 0.5), (3.0, 1e-3)])
def test_the_conjugate_at_a_kink(at, jump):
    """f = t log t + jump·(t − at)⁺: f' jumps at t = at, where f*(v) = at·v − f(at) for every v in the jump.

    Its slope there is t = at and its second derivative 0; the inverse of f' is constant, log(at).
    """
    f = Divergence.from_generator("kink", lambda x: torch.exp(x) * x + jump * F.relu(torch.exp(x) - at))
    edge = math.log(at) + 1 - (1 + jump * (at < 1))  # f'(at) from the left, centred
    v = (edge + jump * torch.tensor([0.02, 0.3, 0.5, 0.98], dtype=torch.float64)).requires_grad_()
    value = f.conjugate(v)
    torch.testing.assert_close(value, at * v - f.generator(torch.tensor(at, dtype=torch.float64).log()), rtol=1e-9, atol=1e-12)  # fmt: skip
    (slope,) = torch.autograd.grad(value.sum(), v, create_graph=True)
    assert slope.tolist() == pytest.approx([at] * 4, rel=1e-9)
    assert torch.autograd.grad(slope.sum(), v)[0].tolist() == [0.0] * 4
    assert f.inverse_derivative(v).tolist() == pytest.approx([math.log(at)] * 4, abs=1e-9)
    # just outside the jump f* is smooth again: its slope is t with f'(t) = v
    outside = torch.tensor([edge - 0.1, edge + jump + 0.1], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(f.conjugate(outside).sum(), outside)
    assert slope.tolist() == pytest.approx([at * math.exp(-0.1), at * math.exp(0.1)], rel=1e-6)


def test_the_conjugate_on_a_flat_piece():
    """Huber's f: (t−1)² to t = 2, then 2t − 3, so f' stays at 2; f*(v) = v + v²/4 below and 3 at v = 2."""
    f = Divergence.from_generator("huber", lambda x: torch.where(x.exp() < 2, (x.exp() - 1) ** 2, 2 * x.exp() - 3))
    v = torch.tensor([-1.0, 1.0, 1.9, 2.0], dtype=torch.float64, requires_grad=True)
    assert f.slope_at_infinity == pytest.approx(2.0)
    value = f.conjugate(v)
    assert value.tolist() == pytest.approx([-0.75, 1.25, 1.9 + 1.9**2 / 4, 3.0], rel=1e-6)
    (slope,) = torch.autograd.grad(value.sum(), v)
    assert torch.isfinite(slope).all() and slope[:3].tolist() == pytest.approx([0.5, 1.5, 1.95], rel=1e-6)


# ---------------------------------------------------------------- parameters at the ends of (0, 1)
SMALL = [1e-30, 1e-20, 1e-12, 1e-9, 1e-7, 1e-3]
EDGES = sorted({*SMALL, *(1 - w for w in SMALL if 1 - w < 1)})


def _largest_error(got, exact):
    return max(abs(mp.mpf(g) - e) / abs(e) for g, e in zip(got.tolist(), exact, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("weight", EDGES)
def test_skew_jensen_shannon_at_the_ends_of_its_weight(weight, dtype):
    """Relative to 60-digit arithmetic, away from t = 1 where the two terms of f cancel."""
    f = get_divergence({"name": "skew_jensen_shannon", "weight": weight})
    x = torch.tensor([-30.0, -11.0, -3.0, -0.7, 0.7, 3.0, 11.0, 21.0, 30.0], dtype=dtype)
    with mp.workdps(80):
        w, t = mp.mpf(weight), [mp.exp(mp.mpf(a)) for a in x.tolist()]
        m = [w * a + 1 - w for a in t]
        limit = 1e-11 if dtype == torch.float64 else 1e-5
        exact = [w * a * mp.log(a) - b * mp.log(b) for a, b in zip(t, m, strict=True)]
        assert _largest_error(f.generator(x), exact) < limit
        assert _largest_error(f.derivative(x), [w * mp.log(a / b) for a, b in zip(t, m, strict=True)]) < limit
        v = f.derivative(x)
        v = v[(v.double() < f.slope_at_infinity)]
        back = [mp.mpf(a) / w - mp.log((1 - w * mp.exp(mp.mpf(a) / w)) / (1 - w)) for a in v.tolist()]
        assert _largest_error(f.inverse_derivative(v), back) < limit
        exact = [-(1 - w) * mp.log((1 - w * mp.exp(mp.mpf(a) / w)) / (1 - w)) for a in v.tolist()]
        assert _largest_error(f.conjugate(v), exact) < max(limit, 1e-6)
    far = torch.linspace(-1e4, 1e4, 101, dtype=dtype)
    assert torch.isfinite(f.derivative(far)).all() and torch.isfinite(f.generator(far)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("alpha", EDGES)
def test_alpha_at_its_ends(alpha, dtype):
    f = get_divergence({"name": "alpha", "alpha": alpha})
    x = torch.tensor([-30.0, -11.0, -3.0, -0.7, 0.7, 3.0, 11.0, 21.0, 30.0], dtype=dtype)
    with mp.workdps(80):
        a, t = mp.mpf(alpha), [mp.exp(mp.mpf(b)) for b in x.tolist()]
        limit = 1e-11 if dtype == torch.float64 else 1e-5
        assert _largest_error(f.derivative(x), [(1 - b**-a) / a for b in t]) < limit
        exact = [(b ** (1 - a) - (1 - a) * b - a) / (a * (a - 1)) for b in t]
        assert _largest_error(f.generator(x), exact) < limit


@pytest.mark.parametrize("small", [5e-324, 1e-300, 1e-31])
def test_parameters_too_small_for_float32_are_refused(small):
    with pytest.raises(ValueError, match="alpha must be at least 1e-30, got .*reverse_kl"):
        get_divergence({"name": "alpha", "alpha": small})
    with pytest.raises(ValueError, match="weight must be at least 1e-30"):
        get_divergence({"name": "skew_jensen_shannon", "weight": small})


def test_the_dual_of_a_weight_next_to_zero_keeps_it():
    f = get_divergence({"name": "skew_jensen_shannon", "weight": 1e-20})
    assert f.dual().weight == 1.0 and f.dual().dual() == f
    assert f.dual() != get_divergence({"name": "skew_jensen_shannon", "weight": 1e-21}).dual()
    assert f.dual().curvature == pytest.approx(1e-20)


@pytest.mark.parametrize("name", ["skew_jensen_shannon", "alpha"])
def test_no_high_precision_arithmetic_per_call(name, monkeypatch):
    """The constants are computed when a parameter is first seen; later calls and later instances reuse them."""
    spec = {"name": name, "weight" if name == "skew_jensen_shannon" else "alpha": 0.37}
    get_divergence(spec).dual()

    def forbidden(*_args):
        raise AssertionError("high-precision arithmetic in a call")

    monkeypatch.setattr("fdiv.divergences.logarithmic.Decimal", forbidden)
    monkeypatch.setattr("fdiv.divergences.powers.Fraction", forbidden)
    f, x = get_divergence(spec), torch.linspace(-1, 1, 5)
    for g in (f, f.dual(), f.scaled(2.0), f + f):
        g.conjugate(g.derivative(x) * 0.9)
        g.inverse_derivative(g.derivative(x) * 0.9)
        g.estimate(x, sampled_from="p")
        g.exact(torch.log_softmax(x, -1), torch.log_softmax(-x, -1))
        assert g.dual() is g.dual()


def test_importing_the_registry_imports_torch_only():
    code = (
        "import sys, fdiv.divergences\n"
        "heavy = {'transformers', 'trl', 'datasets', 'scipy', 'matplotlib', 'accelerate'} & set(sys.modules)\n"
        "ours = {m for m in sys.modules if m.startswith('fdiv') and not m.startswith('fdiv.divergences')}\n"
        "ours -= {'fdiv', 'fdiv.moved', 'fdiv.named', 'fdiv.errors'}\n"
        "assert not heavy and not ours, (heavy, ours)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
