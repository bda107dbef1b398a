"""k1, k2, k3 against enumeration: which value and which gradient each of them really has."""

import math

import pytest
import torch

from fdiv.divergences import get_divergence
from fdiv.rl import list_kl_estimators, resolve_kl
from fdiv.rl.kl_estimators import KL_ESTIMATORS, k1_reward, k2_loss, k3_loss, k3_ratio_corrected
from tests.support.sequence_model import SequenceModel

LOSSES = [name for name, entry in KL_ESTIMATORS.items() if entry.enters == "loss"]


def setting(**kwargs):
    """A policy, and the fixed reference and behaviour policy on the same sequences."""
    model = SequenceModel(**kwargs).randomize(1)
    return model, SequenceModel(**kwargs).randomize(4, 1.5), SequenceModel(**kwargs).randomize(3, 0.7)


def local_kl_gradient(model, reference, sampler, name):
    """Σ over prefixes of how often `sampler` reaches them, times ∇ of the KL of the next-token distributions."""
    per_prefix = get_divergence(name).exact(model.logits.log_softmax(-1), reference.logits.log_softmax(-1).detach())
    return model.gradient((model_visits(model, sampler) * per_prefix).sum())


def model_visits(model, sampler):
    return model.visits(sampler.log_probs().detach().exp())


def loss_gradient(name, model, reference, sampler):
    """E over sequences of `sampler` of ∇ Σ_t loss_t."""
    tokens = model.token_log_probs()
    log_ratio = tokens - reference.token_log_probs().detach()
    log_importance = tokens - sampler.token_log_probs().detach()
    per_token = resolve_kl(name)(log_ratio, log_importance) * model.mask
    return model.gradient((sampler.log_probs().detach().exp() * per_token.sum(-1)).sum())


def close(actual, expected):
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- gradients
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_of_one_choice(name):
    """A single token: the gradient is that of the divergence the entry names, and not of the other direction."""
    model, reference, _ = setting(length=1)
    estimator = resolve_kl(name)
    exact = {
        kind: model.gradient(get_divergence(kind).exact(model.log_probs(), reference.log_probs().detach()))
        for kind in ("reverse_kl", "forward_kl")
    }
    actual = loss_gradient(name, model, reference, model)
    close(actual, exact.pop(estimator.expected_gradient))
    assert (actual - next(iter(exact.values()))).abs().max() > 1e-2


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_over_sequences_is_that_of_the_visited_prefixes(name):
    model, reference, _ = setting()
    kind = resolve_kl(name).expected_gradient
    assert resolve_kl(name).scope == "token"
    actual = loss_gradient(name, model, reference, model)
    close(actual, local_kl_gradient(model, reference, model, kind))
    whole = model.gradient(get_divergence(kind).exact(model.log_probs(), reference.log_probs().detach()))
    assert (actual - whole).abs().max() > 1e-2


def test_k1_as_a_reward_is_the_gradient_of_whole_completions():
    model, reference, _ = setting()
    assert resolve_kl("k1_reward").scope == "sequence"
    log_probs = model.log_probs()
    penalty = (k1_reward(model.token_log_probs() - reference.token_log_probs()) * model.mask).sum(-1)
    assert not penalty.requires_grad
    exact = model.gradient(get_divergence("reverse_kl").exact(model.log_probs(), reference.log_probs().detach()))
    for baseline in (0.0, 0.7):
        close(model.gradient((log_probs.detach().exp() * (penalty - baseline) * log_probs).sum()), exact)


def test_k1_as_a_loss_has_no_gradient():
    model, reference, _ = setting()
    log_ratio = (model.token_log_probs() - reference.token_log_probs().detach()) * model.mask
    gradient = model.gradient((model.log_probs().detach().exp() * log_ratio.sum(-1)).sum())
    assert gradient.abs().max() < 1e-12


