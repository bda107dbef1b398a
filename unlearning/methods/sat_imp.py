"""SatImp (Yang et al. 2025): mean of sg(p_t^β₁·(1 − p_t)^β₂)·log p_t over the forget answer's tokens."""

from dataclasses import dataclass

from torch import Tensor

from fdiv.training.config import option
from fdiv.unlearning.config import UnlearningConfig
from fdiv.unlearning.losses import sat_imp
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer


@dataclass
class SatImpConfig(UnlearningConfig):
    """Configuration of `SatImpTrainer`: the shared keys, β₁ and β₂.

    The authors' README and code give α = 0.1, γ = 1 (as here); open-unlearning's YAML has them the other way round.
    """

    beta1: float = option(5.0, "β₁, exponent of p (saturation)", least=0)
    beta2: float = option(1.0, "β₂, exponent of 1 − p (importance)", least=0)
    retain_weight: float = option(0.1, "α, the weight of the retain term", least=0)


class SatImpTrainer(UnlearningTrainer):
    """Trains `sat_imp`; no reference is made, since none is used."""

    config_class = SatImpConfig
    title = "gradient ascent weighted by saturation and importance"
    paper = "arXiv:2505.11953"

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        return sat_imp(scores["forget"].log_probs, scores["forget"].mask, self.args.beta1, self.args.beta2)
