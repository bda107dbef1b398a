"""SatImp: gradient ascent weighted by saturation and importance (Yang et al. 2025, arXiv:2505.11953)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fdiv.unlearning.config import UnlearningConfig
from fdiv.unlearning.losses import sat_imp
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer

__all__ = ["SatImpConfig", "SatImpTrainer"]


@dataclass
class SatImpConfig(UnlearningConfig):
    """Configuration of `SatImpTrainer`: the shared keys, β₁ and β₂.

    The authors' README and code give α = 0.1, γ = 1 (as here); open-unlearning's YAML has them the other way round.
    """

    beta1: float = field(default=5.0, metadata={"help": "Exponent of p (saturation)."})
    beta2: float = field(default=1.0, metadata={"help": "Exponent of 1 - p (importance)."})
    retain_weight: float = field(default=0.1, metadata={"help": "Weight of the retain term (alpha)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta1 < 0 or self.beta2 < 0:
            raise ValueError(f"beta1={self.beta1}, beta2={self.beta2}: both must be at least 0")


class SatImpTrainer(UnlearningTrainer):
    """Trains `sat_imp`; no reference is made, since none is used."""

    config_class = SatImpConfig
    title = "gradient ascent weighted by saturation and importance"
    paper = "arXiv:2505.11953"

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        """Mean of p^β₁·(1−p)^β₂·log p over the forget answer's tokens, weights detached."""
        return sat_imp(scores["forget"].log_probs, scores["forget"].mask, self.args.beta1, self.args.beta2)
