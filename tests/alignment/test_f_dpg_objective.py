"""f-DPG's coefficient and loss against enumeration: exact gradients, baselines, Z, and hand-calculated values."""

import itertools
import math

import pytest
import torch

from fdiv.alignment import f_dpg_coefficient, f_dpg_loss
from fdiv.alignment.f_dpg.loss import (
    check_f_dpg_divergence,
    effective_sample_size,
    leave_one_out_mean,
    log_partition,
    target_divergence_terms,
)
from fdiv.divergences import get_divergence, list_divergences
from tests.support.sequence_model import SequenceModel

PARAMETERS = {"alpha": {"alpha": 0.3}, "skew_jensen_shannon": {"weight": 0.3}}
ALL = [{"name": name, **PARAMETERS.get(name, {})} for name in list_divergences()]
BOUNDED = [spec for spec in ALL if math.isfinite(get_divergence(spec).slope_at_infinity)]
INFINITE = [spec for spec in ALL if math.isinf(get_divergence(spec).slope_at_infinity)]


def label(spec):
    return spec["name"]


def soft_target(model, seed=7):
    """A normalised target that is positive everywhere, and never equal to the policy (TV has a kink there)."""
    return SequenceModel().randomize(seed).log_probs().detach()


def hard_target(model):
    """The base distribution filtered to sequences that hold token 2."""
    allowed = torch.tensor([2 in sequence for sequence in model.sequences])
    log_p = soft_target(model).masked_fill(~allowed, -math.inf)
    return log_p - log_p.logsumexp(-1)


# ---------------------------------------------------------------- the expected gradient
@pytest.mark.parametrize("baseline", ["none", 0.37])
@pytest.mark.parametrize("spec", ALL, ids=label)
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_expected_gradient_on_and_off_policy(spec, hard, baseline):
    divergence = get_divergence(spec)
    if hard and spec in INFINITE:
        pytest.skip("f'(inf) = inf: refused, see test_hard_target_refused")
    model = SequenceModel().randomize(1)
    log_pi = model.log_probs()
    log_p = hard_target(model) if hard else soft_target(model)
    exact = model.gradient(divergence.exact(log_pi, log_p))
    assert exact.abs().max() > 1e-3
    log_t = (log_pi - log_p).detach()

    loss = f_dpg_loss(model.log_probs(), log_t, spec, baseline=baseline)
    on_policy = model.gradient((log_pi.detach().exp() * loss).sum())
    torch.testing.assert_close(on_policy, exact, rtol=0, atol=1e-6)

    log_q = SequenceModel().randomize(2).log_probs().detach()
    loss = f_dpg_loss(model.log_probs(), log_t, spec, log_weight=log_pi.detach() - log_q, baseline=baseline)
    off_policy = model.gradient((log_q.exp() * loss).sum())
    torch.testing.assert_close(off_policy, exact, rtol=0, atol=1e-6)


def tuples(log_q, count):
    """All `count`-tuples of sequences, `[tuples, count]`, and the probability of drawing each independently."""
    index = torch.tensor(list(itertools.product(range(len(log_q)), repeat=count)))
    return index, log_q[index].sum(-1).exp()


def expected_over_groups(model, log_t, log_q, spec, count, log_importance=None, baseline="loo"):
    """E over groups of `count` samples of q of the gradient of the group's mean loss, by enumeration.

    With `log_importance` (log P/q) t is computed with the group's own Ẑ instead.
    """
    index, probability = tuples(log_q, count)
    group_ids = torch.arange(len(index)).repeat_interleave(count)
    flat = index.flatten()
    log_pi = model.log_probs()
    group_log_t = log_t[flat]
    if log_importance is not None:
        group_log_t = group_log_t + log_partition(log_importance[index]).repeat_interleave(count)
    loss = f_dpg_loss(
        log_pi[flat],
        group_log_t,
        spec,
        log_weight=(log_pi.detach() - log_q)[flat],
        group_ids=group_ids,
        baseline=baseline,
    )
    return model.gradient((probability.repeat_interleave(count) * loss).sum() / count)


