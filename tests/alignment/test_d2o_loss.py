"""d2o_loss: its special cases, the bound, the gradient by enumeration, and who is refused."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from fdiv.alignment import d2o_loss, f_dpo_loss
from fdiv.alignment.d2o.loss import d2o_experimental_reason
from fdiv.divergences import get_divergence
from fdiv.unlearning import npo

ALPHA = {"name": "alpha", "alpha": 0.3}
VALID = [
    "reverse_kl",
    "forward_kl",
    "jensen_shannon",
    "jeffreys",
    "squared_hellinger",
    "neyman_chi2",
    "chi2_kl",
    ALPHA,
]


def _log_ratios(*shape: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------ hand values
def test_hand_calculated_values():
    # K = 2, anchors 1 and 3 (mean 2), rejected -1, alpha 0.5, beta 0.25: -log sigmoid(0.25*2 + 0.5*1) = log(1 + e^-1).
    value = d2o_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([-1.0]), alpha=0.5, beta=0.25)
    assert value.item() == pytest.approx(math.log1p(math.exp(-1.0)), rel=1e-6)
    # forward KL: f'(e^x) = 1 - e^-x; anchors log 2, log 4 → (1/2 + 3/4)/2 = 5/8; rejected log 2 → 1/2.
    anchors, rejected = torch.tensor([[2.0, 4.0]]).double().log(), torch.tensor([2.0]).double().log()
    value = d2o_loss(anchors, rejected, alpha=1.0, beta=1.0, divergence="forward_kl")
    assert value.item() == pytest.approx(math.log1p(math.exp(-(5 / 8 - 1 / 2))), rel=1e-12)


@pytest.mark.parametrize("divergence", VALID, ids=str)
def test_start_is_log_two(divergence):
    zeros = torch.zeros(3, 11, dtype=torch.float64)
    torch.testing.assert_close(
        d2o_loss(zeros, zeros[:, 0], 0.1, 0.1, divergence), torch.full((3,), math.log(2), dtype=torch.float64)
    )


# ---------------------------------------------------------------------------------------------------- special cases
@pytest.mark.parametrize("divergence", VALID, ids=str)
def test_one_anchor_and_equal_weights_is_f_dpo(divergence):
    anchors, rejected = _log_ratios(64, 1), _log_ratios(64)
    torch.testing.assert_close(
        d2o_loss(anchors, rejected, 0.3, 0.3, divergence, max_exponent=5.0),
        f_dpo_loss(anchors[:, 0], rejected, divergence, 0.3, max_exponent=5.0),
        rtol=1e-11,
        atol=1e-15,
    )


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_without_anchors_it_is_half_alpha_times_npo(beta):
    rejected, alpha = _log_ratios(64, scale=20.0), 0.1
    expected = alpha / 2 * npo(rejected, beta=alpha)
    torch.testing.assert_close(
        d2o_loss(rejected.new_empty(64, 0), rejected, alpha, beta), expected, rtol=1e-12, atol=0
    )


def test_beta_zero_drops_the_anchors():
    anchors, rejected = _log_ratios(64, 5), _log_ratios(64)
    torch.testing.assert_close(d2o_loss(anchors, rejected, 0.2, 0.0), 0.1 * npo(rejected, beta=0.2))


def test_small_alpha_alone_has_the_gradient_of_ascent():
    rejected = _log_ratios(8).requires_grad_()
    d2o_loss(rejected.new_empty(8, 0), rejected, 1e-9, 0.0).sum().backward()
    torch.testing.assert_close(rejected.grad, torch.full_like(rejected, 0.5e-9), rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------------------ bounds
@pytest.mark.parametrize("divergence", VALID, ids=str)
def test_jensen_bound_against_the_instance_level_loss(divergence):
    anchors, rejected = _log_ratios(256, 7), _log_ratios(256)
    grouped = d2o_loss(anchors, rejected, 0.4, 0.4, divergence)
    instance = torch.stack([f_dpo_loss(anchors[:, k], rejected, divergence, 0.4) for k in range(7)], dim=1).mean(1)
    assert (grouped <= instance * (1 + 1e-12)).all()
    assert (grouped < instance).double().mean() > 0.95  # strictly, wherever σ is not saturated: the anchors differ
    same = anchors[:, :1].expand(-1, 7)
    torch.testing.assert_close(
        d2o_loss(same, rejected, 0.4, 0.4, divergence), f_dpo_loss(same[:, 0], rejected, divergence, 0.4)
    )


# ------------------------------------------------------------------------------------------- oracles by enumeration
def _small_world() -> tuple[torch.Tensor, torch.Tensor, int]:
    """Policy logits and reference log-probabilities over five answers, and the rejected one."""
    policy = torch.tensor([0.3, -0.8, 0.1, 1.2, -0.4], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([0.0, 0.5, -1.0, 0.2, 0.4], dtype=torch.float64), -1)
    return policy, reference, 3


def _expected_loss(policy: torch.Tensor, reference: torch.Tensor, rejected: int, k: int, alpha, beta) -> torch.Tensor:
    """E over all 5^K tuples of anchors y_k ~ π_r of the D²O loss."""
    log_ratio = torch.log_softmax(policy, -1) - reference
    tuples = torch.tensor(list(itertools.product(range(5), repeat=k)))
    losses = d2o_loss(log_ratio[tuples], log_ratio[rejected].expand(len(tuples)), alpha, beta)
    return (reference[tuples].sum(-1).exp() * losses).sum()


@pytest.mark.parametrize(("alpha", "beta"), [(0.7, 0.7), (1.3, 0.4)])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_gradient_by_enumeration(k, alpha, beta):
    """∇ E[loss] = −Σ_tuples π_r(tuple)·σ(r̂(y_l) − r̂(tuple))·[(β/K) Σ ∇log π(y_k) − α ∇log π(y_l)], summed by hand."""
    policy, reference, rejected = _small_world()
    (found,) = torch.autograd.grad(_expected_loss(policy, reference, rejected, k, alpha, beta), policy)
    probs = torch.softmax(policy.detach(), -1)
    score = torch.eye(5, dtype=torch.float64) - probs  # row y: ∇ log π(y) of a softmax
    log_ratio = probs.log() - reference
    expected = torch.zeros(5, dtype=torch.float64)
    for anchors in itertools.product(range(5), repeat=k):
        weight = math.exp(sum(reference[y].item() for y in anchors))
        reward_gap = alpha * log_ratio[rejected] - beta * sum(log_ratio[y] for y in anchors) / k
        direction = beta / k * sum(score[y] for y in anchors) - alpha * score[rejected]
        expected -= weight * torch.sigmoid(reward_gap) * direction
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_more_anchors_lower_the_expected_loss_towards_the_kl_limit():
    """E[loss] falls with K (Jensen on averages) to −log σ(−β·KL(π_r‖π) − α·log-ratio of the rejected answer)."""
    policy, reference, rejected = _small_world()
    values = [_expected_loss(policy, reference, rejected, k, 2.0, 2.0).item() for k in range(1, 7)]
    assert all(later < earlier for earlier, later in itertools.pairwise(values))
    log_probs = torch.log_softmax(policy.detach(), -1)
    kl = get_divergence("reverse_kl").exact(reference, log_probs)
    limit = -F.logsigmoid(-2.0 * kl - 2.0 * (log_probs - reference)[rejected]).item()
    assert values[-1] > limit
    # The excess over the limit is σ(1−σ)/2·β²·Var/K to first order, so K·excess tends to a constant.
    excess = [(value - limit) * k for k, value in enumerate(values, start=1)]
    assert excess[-1] == pytest.approx(excess[-2], rel=0.02)


# ------------------------------------------------------------------------------------------- refusals and the warning
def test_experimental_unless_equal_weights_and_one_reference():
    ratios = torch.zeros(2, 3), torch.zeros(2)
    with pytest.warns(UserWarning, match=r"forward_kl is experimental here: alpha=0.2 differs from beta=0.1"):
        d2o_loss(*ratios, 0.2, 0.1, "forward_kl")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        d2o_loss(*ratios, 0.1, 0.1, "forward_kl")
        d2o_loss(*ratios, 0.2, 0.1)  # the published loss
    assert "two references differ" in d2o_experimental_reason("jeffreys", 0.1, 0.1, one_reference=False)
    assert d2o_experimental_reason("jeffreys", 0.1, 0.1) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.0}, r"alpha=0.0: D2O needs alpha > 0"),
        ({"alpha": float("nan")}, r"alpha=nan"),
        ({"beta": -0.1}, r"beta=-0.1: D2O needs beta >= 0"),
        ({"divergence": "pearson_chi2"}, r"D2O cannot use the divergence 'pearson_chi2'.*f'\(0\+\) = -2"),
        ({"divergence": "total_variation"}, r"D2O cannot use"),
        ({"anchor_log_ratio": torch.zeros(2)}, r"needs \[B, K\] and \[B\]"),
        ({"rejected_log_ratio": torch.zeros(3)}, r"\(2, 3\) and rejected_log_ratio \(3,\)"),
    ],
)
def test_refusals(changes, message):
    arguments = {
        "anchor_log_ratio": torch.zeros(2, 3),
        "rejected_log_ratio": torch.zeros(2),
        "alpha": 0.1,
        "beta": 0.1,
    }
    with pytest.raises(ValueError, match=message):
        d2o_loss(**arguments | changes)


def test_far_out_log_ratios_stay_finite():
    anchors = torch.tensor([[-1e4, 1e4], [-1e4, -1e4]], requires_grad=True)
    rejected = torch.tensor([1e4, -1e4], requires_grad=True)
    for divergence in VALID:
        values = d2o_loss(anchors, rejected, 0.1, 0.1, divergence)
        gradients = torch.autograd.grad(values.sum(), (anchors, rejected))
        assert torch.isfinite(values).all() and all(torch.isfinite(g).all() for g in gradients), divergence
    assert d2o_loss(anchors.half(), rejected.half(), 0.1, 0.1).dtype == torch.float32
