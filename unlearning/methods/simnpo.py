"""SimNPO, NPO without a reference, length-normalised (Fan et al. 2024): −(2/β)·log σ(β·(mean token NLL(y_f) − δ))."""

from dataclasses import dataclass

from torch import Tensor

from fdiv.training.config import option
from fdiv.unlearning.config import UnlearningConfig
from fdiv.unlearning.losses import simnpo
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer


@dataclass
class SimNPOConfig(UnlearningConfig):
    """Configuration of `SimNPOTrainer`: the shared keys, β and the margin δ; defaults as published for TOFU."""

    beta: float = option(4.5, "Inverse temperature β", above=0)
    delta: float = option(0.0, "Margin δ in nats per token (the paper's γ/β)")
    forget_weight: float = option(0.125, "γ, the weight of the forget term", least=0)


class SimNPOTrainer(UnlearningTrainer):
    """Trains `simnpo`."""

    config_class = SimNPOConfig
    title = "NPO without a reference, length-normalised"
    paper = "arXiv:2410.07163"

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        return simnpo(scores["forget"].log_probs, scores["forget"].mask, self.args.beta, self.args.delta)
