"""The loss of distillation as a pure function of log-probabilities; the trainer computes it from hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fdiv.divergences import get_distance

if TYPE_CHECKING:
    from fdiv.divergences import DistanceSpec

__all__ = ["f_distill_loss"]


def f_distill_loss(log_p: Tensor, log_q: Tensor, mask: Tensor, divergence: DistanceSpec) -> Tensor:
    """(1/|y|) Σ_t D_f(p(·|x, y_<t) ‖ q(·|x, y_<t)) over the whole vocabulary → `[B]`, nats per token.

    GKD (Agarwal et al. 2024, arXiv:2306.13649) has three f: `forward_kl`, `reverse_kl` and, for its JSD(β),
    `skew_jensen_shannon(weight=1 − β)`. The trainer averages over the tokens of the global batch, not of each row.

    Args:
        log_p: `[B, T, V]` log-probabilities of the student. log_q: `[B, T, V]` of the teacher.
        mask: `[B, T]` bool or 0/1, the completion's tokens; a row without any counts 0.
        divergence: any spec of `fdiv.divergences.get_distance`.
    """
    mask = mask.bool()
    values = get_distance(divergence).exact(log_p[mask], log_q.detach()[mask])
    total = values.new_zeros(mask.shape[0]).index_add(0, mask.nonzero()[:, 0], values)
    return total / mask.sum(-1).clamp(min=1)
