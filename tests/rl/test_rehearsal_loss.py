"""The rehearsal loss: values by hand, gradients by enumeration, what it does far from the reference, JS by definition."""

import math

import pytest
import torch

from fdiv.divergences import Divergence, get_divergence, list_divergences
from fdiv.rl import check_rehearsal_divergence, js_on_policy, js_on_reference, rehearsal_coefficient, rehearsal_loss
from fdiv.rl.dph.loss import REHEARSAL_LEVELS, rehearsal_capped
from tests.support.sequence_model import SequenceModel

PARAMETERS = {"alpha": {"alpha": 0.3}, "skew_jensen_shannon": {"weight": 0.3}}
ALL = [{"name": name, **PARAMETERS.get(name, {})} for name in list_divergences()]


def label(spec):
    return spec["name"]


def row(values, dtype=torch.float64):
    return torch.tensor([values], dtype=dtype, requires_grad=True)


def ones(log_ratio):
    return torch.ones_like(log_ratio, dtype=torch.bool)


def pair():
    """A policy and a reference over sequences of exactly three tokens."""
    return SequenceModel(fixed_length=True).randomize(1), SequenceModel(fixed_length=True).randomize(2)


def close(actual, expected, atol=1e-12):
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# ---------------------------------------------------------------- values
def test_by_hand():
    """Forward KL u − 1 − log u at u = 2 and ½; their product is 1. The third token and the third row do not count."""
    log_ratio = torch.tensor([[math.log(2), -math.log(2), 5.0], [math.log(3), 1.0, 2.0], [1.0, 2.0, 3.0]]).double()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    two, half, three = 1 - math.log(2), math.log(2) - 0.5, 2 - math.log(3)
    assert rehearsal_loss(log_ratio, mask, "forward_kl").tolist() == pytest.approx([(two + half) / 2, three, 0.0])
    assert rehearsal_loss(log_ratio, mask, "forward_kl", "sequence").tolist() == pytest.approx([0.0, three, 0.0])


