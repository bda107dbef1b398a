"""Which rehearsal rows a micro-step scores, and how they share one padded batch with the rollouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fdiv.rl.advantages import Advantage

if TYPE_CHECKING:
    from fdiv.rl.dph.rehearsal import RehearsalBatch

__all__ = ["JointBatch", "explore_mean", "group_advantages", "join", "rows_of_slot", "rows_of_step"]


def rows_of_step(available: int, count: int, step: int, seed: int) -> list[int]:
    """Numbers of the `count` rows that optimizer step `step` rehearses, of `available` cached ones.

    The steps read the cache in an order shuffled again for each pass; it follows from (seed, pass) alone,
    so that a resumed run goes on where it was and processes agree without communication.
    """
    rows: list[int] = []
    position = step * count
    while len(rows) < count:
        number, offset = divmod(position + len(rows), available)
        order = np.random.default_rng([seed, number]).permutation(available)
        rows += order[offset : offset + count - len(rows)].tolist()
    return rows


def rows_of_slot(rows: list[int], slot: int, slots: int) -> list[int]:
    """The rows of one micro-step on one process; the `slots` of an optimizer step differ by one row at most."""
    return rows[slot::slots]


class JointBatch(NamedTuple):
    """Rollouts above, rehearsal rows below; prompts end and completions begin at the same column.

    Attributes:
        input_ids, attention_mask: `[B + R, P + C]`.
        completion_length: C.
        rollouts, rollout_length: B, and the width of the rollouts' completions before padding.
        rehearsal_length: the width of the rehearsal rows' completions before padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_length: int
    rollouts: int
    rollout_length: int
    rehearsal_length: int

    def split(self, per_token: Tensor) -> tuple[Tensor, Tensor]:
        """`[B + R, C]` values as those of the rollouts and those of the rehearsal rows, unpadded."""
        return per_token[: self.rollouts, : self.rollout_length], per_token[self.rollouts :, : self.rehearsal_length]


def join(
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_length: int,
    rehearsal: RehearsalBatch,
    pad_token_id: int,
    multiple_of: int | None = None,
) -> JointBatch:
    """Rollouts `[B, P₁ + C₁]` and rehearsal rows in one batch, prompts padded left and completions right.

    Args:
        input_ids, attention_mask: the rollouts.
        completion_length: C₁.
        rehearsal: the rows to append.
        pad_token_id: what ids are padded with.
        multiple_of: both parts get a width that is a multiple of it; None: as wide as the longest.
    """
    ids = torch.cat([rehearsal.prompt_ids, rehearsal.completion_ids], dim=1)
    mask = torch.cat([rehearsal.prompt_mask, rehearsal.completion_mask], dim=1)
    lengths = (completion_length, rehearsal.completion_ids.size(1))
    prompts = (input_ids.size(1) - lengths[0], rehearsal.prompt_ids.size(1))
    prompt_width, width = (_rounded(max(pair), multiple_of) for pair in (prompts, lengths))

    def stacked(parts: tuple[Tensor, Tensor], value: int) -> Tensor:
        sizes = zip(parts, prompts, lengths, strict=True)
        return torch.cat([F.pad(part, (prompt_width - p, width - c), value=value) for part, p, c in sizes])

    return JointBatch(
        stacked((input_ids, ids), pad_token_id),
        stacked((attention_mask, mask), 0),
        width,
        input_ids.size(0),
        *lengths,
    )


def _rounded(width: int, multiple_of: int | None) -> int:
    return width if multiple_of is None else -(-width // multiple_of) * multiple_of


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
