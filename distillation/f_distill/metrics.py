"""What `FDistillTrainer` records of every row, and what it logs of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fdiv.divergences import Divergence
from fdiv.models.vocabulary import VocabularyScores
from fdiv.statistics.estimates import clustered_mean, log_ratio_quantiles

if TYPE_CHECKING:
    from fdiv.distillation.transport import TransportCosts
    from fdiv.divergences import Distance

__all__ = ["reduce_rows", "row_columns"]


@torch.no_grad()
def row_columns(
    scores: VocabularyScores,
    mask: Tensor,
    own: Tensor,
    divergence: Divergence | Distance,
    carried: tuple[Tensor, TransportCosts] | None = None,
) -> dict[str, Tensor]:
    """Per row `[B]`, means over its tokens, for `reduce_rows`.

    Args:
        scores: one value per true position of `mask[B, C]`, in row-major order.
        own: `[B]`, whether the student sampled the row's completion.
        carried: rows and costs of a Sinkhorn term; a row has as many as the term has positions in it.
    """
    tokens = mask.sum(-1)
    rows = mask.nonzero()[:, 0]

    def mean(values: Tensor) -> Tensor:
        total = torch.zeros(len(mask), dtype=torch.float32, device=mask.device)
        return total.index_add(0, rows, values.float()) / tokens.clamp(min=1)

    columns = {
        "loss": mean(scores.divergence),
        "tokens": tokens,
        "own": own,
        "entropy": mean(scores.entropy_p),
    }
    if scores.gate is not None:
        columns["gate"] = mean(scores.gate)
    if carried is not None:
        of_row, costs = carried
        zeros = torch.zeros(len(mask), dtype=torch.float32, device=mask.device)
        columns["sinkhorn"] = zeros.index_add(0, of_row, costs.cost.float())
        columns["sinkhorn_positions"] = zeros.index_add(0, of_row, torch.ones_like(costs.cost, dtype=torch.float32))
        columns["sinkhorn_row_error"] = zeros + costs.row_error.float()
    if scores.entropy_q is not None:
        columns["teacher_entropy"] = mean(scores.entropy_q)
    if scores.log_q is None:
        return columns
    log_ratio = scores.log_p - scores.log_q
    columns["log_ratio"] = mean(log_ratio)
    if isinstance(divergence, Divergence):
        try:
            columns["density_weight"] = mean(divergence.density_weight(log_ratio))
        except ValueError:  # total variation has no curvature
            pass
    return columns


def reduce_rows(examples: Mapping[str, Tensor], divergence: Divergence | Distance) -> dict[str, float]:
    """The metrics of `FDistillTrainer` from the recorded rows; means are over tokens, errors over rows."""
    tokens = examples["tokens"]
    counted = tokens > 0
    number = torch.arange(len(tokens))
    value, error = clustered_mean(examples["loss"], tokens, number)
    metrics = {
        f"divergence/{divergence.label}": value,
        f"divergence/{divergence.label}_se": error,
        "entropy": clustered_mean(examples["entropy"], tokens, number)[0],
        "on_policy_fraction": examples["own"].mean().item(),
    }
    if "sinkhorn" in examples and examples["sinkhorn_positions"].sum() > 0:
        metrics["sinkhorn"] = (examples["sinkhorn"].sum() / examples["sinkhorn_positions"].sum()).item()
        metrics["sinkhorn_row_error"] = examples["sinkhorn_row_error"].max().item()
    if "gate" in examples:
        metrics["gate"] = clustered_mean(examples["gate"], tokens, number)[0]
    if "teacher_entropy" in examples:
        metrics["teacher_entropy"] = clustered_mean(examples["teacher_entropy"], tokens, number)[0]
    if not counted.any() or "log_ratio" not in examples:
        return metrics
    metrics |= log_ratio_quantiles("tokens", examples["log_ratio"][counted])
    if "density_weight" in examples:
        weights = log_ratio_quantiles("tokens", examples["density_weight"][counted])
        metrics |= {name.replace("log_ratio/", "density_weight/"): value for name, value in weights.items()}
    return metrics
