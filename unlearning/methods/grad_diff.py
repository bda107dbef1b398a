"""GradDiff: gradient ascent on forget answers, descent on retain answers (Liu et al. 2022, arXiv:2203.12817)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fdiv.unlearning.config import UnlearningConfig
from fdiv.unlearning.losses import grad_ascent, grad_diff
from fdiv.unlearning.roles import RoleScores
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
    title = "gradient ascent on forget, descent on retain answers"
    paper = "arXiv:2203.12817"

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        """Mean token log-probability of the forget answer."""
        return grad_ascent(scores["forget"].log_probs, scores["forget"].mask)

    def example_loss(
        self, scores: dict[str, RoleScores], forget_term: Tensor, retain_term: Tensor | None = None
    ) -> Tensor:
        """`grad_diff` of the two answers; with `retain_term: divergence` the weighted sum of the two terms."""
        if self.args.retain_term != "nll":
            return super().example_loss(scores, forget_term, retain_term)
        forget, retain, weights = scores["forget"], scores["retain"], self.args
        return grad_diff(
            forget.log_probs,
            forget.mask,
            retain.log_probs,
            retain.mask,
            forget_weight=weights.forget_weight,
            retain_weight=weights.retain_weight,
        )
