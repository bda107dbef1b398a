"""`flat_loss` and its reductions: textbook values, signs over the whole registry, the released code's padded mean."""

import math

import pytest
import torch

from fdiv.divergences import Divergence, get_divergence, list_divergences, parameters_of
from fdiv.unlearning import answer_score, flat_loss, padded_batch_mean

PARAMETERS = {"alpha": {"alpha": 0.3}, "skew_jensen_shannon": {"weight": 0.3}}


def specs():
    """Every entry of the registry; fails when one with parameters is added without a value here."""
    for name in list_divergences():
        assert set(PARAMETERS.get(name, {})) == set(parameters_of(name)), f"give {name} its parameters in PARAMETERS"
        yield {"name": name, **PARAMETERS.get(name, {})}


def softplus(x):
    return math.log1p(math.exp(x))


# name here → (g(v), f*(g(v))) as printed in the f-GAN / FLAT tables (Nowozin et al. 2016; FLAT's "KL" is reverse_kl here)
TEXTBOOK = {
    "reverse_kl": (lambda v: v, lambda v: math.exp(v - 1)),
    "forward_kl": (lambda v: -math.exp(-v), lambda v: v - 1),
    "jensen_shannon": (lambda v: math.log(2) - softplus(-v), lambda v: softplus(v) - math.log(2)),
    "pearson_chi2": (lambda v: v, lambda v: v * v / 4 + v),
    "neyman_chi2": (lambda v: 1 - math.exp(-v), lambda v: 2 - 2 * math.exp(-v / 2)),
    "squared_hellinger": (lambda v: 1 - math.exp(-v), lambda v: math.exp(v) - 1),
    "total_variation": (lambda v: math.tanh(v) / 2, lambda v: math.tanh(v) / 2),
}


@pytest.mark.parametrize("name", TEXTBOOK)
@pytest.mark.parametrize(("template", "forget"), [(0.0, 0.0), (0.5, 0.5), (0.9, 0.05), (0.07, 0.98), (1.0, 1.0)])
def test_textbook_values(name, template, forget):
    g, conjugate_of_g = TEXTBOOK[name]
    loss = flat_loss(torch.tensor([template], dtype=torch.float64), torch.tensor([forget], dtype=torch.float64), name)
    assert loss.item() == pytest.approx(-g(template) + conjugate_of_g(forget), abs=1e-12)


def test_jeffreys_is_the_exact_lambert_form_not_the_released_cubic():
    from scipy.special import lambertw

    v = 0.98
    w = lambertw(math.exp(1 - v)).real
    exact = w + 1 / w + v - 2
    loss = flat_loss(torch.zeros(1).double(), torch.tensor([v], dtype=torch.float64), "jeffreys").item()
    assert loss == pytest.approx(exact, abs=1e-9)
    assert abs(v + v**2 / 4 + v**3 / 16 - exact) == pytest.approx(0.016, abs=5e-4)


def test_hand_values():
    """P_e = 0.5, P_f = 1: KL −0.5 + e⁰ = 0.5; TV −tanh(.5)/2 + tanh(1)/2; Pearson −0.5 + 1.25."""
    pair = torch.tensor([0.5]), torch.tensor([1.0])
    assert flat_loss(*pair, "reverse_kl").item() == pytest.approx(0.5)
    assert flat_loss(*pair, "pearson_chi2").item() == pytest.approx(0.75)
    assert flat_loss(*pair, "total_variation").item() == pytest.approx((0.761594 - 0.462117) / 2, abs=1e-6)


