"""KL-retain: gradient ascent on forget answers, any divergence from the reference on retain answers.

TOFU's "KL minimisation" (arXiv:2401.06121) is `retain_divergence: forward_kl`, that is KL(reference ‖ policy), here on
answer positions only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fdiv.unlearning.config import UnlearningConfig
from fdiv.unlearning.losses import grad_ascent
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer

__all__ = ["KLRetainConfig", "KLRetainTrainer"]


@dataclass
class KLRetainConfig(UnlearningConfig):
    """Configuration of `KLRetainTrainer`: the shared keys; `retain_divergence` is the f, `forward_kl` by default."""

    retain_terms: ClassVar[tuple[str, ...]] = ("divergence",)
    retain_reason: ClassVar[str] = "With an NLL retain term it is the method grad_diff"

    retain_term: str = field(
        default="divergence", metadata={"help": "The divergence from the reference.", "choices": ("divergence",)}
    )


class KLRetainTrainer(UnlearningTrainer):
    """Trains γ·grad_ascent(forget) + α·D_f(policy ‖ reference) on retain answers."""

    config_class = KLRetainConfig
    title = "gradient ascent with a divergence from the reference on retain answers"
    paper = "arXiv:2401.06121"

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        """Mean token log-probability of the forget answer."""
        return grad_ascent(scores["forget"].log_probs, scores["forget"].mask)
