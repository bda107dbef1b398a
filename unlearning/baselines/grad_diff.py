"""GradDiff: gradient ascent on forget answers, descent on retain answers (Liu et al. 2022, arXiv:2203.12817)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fdiv.unlearning.config import UnlearningConfig
from fdiv.unlearning.losses import grad_ascent
from fdiv.unlearning.scoring import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer

__all__ = ["GradDiffConfig", "GradDiffTrainer"]


@dataclass
class GradDiffConfig(UnlearningConfig):
    """Configuration of `GradDiffTrainer`: the shared keys; γ and α are `forget_weight` and `retain_weight`."""

    retain_terms: ClassVar[tuple[str, ...]] = ("nll", "divergence")
    retain_reason: ClassVar[str] = "Without a retain term it is the method grad_ascent"


class GradDiffTrainer(UnlearningTrainer):
    """Trains `grad_diff`: γ·grad_ascent(forget) + α·nll(retain)."""

    config_class = GradDiffConfig
    _tag_names = ["trl", "fdiv", "unlearning", "grad-diff"]
    _name = "GradDiff"

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        """Mean token log-probability of the forget answer."""
        return grad_ascent(scores["forget"].log_probs, scores["forget"].mask)
