"""Gradient ascent on the forget answers (GA): no retain rows, no reference, unbounded (arXiv:2210.01504)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fdiv.unlearning.config import UnlearningConfig
from fdiv.unlearning.losses import grad_ascent
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer

__all__ = ["GradAscentConfig", "GradAscentTrainer"]


@dataclass
class GradAscentConfig(UnlearningConfig):
    """Configuration of `GradAscentTrainer`: the shared keys, without a retain term."""

    retain_terms: ClassVar[tuple[str, ...]] = ("none",)
    retain_reason: ClassVar[str] = "With a retain term it is the method grad_diff (nll) or kl_retain (divergence)"

    retain_term: str = field(default="none", metadata={"help": "Gradient ascent has none.", "choices": ("none",)})


class GradAscentTrainer(UnlearningTrainer):
    """Trains `grad_ascent`."""

    config_class = GradAscentConfig
    title = "gradient ascent on the forget answers"
    paper = "arXiv:2210.01504"

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        """Mean token log-probability of the forget answer."""
        return grad_ascent(scores["forget"].log_probs, scores["forget"].mask)
