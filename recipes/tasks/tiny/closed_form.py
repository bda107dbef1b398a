"""The closed-form optimum of f-divergence-regularised reward maximisation.

For one prompt, a reward r(y), a reference π_ref(y) > 0 and β > 0, the problem

    max_π  E_π[r] − β · D_f(π ‖ π_ref),        D_f(π ‖ π_ref) = Σ_y π_ref(y) f(π(y) / π_ref(y)),   Σ_y π(y) = 1,

has, with u(y) = π(y)/π_ref(y) and a multiplier λ for the constraint, the stationarity condition
r(y) − β f'(u(y)) − λ = 0, so

    π*(y) = π_ref(y) · (f')⁻¹((r(y) − λ) / β),        λ such that Σ_y π*(y) = 1.

When f'(0⁺) = −∞ every π*(y) is positive, the constraints π ≥ 0 are inactive, and r(y) = β f'(u(y)) + λ: the
reparameterisation f-DPO rests on (Wang et al., arXiv:2309.16240, §4; λ cancels in a difference of two rewards of one
prompt). For reverse KL this is the familiar π_ref · exp(r/β) / Z.
"""

import math

import torch

from fdiv.divergences import Divergence, get_divergence

_BISECTIONS = 200  # float64 is exhausted after about 60 halvings of a bracket of ordinary size


def optimal_policy(
    reference_log_probs: torch.Tensor,
    reward: torch.Tensor,
    divergence: "str | dict | Divergence",
    beta: float,
) -> torch.Tensor:
    """Log-probabilities of π* = argmax_π E_π[r] − β D_f(π ‖ π_ref), over the last axis.

    The total mass Σ_y π_ref(y) (f')⁻¹((r(y) − λ)/β) falls monotonically in λ. It is at most 1 at λ = max r (every
    ratio ≤ 1), at least 1 at λ = min r (every ratio ≥ 1), and infinite as λ falls to max r − β f'(∞) when f'(∞) is
    finite, below which no ratio solves f'(u) = (r − λ)/β. So the root lies in
    [max(min r, max r − β f'(∞)), max r], and bisection in float64 finds it.

    Args:
        reference_log_probs: `[..., N]` log π_ref over N enumerated responses, finite; normalised here, so that a
            reference restricted to a subset of its responses may be given directly.
        reward: `[..., N]` rewards in any unit, finite; only differences within a row matter.
        divergence: any spec of `get_divergence` with f'(0⁺) = −∞ (scaled and normalised ones included).
        beta: the weight of the divergence, positive, in the unit of the reward.

    Returns:
        `[..., N]` log π* in float64, normalised.

    Raises:
        ValueError: a divergence with finite f'(0⁺) (π* then may put no mass on some responses and the formula above
            does not hold), a non-positive β, inputs of different shapes or with non-finite entries.
        ArithmeticError: the multiplier cannot be resolved in float64 (an extreme reward range divided by β).
    """
    divergence = get_divergence(divergence)
    if divergence.derivative_at_zero != -math.inf:
        raise ValueError(
            f"divergence {divergence.label!r} has f'(0⁺) = {divergence.derivative_at_zero}, so its optimum may vanish "
            "on some responses and has no closed form here; use one with f'(0⁺) = −∞, such as reverse_kl"
        )
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if reference_log_probs.shape != reward.shape:
        raise ValueError(
            f"reference_log_probs {tuple(reference_log_probs.shape)} and reward {tuple(reward.shape)} must have one "
            "shape"
        )
    for name, tensor in (("reference_log_probs", reference_log_probs), ("reward", reward)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds a non-finite value: leave out responses the reference cannot produce")
    reference_log_probs = torch.log_softmax(reference_log_probs.double(), dim=-1)
    # In units of β and from the best response down: the sums below then lose no digits to a common offset.
    reward = (reward.double() - reward.double().amax(dim=-1, keepdim=True)) / beta

    def unnormalised(multiplier: torch.Tensor) -> torch.Tensor:
        return reference_log_probs + divergence.inverse_derivative(reward - multiplier)

    upper = torch.zeros_like(reward[..., :1])
    lower = torch.clamp(reward.amin(dim=-1, keepdim=True), min=-float(divergence.slope_at_infinity))
    for _ in range(_BISECTIONS):
        middle = 0.5 * (lower + upper)
        if bool(((middle == lower) | (middle == upper)).all()):
            break
        too_heavy = torch.logsumexp(unnormalised(middle), dim=-1, keepdim=True) > 0
        lower, upper = torch.where(too_heavy, middle, lower), torch.where(too_heavy, upper, middle)
    log_policy = unnormalised(upper)
    residual = torch.logsumexp(log_policy, dim=-1, keepdim=True).abs().max().item()
    if not residual < 1e-4:
        raise ArithmeticError(
            f"the multiplier of {divergence.label!r} at beta={beta} could not be found in float64 (log-mass off by "
            f"{residual:.1e}): the reward range divided by beta is too large"
        )
    return torch.log_softmax(log_policy, dim=-1)


__all__ = ["optimal_policy"]
