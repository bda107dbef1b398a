"""The loss of D²O: a pure function of log-ratios, one value per example.

A log-ratio is log π_θ(y|x) − log π_ref(y|x), summed over the completion tokens of y.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from fdiv.alignment.f_dpo.loss import check_f_dpo_divergence
from fdiv.divergences import get_divergence

if TYPE_CHECKING:
    from fdiv.divergences import Divergence

__all__ = ["check_d2o_weights", "d2o_experimental_reason", "d2o_loss"]


def check_d2o_weights(alpha: float, beta: float) -> None:
    """ValueError unless α > 0 and β ≥ 0, both finite.

    Args:
        alpha: α, of the rejected answers. beta: β, of the anchors.

    Raises:
        ValueError: see above.
    """
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha}: D2O needs alpha > 0, the finite weight of the rejected answer")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta={beta}: D2O needs beta >= 0, the finite weight of the anchors")


def d2o_experimental_reason(
    divergence: str | Mapping[str, Any] | Divergence, alpha: float, beta: float, *, one_reference: bool = True
) -> str | None:
    """Why D²O under this divergence is a heuristic; None for `reverse_kl` (the published loss) and where it is exact.

    Args:
        divergence: any spec of `get_divergence`.
        alpha, beta: the weights of the two terms.
        one_reference: whether the anchors and the rejected answer are compared with the same reference.
    """
    name = get_divergence(divergence).label
    if name == "reverse_kl" or (alpha == beta and one_reference):
        return None
    cause = f"alpha={alpha} differs from beta={beta}" if alpha != beta else "the two references differ"
    return (
        f"D2O with the divergence {name} is experimental here: {cause}. The reward of an answer is "
        "beta*f'(pi/pi_ref) + c(x), and c(x), which cannot be computed, cancels between the anchors and the rejected "
        "answer only if both carry the same weight (alpha = beta) and the same reference; otherwise the loss is a "
        "heuristic that no reward model stands behind"
    )


def d2o_loss(
    anchor_log_ratio: Tensor,
    rejected_log_ratio: Tensor,
    alpha: float,
    beta: float,
    divergence: str | Mapping[str, Any] | Divergence = "reverse_kl",
    *,
    max_exponent: float | None = None,
) -> Tensor:
    """D²O: −log σ((β/K)·Σ_k f′(π_θ(y_k)/π_r⁻(y_k)) − α·f′(π_θ(y_l)/π_r⁺(y_l))) (Duan et al. 2024, arXiv:2403.03419).

    The anchors y_1 … y_K are the model's own samples, averaged inside σ, so that a bad sample counts 1/K. With K = 1,
    α = β and one reference it is f-DPO with the anchor as the chosen answer; with no anchors it is (α/2)·NPO at NPO's
    β = α; it is at most the mean over k of its value with anchor k alone (Jensen).

    Args:
        anchor_log_ratio: `[B, K]`, log π_θ(y_k|x) − log π_r⁻(y_k|x), summed over tokens, nats. K = 0 is allowed.
        rejected_log_ratio: `[B]`, log π_θ(y_l|x) − log π_r⁺(y_l|x).
        alpha: weight of the rejected answer, > 0.
        beta: weight of the anchors, ≥ 0.
        divergence: any spec of `get_divergence` with f′(0⁺) = −∞. The paper's loss is `reverse_kl`; another one is
            experimental unless α = β and both references are the same (see `d2o_experimental_reason`).
        max_exponent: overflow cap on exp-type scores, see `f_dpo_rewards`.

    Returns:
        `[B]`, nats; float32 for half-precision input, float64 is kept.

    Raises:
        ValueError: an invalid divergence (see `check_f_dpo_divergence`), `alpha` ≤ 0, `beta` < 0, shapes that do not
            fit.

    Warns:
        UserWarning: another divergence than `reverse_kl` with α ≠ β, with the reason.
    """
    _check_d2o_inputs(anchor_log_ratio, rejected_log_ratio, alpha, beta)
    f = check_f_dpo_divergence(divergence, objective="D2O")
    reason = d2o_experimental_reason(f, alpha, beta)
    if reason:
        warnings.warn(reason, UserWarning, stacklevel=2)
    anchors = f.score(anchor_log_ratio, max_exponent).sum(-1) / max(anchor_log_ratio.size(1), 1)
    return -F.logsigmoid(beta * anchors - alpha * f.score(rejected_log_ratio, max_exponent))


def _check_d2o_inputs(anchors: Tensor, rejected: Tensor, alpha: float, beta: float) -> None:
    check_d2o_weights(alpha, beta)
    if anchors.dim() != 2 or rejected.shape != anchors.shape[:1]:
        raise ValueError(
            f"anchor_log_ratio has shape {tuple(anchors.shape)} and rejected_log_ratio {tuple(rejected.shape)}: D2O "
            "needs [B, K] and [B]"
        )
