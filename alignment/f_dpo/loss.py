"""The loss of f-DPO: a pure function of log-ratios, one value per example.

A log-ratio is log π_θ(y|x) − log π_ref(y|x), summed over the completion tokens of y.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from fdiv.divergences import get_divergence

if TYPE_CHECKING:
    from fdiv.divergences import Divergence

__all__ = ["check_f_dpo_divergence", "f_dpo_loss", "f_dpo_rewards"]


def check_f_dpo_divergence(
    divergence: str | Mapping[str, Any] | Divergence, *, objective: str = "f-DPO"
) -> Divergence:
    """The divergence `divergence` specifies, if f-DPO (or another `objective` on the same reward) is defined for it.

    f-DPO turns max_π E_π[r] − β·D_f(π‖π_ref) into a loss through its KKT condition r(x, y) = β·f′(π/π_ref) + c(x). It
    holds for every y only if the optimum is positive everywhere; f′(0⁺) = −∞ ensures that (Wang et al. 2023,
    arXiv:2309.16240).

    Raises:
        ValueError: unknown name, missing parameter (from `get_divergence`), or f′(0⁺) is finite.
    """
    divergence = get_divergence(divergence)
    if divergence.derivative_at_zero != -float("inf"):
        raise ValueError(
            f"{objective} cannot use the divergence {divergence.name!r}: it needs f'(0+) = -inf, here f'(0+) = "
            f"{divergence.derivative_at_zero:g}. With a finite slope at 0 the optimal policy may give a response "
            "probability 0 (the KKT multiplier of pi >= 0 becomes active), and then r = beta*f'(pi/pi_ref) + c(x), on "
            "which the loss rests, no longer holds. Valid ones: `fdiv divergences` lists them (reverse_kl, "
            "forward_kl, jensen_shannon, jeffreys, alpha, ...); chi2_kl repairs pearson_chi2"
        )
    return divergence


def f_dpo_rewards(
    log_ratio: Tensor,
    divergence: str | Mapping[str, Any] | Divergence,
    beta: float,
    *,
    max_exponent: float | None = None,
) -> Tensor:
    """The implicit reward β·f′(π/π_ref), of which the reward r differs by a constant c(x) only (arXiv:2309.16240).

    Args:
        log_ratio: log π − log π_ref of whole completions, any shape, nats.
        divergence: any spec of `get_divergence` that `check_f_dpo_divergence` accepts. f′(1) = 0.
        beta: weight of the divergence in the regularised objective, > 0.
        max_exponent: overflow cap on exp-type scores. Where the exponent of f′ stays below it the value is exact;
            above it follows a logarithmic continuation with a continuous slope, so that the gradient neither vanishes
            nor overflows. None: the registry's own saturation, beyond exponent 60.

    Returns:
        The shape of `log_ratio`; float32 for half-precision input, float64 is kept.

    Raises:
        ValueError: an invalid divergence, `beta` ≤ 0.
    """
    return beta * _checked(divergence, beta).score(log_ratio, max_exponent)


def f_dpo_loss(
    chosen_log_ratio: Tensor,
    rejected_log_ratio: Tensor,
    divergence: str | Mapping[str, Any] | Divergence,
    beta: float,
    *,
    max_exponent: float | None = None,
) -> Tensor:
    """f-DPO: −log σ(β·f′(u_w) − β·f′(u_l)) with u = π_θ(y|x)/π_ref(y|x) (Wang et al. 2023, arXiv:2309.16240).

    At π_θ = π_ref it is log 2 and its slope in the chosen log-ratio is −β·f″(1)/2 for every divergence; with
    `reverse_kl` it is DPO.

    Args:
        chosen_log_ratio: `[B]`, log π_θ(y_w|x) − log π_ref(y_w|x), summed over tokens, nats.
        rejected_log_ratio: `[B]`, the same of y_l.
        divergence: any spec of `get_divergence` with f′(0⁺) = −∞.
        beta: weight of the divergence in the regularised objective, > 0.
        max_exponent: overflow cap on exp-type scores, see `f_dpo_rewards`.

    Returns:
        `[B]`, nats; float32 for half-precision input, float64 is kept.

    Raises:
        ValueError: an invalid divergence (see `check_f_dpo_divergence`), `beta` ≤ 0.
    """
    divergence = _checked(divergence, beta)
    if chosen_log_ratio.shape != rejected_log_ratio.shape:
        raise ValueError(
            f"chosen_log_ratio has shape {tuple(chosen_log_ratio.shape)}, rejected_log_ratio "
            f"{tuple(rejected_log_ratio.shape)}: they are the two answers of the same prompts, one value each"
        )
    chosen = divergence.score(chosen_log_ratio, max_exponent)
    rejected = divergence.score(rejected_log_ratio, max_exponent)
    return -F.logsigmoid(beta * (chosen - rejected))


def _checked(divergence: str | Mapping[str, Any] | Divergence, beta: float) -> Divergence:
    if not 0 < beta < float("inf"):
        raise ValueError(
            f"beta={beta}: f-DPO needs a finite beta > 0, the weight of the divergence from the reference"
        )
    return check_f_dpo_divergence(divergence)