@pytest.mark.parametrize("spec", ALL, ids=label)
def test_leave_one_out_is_unbiased_on_and_off_policy(spec):
    model = SequenceModel().randomize(1)
    log_pi, log_p = model.log_probs(), soft_target(model)
    exact = model.gradient(get_divergence(spec).exact(log_pi, log_p))
    log_t = (log_pi - log_p).detach()
    for log_q in (log_pi.detach(), SequenceModel().randomize(2, 0.5).log_probs().detach()):
        estimate = expected_over_groups(model, log_t, log_q, spec, 2)
        torch.testing.assert_close(estimate, exact, rtol=0, atol=1e-6)


def test_leave_one_out_lowers_the_variance():
    """Second moment of a group's gradient with and without it, when log Z is still off by 2.

    Not a law: with Z right the centred generator has a mean slope near 0 already, and a small group's mean adds noise.
    """
    model = SequenceModel(symbols=2).randomize(1)
    log_pi = model.log_probs()
    log_t = (log_pi - SequenceModel(symbols=2).randomize(5).log_probs()).detach() + 2.0
    jacobian = torch.autograd.functional.jacobian(lambda logits: log_probs_of(model, logits), model.logits)
    index, probability = tuples(log_pi.detach(), 3)
    group_ids = torch.arange(len(index)).repeat_interleave(3)
    moments = {}
    for baseline in ("loo", "none"):
        coefficient = f_dpg_coefficient(
            log_t[index.flatten()], "jensen_shannon", group_ids=group_ids, baseline=baseline
        )
        gradients = (coefficient[:, None, None] * jacobian[index.flatten()]).view(len(index), 3, *model.logits.shape)
        moments[baseline] = (probability * gradients.mean(1).square().sum((1, 2))).sum()
    assert moments["loo"] < moments["none"]


def log_probs_of(model, logits):
    kept, model.logits = model.logits, logits
    try:
        return model.log_probs()
    finally:
        model.logits = kept


# ---------------------------------------------------------------- the normaliser
def test_z_is_unbiased_and_its_plug_in_is_not():
    """E[Ẑ] = Z by enumeration; the plugged-in gradient is biased for f' not linear in log t, less so with more samples.

    With a leave-one-out baseline the gradient of reverse KL does not see Ẑ at all: log Ẑ is the same for the group.
    """
    model = SequenceModel(symbols=2).randomize(1)
    log_pi = model.log_probs()
    log_big_p = SequenceModel(symbols=2).randomize(5).log_probs().detach() + 0.7  # log P, Z = e^0.7
    log_t_without_z = (log_pi - log_big_p).detach()
    log_q = log_pi.detach()
    bias = {}
    for count in (2, 4, 6):
        index, probability = tuples(log_q, count)
        z = (probability * log_partition((log_big_p - log_q)[index]).exp()).sum()
        assert z.item() == pytest.approx(math.exp(0.7), abs=1e-12)
        log_z = (probability * log_partition((log_big_p - log_q)[index])).sum()
        assert log_z < 0.7 - 1e-3, "log of an unbiased estimate is biased down"
        for name in ("forward_kl", "jensen_shannon", "reverse_kl"):
            exact = model.gradient(get_divergence(name).exact(model.log_probs(), log_big_p - 0.7))
            plugged = expected_over_groups(
                model, log_t_without_z, log_q, name, count, log_importance=log_big_p - log_q, baseline="loo"
            )
            bias[name, count] = ((plugged - exact).norm() / exact.norm()).item()
    for name in ("forward_kl", "jensen_shannon"):
        assert bias[name, 2] > 1e-2
        assert bias[name, 6] < bias[name, 4] < bias[name, 2]
        # first order in 1/n: n·bias converges
        assert 4 * bias[name, 4] / (6 * bias[name, 6]) == pytest.approx(1.0, abs=0.25)
    assert all(bias["reverse_kl", count] < 1e-9 for count in (2, 4, 6))


