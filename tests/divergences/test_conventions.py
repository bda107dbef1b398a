"""The convention table of docs/divergences.md: one test per row, by the id in its first column."""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fdiv.divergences import get_divergence

X = torch.linspace(-6, 6, 49, dtype=torch.float64)
U = X.exp()
P = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
Q = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)


def same(got, expected):
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(expected), rtol=1e-10, atol=1e-12)


def score(spec):
    return get_divergence(spec).derivative(X)


def generates(spec, f):
    """f differs from our generator by its value and slope at t = 1 only, c₀ + c₁(t−1)."""
    got = get_divergence(spec).generator(X)
    one = torch.ones((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(f(one), one)
    same(f(U) - f(torch.ones(())).double() - slope * (U - 1), got)


def exact(spec):
    return get_divergence(spec).exact(P.log(), Q.log())


def js_generator(t):
    return t * torch.log(t) - (1 + t) * torch.log((1 + t) / 2)


def alpha_limits():
    for alpha, name in ((1e-7, "reverse_kl"), (1 - 1e-7, "forward_kl")):
        near = get_divergence({"name": "alpha", "alpha": alpha})
        torch.testing.assert_close(near.derivative(X), score(name), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(near.generator(X), get_divergence(name).generator(X), rtol=1e-5, atol=1e-8)


def alpha_dpg(a=0.25):
    theirs = (U ** (a - 1) - 1) / (a - 1)
    same(score({"name": "alpha", "alpha": 0.75}), theirs)
    same(score({"name": "alpha_dpg", "alpha": a}), theirs)


def trl_alpha(a=0.3):
    theirs = (U ** (a - 1) - 1) / (a - 1)
    same(score({"name": "alpha", "alpha": 1 - a}), theirs)
    same(score({"name": "alpha_trl", "alpha": a}), theirs)


def dph_alpha(a=0.3):
    generates({"name": "alpha", "alpha": a}, lambda u: (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1)))


def k3():
    r = 1 / U
    f = get_divergence("reverse_kl")
    same(torch.stack([f.estimate(x[None], sampled_from="p").value for x in X]), r - 1 - torch.log(r))


def k3_reference():
    f = get_divergence("forward_kl")
    same(torch.stack([f.estimate(x[None], sampled_from="q").value for x in X]), U - 1 - X)


def flat(name, g, conjugate):
    f, v = get_divergence(name), torch.linspace(0, 1, 21, dtype=torch.float64)
    same(-f.activation(v) + f.conjugate(f.activation(v.flip(0))), -g(v) + conjugate(g(v.flip(0))))


def flat_others():
    for theirs, ours in {"Jeffrey": "jeffreys", "Squared-Hellinger": "squared_hellinger", "Pearson": "pearson_chi2",
                         "Neyman": "neyman_chi2", "Jenson-Shannon": "jensen_shannon", "Total-Variation": "total_variation"}.items():  # fmt: skip
        assert get_divergence(theirs) == get_divergence(ours)


def chi2_pair():
    generates("neyman_chi2", lambda t: (1 - t) ** 2 / t)
    generates("pearson_chi2", lambda t: (t - 1) ** 2)


def textbook_js():
    m = (P + Q) / 2
    textbook = 0.5 * (P * (P / m).log()).sum() + 0.5 * (Q * (Q / m).log()).sum()
    same(0.5 * exact("jensen_shannon"), textbook)
    same(exact({"name": "skew_jensen_shannon", "weight": 0.5}), textbook)


ROWS = {
    "fdpo-reverse-kl": lambda: same(score("reverse_kl") + 1, U.log() + 1),
    "fdpo-forward-kl": lambda: same(score("forward_kl") - 1, -1 / U),
    "fdpo-js": lambda: same(score("jensen_shannon"), torch.log(2 * U / (1 + U))),
    "fdpo-alpha": lambda: same(score({"name": "alpha", "alpha": 0.3}), (1 - U**-0.3) / 0.3),
    "textbook-js": textbook_js,
    "textbook-hellinger": lambda: same(0.5 * exact("squared_hellinger"), 0.5 * ((P.sqrt() - Q.sqrt()) ** 2).sum()),
    "hellinger-alpha": lambda: same(score({"name": "alpha", "alpha": 0.5}), 2 * score("squared_hellinger")),
    "alpha-limits": alpha_limits,
    "trl-forward-kl": lambda: same(score("forward_kl"), 1 - torch.exp(-X)),
    "trl-js": lambda: same(score("jensen_shannon"), math.log(2) + F.logsigmoid(X)),
    "trl-alpha": trl_alpha,
    "alpha-dpg": alpha_dpg,
    "fdpg-kl": lambda: generates("forward_kl", lambda t: -torch.log(t)),
    "fdpg-reverse-kl": lambda: generates("reverse_kl", lambda t: t * torch.log(t)),
    "fdpg-tv": lambda: same(get_divergence("total_variation").generator(X), 0.5 * (1 - U).abs()),
    "fdpg-js": lambda: generates("jensen_shannon", js_generator),
    "fdpg-chi2": chi2_pair,
    "flat-kl": lambda: flat("reverse_kl", lambda v: v, lambda t: torch.exp(t - 1)),
    "flat-reverse-kl": lambda: flat("forward_kl", lambda v: -torch.exp(-v), lambda t: -1 - torch.log(-t)),
    "flat-others": flat_others,
    "dph-alpha": dph_alpha,
    "dph-f-js": lambda: (generates("forward_kl", lambda u: -torch.log(u)), generates("jensen_shannon", js_generator)),
    "chipo": lambda: same(score("chi2_kl") + 1, U + X),
    "k3": k3,
    "k3-reference": k3_reference,
    "fgan-shift": lambda: flat("jensen_shannon", lambda v: math.log(2) - F.softplus(-v), lambda t: -torch.log(2 - t.exp())),
}  # fmt: skip


@pytest.mark.parametrize("row", sorted(ROWS))
def test_row(row):
    ROWS[row]()


def test_every_row_of_the_docs_has_a_test():
    text = (Path(__file__).parents[2] / "docs" / "divergences.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z0-9-]+)` \| .+\|.+\|.+\|$", text.split("## Other people's")[1], re.M) == list(ROWS)


def test_the_table_of_entries_in_the_docs_is_the_registry():
    from fdiv.divergences import list_divergences

    text = (Path(__file__).parents[2] / "docs" / "divergences.md").read_text(encoding="utf-8").split("## Other")[0]
    rows = re.findall(r"^\| `(\w+).*?\|.*\| (yes|no) \| (yes|no) \|$", text, re.M)
    assert sorted(name for name, *_ in rows) == list_divergences()
    parameters = {"alpha": {"alpha": 0.3}, "skew_jensen_shannon": {"weight": 0.3}}
    for name, f_dpo, hard_target in rows:
        divergence = get_divergence({"name": name, **parameters.get(name, {})})
        assert (f_dpo == "yes") == math.isinf(divergence.derivative_at_zero), name
        assert (hard_target == "yes") == math.isfinite(divergence.slope_at_infinity), name
