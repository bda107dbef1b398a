"""What `FDistillTrainer` records of every row, and what it logs of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fdiv.models.vocabulary import VocabularyScores
from fdiv.statistics.estimates import clustered_mean, log_ratio_quantiles

if TYPE_CHECKING:
    from fdiv.divergences import Divergence

__all__ = ["reduce_rows", "row_columns"]


@torch.no_grad()
def row_columns(scores: VocabularyScores, mask: Tensor, own: Tensor, divergence: Divergence) -> dict[str, Tensor]:
    """Per row `[B]`, means over its tokens, for `reduce_rows`.

    Args:
        scores: one value per true position of `mask[B, C]`, in row-major order.
        own: `[B]`, whether the student sampled the row's completion.
    """
    tokens = mask.sum(-1)
    rows = mask.nonzero()[:, 0]

    def mean(values: Tensor) -> Tensor:
        total = torch.zeros(len(mask), dtype=torch.float32, device=mask.device)
        return total.index_add(0, rows, values.float()) / tokens.clamp(min=1)

    log_ratio = scores.log_p - scores.log_q
    columns = {
        "loss": mean(scores.divergence),
        "tokens": tokens,
        "own": own,
        "log_ratio": mean(log_ratio),
        "entropy": mean(scores.entropy_p),
        "teacher_entropy": mean(scores.entropy_q),
    }
    try:
        columns["density_weight"] = mean(divergence.density_weight(log_ratio))
    except ValueError:  # total variation has no curvature
        pass
    return columns


def reduce_rows(examples: Mapping[str, Tensor], divergence: Divergence) -> dict[str, float]:
    """The metrics of `FDistillTrainer` from the recorded rows; means are over tokens, errors over rows."""
    tokens = examples["tokens"]
    counted = tokens > 0
    number = torch.arange(len(tokens))
    value, error = clustered_mean(examples["loss"], tokens, number)
    metrics = {
        f"divergence/{divergence.label}": value,
        f"divergence/{divergence.label}_se": error,
        "entropy": clustered_mean(examples["entropy"], tokens, number)[0],
        "teacher_entropy": clustered_mean(examples["teacher_entropy"], tokens, number)[0],
        "on_policy_fraction": examples["own"].mean().item(),
    }
    if not counted.any():
        return metrics
    metrics |= log_ratio_quantiles("tokens", examples["log_ratio"][counted])
    if "density_weight" in examples:
        weights = log_ratio_quantiles("tokens", examples["density_weight"][counted])
        metrics |= {name.replace("log_ratio/", "density_weight/"): value for name, value in weights.items()}
    return metrics