@pytest.mark.parametrize("spec", specs(), ids=lambda spec: spec["name"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_template_up_and_forget_down_for_every_divergence(spec, dtype):
    grid = torch.linspace(1e-4, 1 - 1e-4, 201, dtype=dtype)
    template, forget = grid.clone().requires_grad_(), grid.clone().requires_grad_()
    loss = flat_loss(template, forget, spec)
    d_template, d_forget = torch.autograd.grad(loss.sum(), [template, forget])
    assert torch.isfinite(loss).all()
    assert (d_template < 0).all() and (d_forget > 0).all()
    assert torch.isfinite(d_template).all() and torch.isfinite(d_forget).all()


INVERTIBLE = [spec for spec in specs() if spec["name"] != "total_variation"]


@pytest.mark.parametrize("spec", INVERTIBLE, ids=lambda spec: spec["name"])
def test_composition_gradient_is_the_density_ratio_times_the_slope_of_g(spec):
    """d f*(g(v))/dv = t*·g'(v), with t* = (f')⁻¹(g(v)) ≥ 0 where f' has an inverse."""
    divergence = get_divergence(spec)
    v = torch.linspace(0.01, 0.99, 33, dtype=torch.float64, requires_grad=True)
    g = divergence.activation(v)
    (slope,) = torch.autograd.grad(g.sum(), v, retain_graph=True)
    (composed,) = torch.autograd.grad(divergence.conjugate(g).sum(), v)
    torch.testing.assert_close(composed, divergence.inverse_derivative(g.detach()).exp() * slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("spec", specs(), ids=lambda spec: spec["name"])
def test_edges_and_mean_log_likelihoods_stay_finite(spec):
    """Scores of exactly 0 and 1, and `log_mean` scores down to −60, give finite values and gradients."""
    scores = torch.cat([torch.tensor([0.0, 1.0]), torch.linspace(-60, 0, 61)]).requires_grad_()
    loss = flat_loss(scores, scores.flip(0), spec)
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()


def test_user_defined_divergence():
    """An f given by its generator alone works too: KL from scratch equals the entry (its activation is x as well)."""
    own = Divergence.from_generator("own_kl", lambda x: torch.exp(x) * (x - 1) + 1)
    pair = torch.tensor([0.2, 0.6]).double(), torch.tensor([0.9, 0.1]).double()
    shift = flat_loss(*pair, own) - flat_loss(*pair, "reverse_kl")
    assert torch.isfinite(shift).all()
    # x against x − 1: −x_e + e^{x_f} − 1 ↔ −x_e + e^{x_f − 1}
    torch.testing.assert_close(shift, pair[1].exp() - 1 - (pair[1] - 1).exp(), atol=1e-6, rtol=0)


def test_half_precision_is_computed_in_float32():
    pair = torch.tensor([0.25]), torch.tensor([0.75])
    exact, rounded = flat_loss(*pair, "jensen_shannon"), flat_loss(*(p.bfloat16() for p in pair), "jensen_shannon")
    assert rounded.dtype == torch.float32
    assert rounded.item() == exact.item()  # 0.25 and 0.75 are exact in bfloat16


LOG_PROBS = torch.log(torch.tensor([[0.5, 0.25, 0.9], [0.8, 0.1, 0.1]]))
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


def test_reductions_by_hand():
    assert answer_score(LOG_PROBS, MASK).tolist() == pytest.approx([0.375, 0.8])
    assert answer_score(LOG_PROBS, MASK, "geo_mean").tolist() == pytest.approx([math.sqrt(0.125), 0.8])
    assert answer_score(LOG_PROBS, MASK, "log_mean").tolist() == pytest.approx([math.log(0.125) / 2, math.log(0.8)])
    with pytest.raises(ValueError, match="geo_mean"):
        answer_score(LOG_PROBS, MASK, "mean")


@pytest.mark.parametrize("reduction", ["token_mean", "geo_mean", "log_mean"])
def test_padding_is_invisible(reduction):
    padded = torch.cat([LOG_PROBS, torch.full((2, 4), math.nan)], 1).requires_grad_()
    mask = torch.cat([MASK, torch.zeros(2, 4, dtype=torch.long)], 1)
    score = answer_score(padded, mask, reduction)
    torch.testing.assert_close(score, answer_score(LOG_PROBS, MASK, reduction))
    (gradient,) = torch.autograd.grad(score.sum(), padded)
    assert torch.isfinite(gradient).all() and (gradient[:, 3:] == 0).all()


def test_token_mean_moves_only_likely_tokens():
    """∂P/∂log p_t = p_t/|y|: a token at p = 10⁻³⁰ gets no push, which is why `geo_mean` is offered."""
    log_probs = torch.tensor([[-70.0, -0.1]], requires_grad=True)
    mask = torch.ones(1, 2)
    (token,) = torch.autograd.grad(answer_score(log_probs, mask).sum(), log_probs)
    (geometric,) = torch.autograd.grad(answer_score(log_probs, mask, "log_mean").sum(), log_probs)
    assert token[0, 0] == pytest.approx(math.exp(-70) / 2) and token[0, 1] == pytest.approx(math.exp(-0.1) / 2)
    assert geometric.tolist() == [[0.5, 0.5]]


def test_official_padded_mean():
    """(0.5 + 0.25 + 0.8) over B·(T_max − 1) = 2·(500 − 1) positions: the dilution that the paper's formula has not."""
    mean = padded_batch_mean(LOG_PROBS, MASK, 500)
    assert mean.shape == (1,)
    assert mean.item() == pytest.approx(1.55 / (2 * 499))
    with pytest.raises(ValueError, match="padded_length=3"):
        padded_batch_mean(LOG_PROBS, MASK, 3)
    # one nonlinearity of the batch mean, not the mean of nonlinearities
    per_row = flat_loss(torch.tensor([0.1, 0.9]), torch.tensor([0.1, 0.9]), "reverse_kl").mean()
    of_mean = flat_loss(torch.tensor([0.5]), torch.tensor([0.5]), "reverse_kl")
    assert abs(per_row - of_mean).item() > 0.01


def test_empty_rows_and_float_masks():
    assert answer_score(LOG_PROBS, torch.zeros(2, 3)).tolist() == [0.0, 0.0]
    torch.testing.assert_close(answer_score(LOG_PROBS, MASK.float()), answer_score(LOG_PROBS, MASK.bool()))