PAPER = {
    "forward_kl": (lambda u: u - 1 - u.log(), lambda u: u - 1),
    "jensen_shannon": (
        lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
        lambda u: u * (2 * u / (1 + u)).log(),
    ),
    "alpha": (
        lambda u: (u**0.8 - 0.8 * u - 0.2) / (0.2 * -0.8),
        lambda u: (u - u**0.8) / 0.2,
    ),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_generators_and_coefficients(name):
    """The released losses per token, and u·f′(u) as the gradient."""
    value, coefficient = PAPER[name]
    spec = {"name": "alpha", "alpha": 0.2} if name == "alpha" else name
    log_ratio = torch.linspace(-12, 6, 37, dtype=torch.float64)[:, None].requires_grad_()
    loss = rehearsal_loss(log_ratio, ones(log_ratio), spec)
    u = log_ratio.detach().exp()[:, 0]
    torch.testing.assert_close(loss, value(u), rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    torch.testing.assert_close(gradient[:, 0], coefficient(u), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rehearsal_coefficient(log_ratio, spec), gradient, rtol=0, atol=0)


def test_alpha_tends_to_both_kl():
    log_ratio = torch.linspace(-3, 3, 13, dtype=torch.float64)[None]
    for alpha, limit in ((1e-6, "reverse_kl"), (1 - 1e-6, "forward_kl")):
        loss = rehearsal_loss(log_ratio, ones(log_ratio), {"name": "alpha", "alpha": alpha})
        torch.testing.assert_close(loss, rehearsal_loss(log_ratio, ones(log_ratio), limit), rtol=1e-4, atol=0)


def test_jensen_shannon_is_twice_the_textbooks():
    model, reference = pair()
    log_pi, log_ref = model.log_probs().detach(), reference.log_probs().detach()
    log_m = torch.logaddexp(log_pi, log_ref) - math.log(2)
    textbook = 0.5 * ((log_pi.exp() * (log_pi - log_m)).sum() + (log_ref.exp() * (log_ref - log_m)).sum())
    log_ratio = (model.token_log_probs() - reference.token_log_probs()).detach()
    expected = (log_ref.exp() * rehearsal_loss(log_ratio, model.mask, "jensen_shannon", "sequence")).sum()
    assert expected.item() == pytest.approx(2 * textbook.item(), abs=1e-12)
    assert 0.05 < textbook < math.log(2)


# ---------------------------------------------------------------- the expected gradient
@pytest.mark.parametrize("spec", ALL, ids=label)
def test_sequence_level_is_the_divergence_of_whole_completions(spec):
    model, reference = pair()
    log_ref = reference.log_probs().detach()
    log_ratio = model.token_log_probs() - reference.token_log_probs().detach()
    loss = (log_ref.exp() * rehearsal_loss(log_ratio, model.mask, spec, "sequence")).sum()
    exact = get_divergence(spec).exact(model.log_probs(), log_ref)
    assert loss.item() == pytest.approx(exact.item(), abs=1e-10)
    close(model.gradient(loss), model.gradient(exact), atol=1e-10)


@pytest.mark.parametrize("spec", ALL, ids=label)
def test_token_level_is_the_mean_divergence_of_the_next_token(spec):
    model, reference = pair()
    log_ref = reference.log_probs().detach()
    log_ratio = model.token_log_probs() - reference.token_log_probs().detach()
    loss = (log_ref.exp() * rehearsal_loss(log_ratio, model.mask, spec)).sum()
    per_prefix = get_divergence(spec).exact(model.logits.log_softmax(-1), reference.logits.log_softmax(-1).detach())
    exact = (reference.visits(log_ref.exp()) * per_prefix).sum() / 3
    assert loss.item() == pytest.approx(exact.item(), abs=1e-10)
    close(model.gradient(loss), model.gradient(exact), atol=1e-10)


@pytest.mark.parametrize("spec", ALL, ids=label)
def test_chain_rule_holds_for_forward_kl_alone(spec):
    """Summed over the tokens of reference samples it is the divergence of whole completions, in value and gradient."""
    model, reference = pair()
    log_ref = reference.log_probs().detach()
    log_ratio = model.token_log_probs() - reference.token_log_probs().detach()
    summed = 3 * (log_ref.exp() * rehearsal_loss(log_ratio, model.mask, spec)).sum()
    whole = get_divergence(spec).exact(model.log_probs(), log_ref)
    if spec["name"] == "forward_kl":
        assert summed.item() == pytest.approx(whole.item(), abs=1e-12)
        close(model.gradient(summed), model.gradient(whole))
    else:
        assert abs(summed.item() / whole.item() - 1) > 0.01


@pytest.mark.parametrize("level", REHEARSAL_LEVELS)
@pytest.mark.parametrize("spec", ALL, ids=label)
def test_no_gradient_at_the_reference(spec, level):
    log_ratio = row([0.0, 0.0, 0.0], torch.float32)
    for clip in (None, 0.5):
        loss = rehearsal_loss(log_ratio, ones(log_ratio), spec, level, coefficient_clip=clip)
        assert loss.item() == pytest.approx(0.0, abs=1e-7)
        (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
        assert gradient.abs().max() < 1e-7


def test_a_generator_that_is_not_centred_is_centred_before_it_counts():
    """−log u alone would raise the probability of cached samples for ever; the registry adds u − 1."""
    nll = Divergence.from_generator("nll", lambda log_t: -log_t)
    log_ratio = row([-2.0, 0.0, 1.5])
    ours = rehearsal_loss(log_ratio, ones(log_ratio), nll)
    assert ours.item() == pytest.approx(rehearsal_loss(log_ratio, ones(log_ratio), "forward_kl").item(), abs=1e-9)
    assert rehearsal_coefficient(log_ratio, nll)[0].tolist() == pytest.approx(
        [math.exp(-2) - 1, 0.0, math.exp(1.5) - 1], abs=1e-6
    )


# ---------------------------------------------------------------- far from the reference
@pytest.mark.parametrize("spec", ALL, ids=label)
def test_which_divergences_bring_lost_tokens_back(spec):
    """u → 0: −1 for forward KL and Jeffreys, −∞ for Neyman, 0 exactly where f(0⁺) is finite."""
    coefficient = rehearsal_coefficient(torch.tensor([-25.0, -50.0], dtype=torch.float64), spec)
    if math.isfinite(get_divergence(spec).at_zero):
        assert coefficient[0].abs() < 1e-5
        assert coefficient[1].abs() < 1e-10
        bound = get_divergence(spec).at_zero - get_divergence(spec).generator(torch.tensor([-2.0]).double())
        assert rehearsal_coefficient(torch.tensor([-2.0]).double(), spec).abs() <= bound
    elif spec["name"] == "neyman_chi2":
        assert coefficient.tolist() == pytest.approx([-math.exp(25), -math.exp(50)])
    else:
        assert spec["name"] in ("forward_kl", "jeffreys")
        assert coefficient.tolist() == pytest.approx([-1.0, -1.0], abs=1e-8)


def test_the_pull_of_jensen_shannon_never_exceeds_a_quarter():
    log_ratio = torch.linspace(-20, 0, 20001, dtype=torch.float64)
    coefficient = rehearsal_coefficient(log_ratio, "jensen_shannon")
    assert coefficient.min().item() == pytest.approx(-0.23, abs=0.005)
    assert log_ratio[coefficient.argmin()].exp().item() == pytest.approx(0.3, abs=0.03)


FAR = [-1e4, -1e3, -100.0, -31.0, -5.0, 0.0, 5.0, 31.0, 100.0, 1e3, 1e4]


@pytest.mark.parametrize("level", REHEARSAL_LEVELS)
@pytest.mark.parametrize("spec", ALL, ids=label)
def test_finite_far_out(spec, level):
    for dtype in (torch.float32, torch.bfloat16):
        for max_exponent in (None, 10.0, 80.0):
            log_ratio = torch.tensor(FAR, dtype=dtype)[:, None].requires_grad_()
            loss = rehearsal_loss(log_ratio, ones(log_ratio), spec, level, max_exponent=max_exponent)
            assert loss.dtype == torch.float32
            assert loss.isfinite().all()
            assert (loss >= 0).all()
            (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
            assert gradient.isfinite().all()
            assert (gradient[6:] > 0).all(), "where f grows it keeps pulling down"
            assert (gradient[:5] <= 0).all()
            assert (loss[6:].diff() > 0).all()


@pytest.mark.parametrize("spec", ALL, ids=label)
def test_max_exponent_leaves_the_rest_bit_for_bit(spec):
    log_ratio = torch.linspace(-9.0, 9.0, 181)[:, None].requires_grad_()
    touched = rehearsal_capped(log_ratio, spec, 6.0)[:, 0]
    assert 0.1 < touched.float().mean() < 0.8
    exact = rehearsal_loss(log_ratio, ones(log_ratio), spec)
    capped = rehearsal_loss(log_ratio, ones(log_ratio), spec, max_exponent=6.0)
    assert torch.equal(exact[~touched], capped[~touched])
    assert (capped[touched] < exact[touched]).all()
    slope = torch.autograd.grad(capped.sum(), log_ratio)[0][:, 0]
    before = torch.autograd.grad(exact.sum(), log_ratio)[0][:, 0]
    assert torch.equal(before[~touched], slope[~touched])
    assert (slope[touched].sign() == before[touched].sign()).all()
    assert not rehearsal_capped(log_ratio, spec).any()


def test_max_exponent_counts_the_largest_power():
    """Pearson's f holds u²; Neyman's u and 1/u; forward KL's u only."""
    log_ratio = torch.tensor([-4.0, 4.0])
    capped = {name: rehearsal_capped(log_ratio, name, 5.0).tolist() for name in ("pearson_chi2", "forward_kl")}
    assert capped == {"pearson_chi2": [False, True], "forward_kl": [False, False]}
    assert rehearsal_capped(log_ratio, "neyman_chi2", 3.0).tolist() == [True, True]
    assert rehearsal_capped(log_ratio, "forward_kl", 3.0).tolist() == [False, True]


@pytest.mark.parametrize("level", REHEARSAL_LEVELS)
@pytest.mark.parametrize("spec", ALL, ids=label)
def test_clipping_bounds_the_gradient_and_not_the_value(spec, level):
    log_ratio = torch.tensor(FAR, dtype=torch.float64)[:, None].requires_grad_()
    exact = rehearsal_loss(log_ratio, ones(log_ratio), spec, level)
    clipped = rehearsal_loss(log_ratio, ones(log_ratio), spec, level, coefficient_clip=0.3)
    assert torch.equal(exact, clipped)
    (gradient,) = torch.autograd.grad(clipped.sum(), log_ratio)
    torch.testing.assert_close(gradient, rehearsal_coefficient(log_ratio, spec).clamp(-0.3, 0.3), rtol=0, atol=0)


def test_a_forgotten_token_still_pulls_where_a_value_clip_lets_go():
    """log u = −15: the released clamp of the value at 10 has gradient 0 there, the clipped coefficient has −1."""
    log_ratio = row([-15.0])
    value_clip = rehearsal_loss(log_ratio, ones(log_ratio), "forward_kl").clamp(max=10.0)
    assert torch.autograd.grad(value_clip.sum(), log_ratio)[0].item() == 0.0
    loss = rehearsal_loss(log_ratio, ones(log_ratio), "forward_kl", coefficient_clip=10.0)
    assert loss.item() == pytest.approx(14.0, abs=1e-6)
    assert torch.autograd.grad(loss.sum(), log_ratio)[0].item() == pytest.approx(-1.0, abs=1e-6)


def test_the_clip_is_of_each_token_before_the_mean():
    """Forward KL, clip ½: coefficients e − 1 → ½, −0.4 stays (log u = log 0.6), 0.3 stays; a third each."""
    log_ratio = row([1.0, math.log(0.6), math.log(1.3), 9.0])
    mask = torch.tensor([[1, 1, 1, 0]])
    loss = 2.0 * rehearsal_loss(log_ratio, mask, "forward_kl", coefficient_clip=0.5)
    gradient = torch.autograd.grad(loss.sum(), log_ratio)[0][0]
    assert gradient.tolist() == pytest.approx([1.0 / 3, -0.8 / 3, 0.6 / 3, 0.0])
    share = (rehearsal_coefficient(log_ratio, "forward_kl")[mask.bool()].abs() > 0.5).double().mean()
    assert share.item() == pytest.approx(1 / 3)


# ---------------------------------------------------------------- padding
@pytest.mark.parametrize("level", REHEARSAL_LEVELS)
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_padding_is_never_read(level, clip, dtype):
    for junk in (math.nan, math.inf, -math.inf):
        log_ratio = torch.tensor([[0.5, junk, -0.3], [junk, junk, junk]], requires_grad=True)
        mask = torch.tensor([[1, 0, 1], [0, 0, 0]]).to(dtype)
        loss = rehearsal_loss(log_ratio, mask, "jeffreys", level, coefficient_clip=clip)
        clean = torch.tensor([[0.5, -0.3]])
        assert loss[0].item() == rehearsal_loss(clean, ones(clean), "jeffreys", level).item()
        assert loss[1].item() == 0.0
        (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
        assert gradient[0, 1] == 0
        assert (gradient[1] == 0).all()
        assert gradient[0, 0] != 0


def test_works_where_gradients_are_off():
    log_ratio = torch.tensor([[0.5, -0.5]])
    with torch.no_grad():
        assert rehearsal_coefficient(log_ratio, "forward_kl")[0, 0].item() == pytest.approx(math.exp(0.5) - 1)
        loss = rehearsal_loss(log_ratio, ones(log_ratio), "forward_kl", coefficient_clip=0.1)
    assert not loss.requires_grad


# ---------------------------------------------------------------- Jensen–Shannon by definition
def kl_to_mixture(log_p, log_q):
    """KL(p‖½(p + q)), differentiable in both."""
    return (log_p.exp() * (log_p - torch.logaddexp(log_p, log_q) + math.log(2))).sum()


def js_parts(level="sequence", gradient="pathwise"):
    """Values and expected gradients of both halves on whole completions, and the pair of models."""
    model, reference = pair()
    log_pi, log_ref = model.log_probs(), reference.log_probs().detach()
    log_ratio = model.token_log_probs() - reference.token_log_probs().detach()
    on_reference = (log_ref.exp() * js_on_reference(log_ratio, model.mask, level)).sum()
    on_policy = (log_pi.detach().exp() * js_on_policy(log_ratio, model.mask, level, gradient=gradient)).sum()
    return model, log_pi, log_ref, on_reference, on_policy


def test_definition_values_add_up_to_jensen_shannon():
    _, log_pi, log_ref, on_reference, on_policy = js_parts()
    assert on_reference.item() == pytest.approx(kl_to_mixture(log_ref, log_pi).item(), abs=1e-12)
    assert on_policy.item() == pytest.approx(kl_to_mixture(log_pi, log_ref).item(), abs=1e-12)
    exact = get_divergence("jensen_shannon").exact(log_pi, log_ref).item()
    assert (on_reference + on_policy).item() == pytest.approx(exact, abs=1e-12)


def test_definition_gradients():
    model, log_pi, log_ref, on_reference, on_policy = js_parts()
    of_reference = model.gradient(kl_to_mixture(log_ref, log_pi))
    half_forward = 0.5 * model.gradient(get_divergence("forward_kl").exact(log_pi, log_ref))
    close(model.gradient(on_reference), of_reference)
    # through the value: not the gradient of KL(π‖m), and the sum is half a forward KL
    pathwise = model.gradient(on_policy)
    close(pathwise, half_forward - of_reference)
    true = model.gradient(kl_to_mixture(log_pi, log_ref))
    assert (pathwise - true).abs().max() > 1e-2
    close(model.gradient(on_reference + on_policy), half_forward)
    js = model.gradient(get_divergence("jensen_shannon").exact(log_pi, log_ref))
    assert (half_forward - js).abs().max() > 1e-2
    # by the score function: Jensen–Shannon's own
    model, log_pi, log_ref, on_reference, on_policy = js_parts(gradient="score")
    assert on_policy.item() == pytest.approx(kl_to_mixture(log_pi, log_ref).item(), abs=1e-12)
    close(model.gradient(on_policy), true)
    close(model.gradient(on_reference + on_policy), js)


def test_both_gradients_agree_to_first_order():
    """Near the reference their difference falls with the square of the distance."""
    gaps = []
    for distance in (0.1, 0.05):
        reference = SequenceModel(fixed_length=True).randomize(2)
        model = SequenceModel(fixed_length=True).randomize(2)
        with torch.no_grad():
            model.logits += distance * SequenceModel(fixed_length=True).randomize(5).logits
        log_ratio = model.token_log_probs() - reference.token_log_probs().detach()
        pi = model.log_probs().detach().exp()
        gradients = [
            model.gradient((pi * js_on_policy(log_ratio, model.mask, "sequence", gradient=kind)).sum())
            for kind in ("pathwise", "score")
        ]
        gaps.append(((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item())
    assert gaps[0] < 0.15
    assert gaps[0] / gaps[1] == pytest.approx(2.0, abs=0.3)


def test_definition_at_token_level_by_hand():
    """u = 3: m/π_ref = 2, m/π_θ = 2/3. u = 1: nothing."""
    log_ratio = torch.tensor([[math.log(3), 0.0, 7.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0]])
    assert js_on_reference(log_ratio, mask).item() == pytest.approx((2 - 1 - math.log(2)) / 2)
    for kind in ("pathwise", "score"):
        value = js_on_policy(log_ratio, mask, gradient=kind).item()
        assert value == pytest.approx((2 / 3 - 1 - math.log(2 / 3)) / 2)


def test_definition_far_out():
    log_ratio = torch.tensor(FAR)[:, None].requires_grad_()
    for loss in (
        js_on_reference(log_ratio, ones(log_ratio)),
        js_on_policy(log_ratio, ones(log_ratio)),
        js_on_policy(log_ratio, ones(log_ratio), gradient="score"),
    ):
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), log_ratio)[0].isfinite().all()


# ---------------------------------------------------------------- what is refused
@pytest.mark.parametrize("level", REHEARSAL_LEVELS)
@pytest.mark.parametrize("spec", ALL, ids=label)
def test_the_whole_registry_is_valid(spec, level):
    """Each centred f has its minimum at u = 1 on every sample: π = π_ref is a minimum on any set of samples."""
    divergence = check_rehearsal_divergence(spec, level)
    assert divergence == get_divergence(spec)
    log_ratio = torch.linspace(-6, 6, 25, dtype=torch.float64)
    coefficient = rehearsal_coefficient(log_ratio, divergence)
    assert (coefficient[:12] < 0).all()
    assert (coefficient[13:] > 0).all()


def test_bad_arguments():
    log_ratio = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="level='word': rehearsal is taken at level 'token' or 'sequence'"):
        rehearsal_loss(log_ratio, ones(log_ratio), "forward_kl", "word")
    with pytest.raises(ValueError, match="divergence 'kl' is ambiguous"):
        rehearsal_loss(log_ratio, ones(log_ratio), "kl")
    with pytest.raises(ValueError, match="coefficient_clip=0: the bound must be above 0"):
        rehearsal_loss(log_ratio, ones(log_ratio), "forward_kl", coefficient_clip=0)
    with pytest.raises(ValueError, match="max_exponent must lie in"):
        rehearsal_loss(log_ratio, ones(log_ratio), "forward_kl", max_exponent=100.0)
    with pytest.raises(ValueError, match=r"log_ratio has shape \(1, 2\) and mask \(1, 3\): both must be \[B, T\]"):
        rehearsal_loss(log_ratio, torch.ones(1, 3), "forward_kl")
    with pytest.raises(ValueError, match="gradient='exact': 'pathwise'"):
        js_on_policy(log_ratio, ones(log_ratio), gradient="exact")
