"""What the groups of a training step say about Pass@k, and the completions that a step verified."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from fdiv.rl.advantages import subset_share

__all__ = ["correct_of", "group_statistics", "powers_of_two"]


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4 … up to `most`."""
    return [1 << bits for bits in range(most.bit_length())]


def correct_of(rewards: Tensor, threshold: float | None) -> Tensor | None:
    """Which completions are correct, `[N]` bool: reward ≥ `threshold`, 1 where none is given; unscored ones are not.

    Args:
        rewards: `[N]`, NaN where not scored.
        threshold: the reward from which on a completion is correct; None where rewards are 0 or 1.

    Returns:
        None where no threshold is given and a reward is neither 0 nor 1: then correct is not defined.
    """
    scored = rewards[~rewards.isnan()]
    if threshold is None and not ((scored == 0) | (scored == 1)).all():
        return None
    return rewards >= (1.0 if threshold is None else threshold)


def group_statistics(
    correct: Tensor, scored: Tensor, size: int, modes: Sequence[Hashable] | None = None
) -> dict[str, float]:
    """Pass@k of the groups of a step, unbiased for the policy that sampled them.

    pass@k = mean over groups of 1 − C(n − c, k)/C(n, k), n scored and c correct of a group; groups with fewer than k
    scored completions have no pass@k and are left out.

    Args:
        correct, scored: `[N]` bool, N = groups × `size`.
        size: completions of a group.
        modes: `[N]`, the mode of each correct completion (anything for the others); None: not counted.

    Returns:
        `group/pass@K` for K = 1, 2, 4 … ≤ `size`; `group/modes`, different modes among the correct completions of a
        group, mean over the groups that have one. What no group defines is left out.
    """
    right = (correct & scored).view(-1, size)
    n, c = scored.view(-1, size).sum(-1).double(), right.sum(-1).double()
    found = {}
    for k in powers_of_two(size):
        enough = n >= k
        if enough.any():
            found[f"group/pass@{k}"] = (1.0 - subset_share((n - c)[enough], n[enough], k)).mean().item()
    if modes is not None and right.any():
        rows = [row.nonzero().flatten().tolist() for row in right]
        counts = [len({modes[g * size + i] for i in row}) for g, row in enumerate(rows) if row]
        found["group/modes"] = float(torch.tensor(counts, dtype=torch.double).mean())
    return found
