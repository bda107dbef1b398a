"""CE-U: cross-entropy to the policy's own distribution without the answer token (Yang 2025, arXiv:2503.01224)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fdiv.unlearning.config import UnlearningConfig
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer
from fdiv.unlearning.vocabulary_losses import ce_u

__all__ = ["CEUConfig", "CEUTrainer"]


@dataclass
class CEUConfig(UnlearningConfig):
    """Configuration of `CEUTrainer`: the shared keys and how many leading answer tokens are left out."""

    skip_first: int = field(default=1, metadata={"help": "Leading answer tokens that are left out."})
    retain_term: str = field(
        default="none", metadata={"help": "Retain half of the loss.", "choices": ("none", "nll", "divergence")}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skip_first < 0:
            raise ValueError(f"skip_first={self.skip_first}: must be at least 0")


class CEUTrainer(UnlearningTrainer):
    """Trains `ce_u`."""

    config_class = CEUConfig
    title = "cross-entropy to the own distribution without the answer token"
    paper = "arXiv:2503.01224"
    forget_needs_logits = True

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        """Cross-entropy to the detached own distribution with the answer token left out."""
        forget = scores["forget"]
        return ce_u(forget.logits, forget.token_ids, forget.mask, self.args.skip_first)
