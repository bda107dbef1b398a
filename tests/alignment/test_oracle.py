"""Oracle: minimising the population f-DPO loss of an enumerable policy reaches the closed-form optimum, for every divergence.

The world: one prompt, N responses, a known reward r and a reference π_ref. Preference pairs follow Bradley–Terry, so the
population loss is Σ_{i≠j} μ(i) μ(j) σ(r_i − r_j) · f_dpo_loss(log u_i, log u_j). Its minimum is where the model's preference
probability σ(β f'(u_i) − β f'(u_j)) equals σ(r_i − r_j) for every pair, that is r = β f'(u) + λ: the closed form.
"""

import math

import pytest
import torch

from fdiv.alignment import f_dpo_loss
from fdiv.divergences import Divergence, get_divergence, list_divergences
from fdiv.recipes.tasks.tiny.closed_form import optimal_policy

RESPONSES = 24
PARAMETERS = {
    "alpha": [{"alpha": 0.1}, {"alpha": 0.5}, {"alpha": 0.9}],
    "skew_jensen_shannon": [{"weight": 0.1}, {"weight": 0.3}, {"weight": 0.8}],
}


def _forward_kl_from_generator() -> Divergence:
    return Divergence.from_generator("user_forward_kl", lambda log_t: -log_t + torch.expm1(log_t))


def _specs() -> dict[str, object]:
    """Every valid entry of the registry (each parameter set), and the algebra on top of it."""
    specs: dict[str, object] = {}
    for name in list_divergences():
        for parameters in PARAMETERS.get(name, [{}]):
            label = name + "".join(f"[{key}={value}]" for key, value in parameters.items())
            specs[label] = {"name": name, **parameters}
    forward, js = get_divergence("forward_kl"), get_divergence("jensen_shannon")
    specs["jensen_shannon.scaled(3)"] = js.scaled(3.0)
    specs["jeffreys.normalized()"] = get_divergence("jeffreys").normalized()
    specs["forward_kl.dual()"] = forward.dual()
    specs["forward_kl+pearson_chi2"] = forward + get_divergence("pearson_chi2")
    specs["jensen_shannon+alpha"] = js + get_divergence({"name": "alpha", "alpha": 0.5})
    specs["from_generator"] = _forward_kl_from_generator()
    return {label: spec for label, spec in specs.items() if get_divergence(spec).derivative_at_zero == -math.inf}


SPECS = _specs()


