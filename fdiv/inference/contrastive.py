"""Contrastive decoding of a prompt against a stripped one: what the model would say without the details is taken off.

After USCD (arXiv:2409.05923), in the space of probabilities, token by token and only where a gate says so. Both
prompts are continued side by side with the same tokens, two rows of a batch per completion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdiv.divergences import get_distance

__all__ = ["COLLISION", "Contrast", "ContrastProcessor", "contrasted"]

COLLISION = "collision"


@dataclass(frozen=True)
class Contrast:
    """How scores are contrasted; p₀ and p₁: the next-token distributions after the prompt and after the stripped one.

    Args:
        gate: which tokens are contrasted. `"collision"`: where ∑p₀², the chance that two draws agree, is below
            `threshold`, so that the model is unsure; USCD's standard deviation of p₀ is √((∑p₀² − 1/V)/(V − 1)),
            which says the same and depends on the vocabulary's size V. Any spec of `get_distance`: where D(p₀‖p₁) is
            at least `threshold`, so that the two prompts disagree.
        threshold: of the gate.
        eta: η ∈ [0, 1), how much of p₁ is taken off; 0 is standard decoding, bit for bit.
        cutoff: c ≥ 0: of the contrasted tokens only those with p₀ ≥ c/V are left.
    """

    gate: str | Mapping[str, Any] = COLLISION
    threshold: float = 0.4
    eta: float = 0.7
    cutoff: float = 1 / 3

    def __post_init__(self) -> None:
        if self.gate != COLLISION:
            get_distance(self.gate)
        for name, value, most in (("threshold", self.threshold, math.inf), ("cutoff", self.cutoff, math.inf)):
            if not 0 <= value < most:
                raise ValueError(f"contrast {name}={value}: must be a number of at least 0")
        if not 0 <= self.eta < 1:
            raise ValueError(f"contrast eta={self.eta}: must lie in [0, 1)")


def contrasted(scores: Tensor, stripped: Tensor, how: Contrast) -> Tensor:
    """Scores `[B, V]` to sample from: log(p₀ − η·p₁)⁺ over p₀ ≥ c/V where the gate says so, elsewhere `scores`.

    A row where nothing of p₀ is left keeps its scores, too: that can happen for η > 1 − c.

    Args:
        scores, stripped: `[B, V]` logits after the prompt and after the stripped one; −inf is no token.
    """
    log_p0, log_p1 = (logits.double().log_softmax(-1) for logits in (scores, stripped))
    p0, p1 = log_p0.exp(), log_p1.exp()
    left = (p0 - how.eta * p1).masked_fill(p0 < how.cutoff / p0.size(-1), 0.0).clamp(min=0.0)
    chosen = _gate(p0, log_p0, log_p1, how) & (left.sum(-1) > 0)
    if how.eta == 0:
        chosen = torch.zeros_like(chosen)
    return torch.where(chosen.unsqueeze(-1), left.log().to(scores.dtype), scores)


def _gate(p0: Tensor, log_p0: Tensor, log_p1: Tensor, how: Contrast) -> Tensor:
    """`[B]` bool: the rows to contrast."""
    if how.gate == COLLISION:
        return p0.square().sum(-1) < how.threshold
    return get_distance(how.gate).exact(log_p0, log_p1) >= how.threshold


class ContrastProcessor:
    """A logits processor over `[2B, V]`: the first B rows continue prompts, the others the stripped ones.

    Both halves get the contrasted scores, so that whatever picks the token picks the same for both.
    """

    def __init__(self, how: Contrast) -> None:
        self.how = how

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        half = contrasted(*scores.chunk(2), self.how)
        return torch.cat([half, half])