def test_log_partition_by_hand():
    weights = torch.tensor([[1.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert log_partition(weights.log()).exp().tolist() == pytest.approx([1.0, 0.0])
    assert effective_sample_size(weights.log()).tolist() == pytest.approx([16 / 10, 0.0])


# ---------------------------------------------------------------- estimates of the divergence
@pytest.mark.parametrize("spec", ALL, ids=label)
def test_divergence_terms_are_unbiased(spec):
    model = SequenceModel().randomize(1)
    log_pi = model.log_probs().detach()
    log_q = SequenceModel().randomize(2).log_probs().detach()
    divergence = get_divergence(spec)
    for log_p in [soft_target(model)] + ([hard_target(model)] if spec in BOUNDED else []):
        exact = divergence.exact(log_pi, log_p).item()
        log_t = log_pi - log_p
        terms = target_divergence_terms(log_t, spec)
        assert (terms >= 0).all()
        assert (log_pi.exp() * terms).sum().item() == pytest.approx(exact, abs=1e-9)
        off = target_divergence_terms(log_t, spec, log_weight=log_pi - log_q)
        assert (log_q.exp() * off).sum().item() == pytest.approx(exact, abs=1e-9)


def test_reverse_kl_of_a_hard_target_is_infinite():
    terms = target_divergence_terms(torch.tensor([0.0, math.inf]), "reverse_kl")
    assert terms.tolist() == [0.0, math.inf]


# ---------------------------------------------------------------- values by hand
def test_coefficient_by_hand():
    """Forward KL: f' = 1 − 1/t. t = ½, 1, 2 → −1, 0, ½; leave-one-out means ¼, −¼, −½."""
    log_t = torch.log(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
    none = f_dpg_coefficient(log_t, "forward_kl", baseline="none")
    assert none.tolist() == pytest.approx([-1.0, 0.0, 0.5])
    assert f_dpg_coefficient(log_t, "forward_kl").tolist() == pytest.approx([-1.25, 0.25, 1.0])
    weighted = f_dpg_coefficient(log_t, "forward_kl", log_weight=torch.log(torch.tensor([1.0, 2.0, 4.0])))
    assert weighted.tolist() == pytest.approx([-1.25, 0.5, 4.0])
    groups = f_dpg_coefficient(log_t, "forward_kl", group_ids=torch.tensor([9, 4, 9]))
    assert groups.tolist() == pytest.approx([-1.5, 0.0, 1.5]), "the lone sample of group 4 has baseline 0"
    given = f_dpg_coefficient(log_t, "forward_kl", baseline=torch.tensor([1.0, 0.0, -1.0]))
    assert given.tolist() == pytest.approx([-2.0, 0.0, 1.5])


def test_off_support_is_the_slope_at_infinity():
    log_t = torch.tensor([math.inf, 0.0])
    for name, slope in (("forward_kl", 1.0), ("jensen_shannon", math.log(2)), ("total_variation", 0.5)):
        assert f_dpg_coefficient(log_t, name, baseline="none").tolist() == pytest.approx([slope, 0.0])


def test_alpha_dpg_reward():
    """α-DPG's min((p/π)^{1−α'} − 1, M), α' = 0.25, is −f' of `alpha` at α = 1 − α' scaled by α, with clip = M."""
    ratio = torch.tensor([0.0, 0.5, 1.0, 8.0, 1e6], dtype=torch.float64)  # p/π; v = 0 gives −1
    divergence = get_divergence({"name": "alpha", "alpha": 0.75}).scaled(0.75)
    coefficient = f_dpg_coefficient(-ratio.log(), divergence, baseline="none", clip=10.0)
    assert (-coefficient).tolist() == pytest.approx([-1.0, 0.5**0.75 - 1, 0.0, 8**0.75 - 1, 10.0])


def test_clip_comes_before_the_baseline():
    log_t = torch.tensor([-10.0, 0.0], dtype=torch.float64)
    clipped = f_dpg_coefficient(log_t, "forward_kl", clip=3.0)
    assert clipped.tolist() == pytest.approx([-3.0, 3.0])


def test_max_exponent_reaches_the_score():
    log_t = torch.tensor([-50.0], dtype=torch.float64)
    exact = f_dpg_coefficient(log_t, "forward_kl", baseline="none").item()
    capped = f_dpg_coefficient(log_t, "forward_kl", baseline="none", max_exponent=10.0).item()
    assert exact == pytest.approx(1 - math.exp(50), rel=1e-12)
    assert exact < capped < -math.exp(10)


def test_zero_weight_and_zero_probability_leave_no_trace():
    """A proposal's sample that the policy cannot produce: coefficient 0, absent from baselines, no NaN in gradients."""
    log_prob = torch.tensor([-math.inf, -1.0, -2.0], dtype=torch.float64, requires_grad=True)
    log_t = torch.tensor([-math.inf, 0.5, -0.5], dtype=torch.float64)
    log_weight = torch.tensor([-math.inf, 0.0, 0.0], dtype=torch.float64)
    loss = f_dpg_loss(log_prob, log_t, "reverse_kl", log_weight=log_weight)
    assert loss.tolist() == pytest.approx([0.0, -1.0, 2.0])
    loss.sum().backward()
    assert log_prob.grad.tolist() == pytest.approx([0.0, 1.0, -1.0])


def test_coefficient_is_detached_and_keeps_the_type():
    log_t = torch.tensor([0.1, 0.2], requires_grad=True)
    coefficient = f_dpg_coefficient(log_t, "jensen_shannon")
    assert not coefficient.requires_grad and coefficient.dtype == torch.float32
    assert f_dpg_coefficient(log_t.detach().bfloat16(), "jensen_shannon").dtype == torch.float32
    assert f_dpg_coefficient(log_t.detach().double(), "jensen_shannon").dtype == torch.float64


def test_leave_one_out_mean_by_hand():
    values = torch.tensor([1.0, 2.0, 3.0, 10.0])
    counted = torch.tensor([True, True, False, True])
    groups = torch.tensor([5, 5, 5, 8])
    assert leave_one_out_mean(values, groups, counted).tolist() == [2.0, 1.0, 1.5, 0.0]
    assert leave_one_out_mean(values).tolist() == pytest.approx([5.0, 14 / 3, 13 / 3, 2.0])


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize("spec", INFINITE, ids=label)
def test_hard_target_refused(spec):
    with pytest.raises(ValueError, match=rf"{spec['name']}.*f'\(inf\) = inf.*smooth"):
        f_dpg_coefficient(torch.tensor([0.0, math.inf]), spec)
    with pytest.raises(ValueError, match="hard target"):
        check_f_dpg_divergence(spec, hard_target=True)
    assert check_f_dpg_divergence(spec).name == spec["name"]
    f_dpg_coefficient(torch.tensor([0.0, 1.0]), spec)  # valid on a soft target


@pytest.mark.parametrize("spec", BOUNDED, ids=label)
def test_hard_target_valid_with_a_finite_slope(spec):
    assert check_f_dpg_divergence(spec, hard_target=True).name == spec["name"]


def test_bad_arguments():
    log_t = torch.zeros(3)
    with pytest.raises(ValueError, match="baseline='mean'"):
        f_dpg_coefficient(log_t, "forward_kl", baseline="mean")
    with pytest.raises(ValueError, match="clip=0"):
        f_dpg_coefficient(log_t, "forward_kl", clip=0.0)
    with pytest.raises(ValueError, match=r"log_weight has shape \(2,\), log_t \(3,\)"):
        f_dpg_coefficient(log_t, "forward_kl", log_weight=torch.zeros(2))
    with pytest.raises(ValueError, match=r"log_t has shape \(3, 1\)"):
        f_dpg_coefficient(log_t[:, None], "forward_kl")
    with pytest.raises(ValueError, match="did you mean"):
        f_dpg_coefficient(log_t, "forward_k")
