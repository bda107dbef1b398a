"""Pieces of DPH-RL's loss between TRL's GRPO loss and the pure functions: weights, normalisers, rewards in groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdiv.rl.advantages import Advantage

__all__ = ["explore_mean", "group_advantages", "rehearsal_weight"]


def rehearsal_weight(coefficient: float, weighting: str, rows: int, completions: int) -> float:
    """w of L_explore + w·(mean over rehearsal rows): η (`literal`) or η·R/N (`pooled`).

    Args:
        coefficient: η.
        weighting: `literal` or `pooled`; see `DPHConfig`.
        rows: R, rehearsal rows of an optimizer step.
        completions: N, rollouts of an optimizer step.
    """
    return coefficient * rows / completions if weighting == "pooled" else coefficient


def explore_mean(per_token: Tensor, mask: Tensor, inputs: dict[str, Any], trainer: Any) -> Tensor:
    """`per_token` `[B, T]` reduced as TRL's `GRPOTrainer` reduces its loss, accumulation included.

    grpo, sapo: mean over rows of the row's token mean; bnpo: token mean of the micro-batch; dr_grpo: sum over
    rows × `max_completion_length`; luspo: mean over rows of the sum; dapo, cispo, vespo: sum over the tokens of the
    whole optimizer step.
    """
    training = trainer.model.training
    steps = trainer.current_gradient_accumulation_steps if training else 1
    values = per_token * mask
    if trainer.loss_type in ("grpo", "sapo"):
        return (values.sum(-1) / mask.sum(-1).clamp(min=1.0)).mean() / steps
    if trainer.loss_type == "bnpo":
        return values.sum() / mask.sum().clamp(min=1.0) / steps
    if trainer.loss_type == "dr_grpo":
        return values.sum() / (values.size(0) * trainer.max_completion_length) / steps
    if trainer.loss_type == "luspo":
        return values.sum(-1).mean() / steps
    tokens = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    if training:  # counted over a generation, which may hold several optimizer steps
        tokens = tokens * steps / trainer.args.steps_per_generation
    return values.sum() / tokens


def group_advantages(rewards: Tensor, size: int, advantage: Advantage) -> tuple[Tensor, Tensor]:
    """Advantages `[N]` of `rewards` `[N]` (NaN: not scored) in groups of `size`, and `[N / size]` skipped groups."""
    grouped = rewards.view(-1, size)
    return advantage(grouped).flatten().to(torch.float32), advantage.skipped(grouped)