def test_ratio_corrected_k3_holds_off_policy_and_plain_k3_does_not():
    model, reference, sampler = setting()
    exact = local_kl_gradient(model, reference, sampler, "reverse_kl")
    corrected = loss_gradient("k3_ratio_corrected", model, reference, sampler)
    # E over the sampler's tokens of π/π_old puts the policy's next-token distribution on the sampler's prefixes
    close(corrected, exact)
    for name in ("k2_loss", "k3_loss"):
        for kind in ("reverse_kl", "forward_kl"):
            target = local_kl_gradient(model, reference, sampler, kind)
            assert (loss_gradient(name, model, reference, sampler) - target).abs().max() > 1e-2


# ---------------------------------------------------------------- values
def test_which_values_are_unbiased():
    model, reference, sampler = setting(length=1)
    log_pi, log_ref, log_old = (m.log_probs().detach() for m in (model, reference, sampler))
    exact = get_divergence("reverse_kl").exact(log_pi, log_ref).item()
    x = log_pi - log_ref
    pi, old = log_pi.exp(), log_old.exp()
    assert (pi * k1_reward(x)).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (pi * k3_loss(x)).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (old * k3_ratio_corrected(x, log_pi - log_old)).sum().item() == pytest.approx(exact, abs=1e-12)
    assert abs((pi * k2_loss(x)).sum().item() - exact) > 1e-2


def test_by_hand_and_as_trl_writes_it():
    log_ratio = torch.tensor([math.log(2.0), 0.0, -math.log(4.0)], dtype=torch.float64)
    assert k1_reward(log_ratio).tolist() == pytest.approx([math.log(2), 0, -math.log(4)])
    assert k2_loss(log_ratio).tolist() == pytest.approx([math.log(2) ** 2 / 2, 0, math.log(4) ** 2 / 2])
    k3 = [0.5 - 1 + math.log(2), 0.0, 4 - 1 - math.log(4)]
    assert k3_loss(log_ratio).tolist() == pytest.approx(k3)
    assert k3_ratio_corrected(log_ratio, torch.full((3,), math.log(3.0)).double()).tolist() == pytest.approx(
        [3 * value for value in k3]
    )
    x = torch.linspace(-20, 20, 81, dtype=torch.float64)
    torch.testing.assert_close(k3_loss(x), torch.exp(-x) - (-x) - 1, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", list_kl_estimators())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_far_out(name, dtype):
    far = torch.tensor([-1e4, -100.0, -60.0, 0.0, 60.0, 100.0, 1e4], dtype=dtype)
    log_ratio = far.clone().requires_grad_()
    values = resolve_kl(name)(log_ratio, torch.tensor([1e4] * 7, dtype=dtype))
    assert values.dtype == torch.float32
    assert values.isfinite().all()
    if name == "k1_reward":
        assert not values.requires_grad
        return
    (gradient,) = torch.autograd.grad(values.sum(), log_ratio)
    assert gradient.isfinite().all()
    assert (gradient.sign() == far.sign()).all()


# ---------------------------------------------------------------- names
def test_names():
    assert list_kl_estimators() == ["k1_reward", "k2_loss", "k3_loss", "k3_ratio_corrected"]
    labels = {name: (resolve_kl(name).enters, resolve_kl(name).expected_gradient) for name in list_kl_estimators()}
    assert labels == {
        "k1_reward": ("reward", "reverse_kl"),
        "k2_loss": ("loss", "reverse_kl"),
        "k3_loss": ("loss", "forward_kl"),
        "k3_ratio_corrected": ("loss", "reverse_kl"),
    }
    built = resolve_kl("k2_loss")
    assert resolve_kl(built) is built
    with pytest.raises(ValueError, match="unknown KL estimator 'k3_los'; did you mean 'k3_loss'"):
        resolve_kl("k3_los")


def test_what_the_correction_needs():
    with pytest.raises(ValueError, match="k3_ratio_corrected needs log_importance"):
        resolve_kl("k3_ratio_corrected")(torch.zeros(2))
    with pytest.raises(ValueError, match=r"log_importance has shape \(1,\), log_ratio \(2,\)"):
        k3_ratio_corrected(torch.zeros(2), torch.zeros(1))