def _world(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.log_softmax(torch.randn(RESPONSES, generator=generator, dtype=torch.float64), dim=0)
    return reference, torch.randn(RESPONSES, generator=generator, dtype=torch.float64)


def _population_loss(logits, reference, reward, divergence, beta):
    """Σ over ordered pairs of the pair's weight (sampled from the reference, labelled by Bradley–Terry) times its loss."""
    chosen, rejected = (~torch.eye(len(logits), dtype=torch.bool)).nonzero(as_tuple=True)
    weight = reference[chosen].exp() * reference[rejected].exp() * torch.sigmoid(reward[chosen] - reward[rejected])
    log_ratio = torch.log_softmax(logits, dim=0) - reference
    return (weight / weight.sum() * f_dpo_loss(log_ratio[chosen], log_ratio[rejected], divergence, beta)).sum()


def _minimise(reference, reward, divergence, beta, tolerance=1e-8):
    """L-BFGS from the reference until the gradient norm is below `tolerance`; returns the log-policy and that norm."""
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=500,
        history_size=50,
        tolerance_grad=1e-12,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = _population_loss(logits, reference, reward, divergence, beta)
        loss.backward()
        return loss

    for _ in range(20):  # each call starts a fresh quasi-Newton history
        optimizer.step(closure)
        closure()
        norm = logits.grad.norm().item()
        if norm < tolerance:
            break
    return torch.log_softmax(logits.detach(), dim=0), norm


def _total_variation(log_p, log_q):
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum().item()


@pytest.mark.parametrize("beta", [0.5])
@pytest.mark.parametrize("label", sorted(SPECS))
def test_f_dpo_reaches_the_closed_form_optimum(label, beta):
    divergence = get_divergence(SPECS[label])
    reference, reward = _world()
    policy, gradient_norm = _minimise(reference, reward, divergence, beta)
    optimum = optimal_policy(reference, reward, divergence, beta)
    assert gradient_norm < 1e-8
    assert _total_variation(reference, optimum) > 0.05, (
        "the optimum must be away from the start for this test to mean anything"
    )
    assert _total_variation(policy, optimum) < 1e-3


@pytest.mark.parametrize("label", sorted(SPECS))
def test_closed_form_satisfies_the_stationarity_condition_and_beats_its_neighbours(label):
    divergence, beta = get_divergence(SPECS[label]), 0.3
    reference, reward = _world(seed=1)
    optimum = optimal_policy(reference, reward, divergence, beta)
    assert optimum.dtype == torch.float64
    assert optimum.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    multiplier = reward - beta * divergence.derivative(optimum - reference)
    assert (multiplier - multiplier.mean()).abs().max().item() < 1e-6

    def objective(log_policy):
        return (log_policy.exp() * reward).sum() - beta * divergence.exact(log_policy, reference)

    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        neighbour = torch.log_softmax(
            optimum + 0.1 * torch.randn(RESPONSES, generator=generator, dtype=torch.float64), dim=0
        )
        assert objective(neighbour) < objective(optimum)


def test_reverse_kl_is_the_gibbs_distribution():
    reference, reward = _world(seed=3)
    expected = torch.log_softmax(reference + reward / 0.25, dim=0)
    torch.testing.assert_close(optimal_policy(reference, reward, "reverse_kl", 0.25), expected, atol=1e-12, rtol=0)


def test_forward_kl_by_hand():
    # Two responses, π_ref = ½, rewards 1 and 0, β = 1: f'(u) = 1 − 1/u, so π = ½/(1 − r + λ) = 1/(2λ) and 1/(2(1 + λ)), whose sum
    # is 1 when 2λ² = 1: λ = 1/√2 and π*(best) = 1/√2.
    uniform = torch.full((2,), 0.5, dtype=torch.float64).log()
    optimum = optimal_policy(uniform, torch.tensor([1.0, 0.0]), "forward_kl", 1.0).exp()
    assert optimum[0].item() == pytest.approx(math.sqrt(0.5), abs=1e-12)


def test_batches_are_rows_and_offsets_do_not_matter():
    rows = [_world(seed=seed) for seed in (4, 5, 6)]
    reference, reward = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
    batch = optimal_policy(reference - 3.0, reward + 100.0, "jensen_shannon", 0.1)
    for row, (one_reference, one_reward) in zip(batch, rows, strict=True):
        torch.testing.assert_close(
            row, optimal_policy(one_reference, one_reward, "jensen_shannon", 0.1), atol=1e-8, rtol=0
        )


@pytest.mark.parametrize(
    "name", ["forward_kl", "jensen_shannon", "squared_hellinger", "neyman_chi2", "reverse_kl", "chi2_kl"]
)
def test_small_beta_puts_the_mass_on_the_best_response_and_large_beta_keeps_the_reference(name):
    reference, reward = _world(seed=7)
    greedy = optimal_policy(reference, reward, name, 1e-5)
    assert greedy.argmax() == reward.argmax()
    assert greedy.max().exp().item() > 0.95
    assert _total_variation(optimal_policy(reference, reward, name, 1e4), reference) < 1e-3


def test_refusals_name_the_reason():
    reference, reward = _world()
    with pytest.raises(ValueError, match=r"pearson_chi2.*f'\(0"):
        optimal_policy(reference, reward, "pearson_chi2", 0.1)
    with pytest.raises(ValueError, match="beta must be positive"):
        optimal_policy(reference, reward, "reverse_kl", 0.0)
    with pytest.raises(ValueError, match="one shape"):
        optimal_policy(reference, reward[:3], "reverse_kl", 0.1)
    with pytest.raises(ValueError, match="non-finite"):
        optimal_policy(torch.full_like(reference, -math.inf), reward, "reverse_kl", 0.1)
