"""UNDIAL: self-distillation with the answer token's logit lowered (Dong et al. 2024, arXiv:2402.10052)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fdiv.unlearning.config import UnlearningConfig
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer
from fdiv.unlearning.vocabulary_losses import undial

__all__ = ["UNDIALConfig", "UNDIALTrainer"]


@dataclass
class UNDIALConfig(UnlearningConfig):
    """Configuration of `UNDIALTrainer`: the shared keys and β; published: β = 10, rate 1e-4, no retain term."""

    beta: float = field(default=10.0, metadata={"help": "Nats taken off the answer token's logit."})
    retain_term: str = field(
        default="none", metadata={"help": "Retain half of the loss.", "choices": ("none", "nll", "divergence")}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 0:
            raise ValueError(f"beta={self.beta}: must be at least 0, or the answer would be reinforced")


class UNDIALTrainer(UnlearningTrainer):
    """Trains `undial`."""

    config_class = UNDIALConfig
    title = "self-distillation with the answer's logit lowered"
    paper = "arXiv:2402.10052"
    forget_needs_logits = True
    forget_needs_reference = True

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        """Cross-entropy to the reference's distribution with the answer token lowered by β."""
        forget = scores["forget"]
        return undial(forget.logits, forget.reference.logits, forget.token_ids, forget.mask, self.args.beta)
