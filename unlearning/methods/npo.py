"""NPO, negative preference optimisation (Zhang et al. 2024): forget term −(2/β)·log σ(−β·log(P/Q)(y_f))."""

from dataclasses import dataclass

from torch import Tensor

from fdiv.training.config import option
from fdiv.unlearning.config import UnlearningConfig
from fdiv.unlearning.losses import npo
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer


@dataclass
class NPOConfig(UnlearningConfig):
    """Configuration of `NPOTrainer`: the shared keys and β (0.1 in the paper)."""

    beta: float = option(0.1, "Inverse temperature β", above=0)


class NPOTrainer(UnlearningTrainer):
    """Trains `npo`."""

    config_class = NPOConfig
    title = "negative preference optimisation"
    paper = "arXiv:2404.05868"
    forget_needs_reference = True

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        return npo(scores["forget"].log_ratio, self.args.beta)
