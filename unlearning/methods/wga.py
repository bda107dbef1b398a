"""WGA, weighted gradient ascent (Wang et al. 2025): mean of sg(p_t^β)·log p_t over the forget answer's tokens."""

from dataclasses import dataclass

from torch import Tensor

from fdiv.training.config import option
from fdiv.unlearning.config import UnlearningConfig
from fdiv.unlearning.losses import wga
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer


@dataclass
class WGAConfig(UnlearningConfig):
    """Configuration of `WGATrainer`: the shared keys and the exponent β."""

    beta: float = option(
        1.0, "β, exponent of the token probability in its weight", least=0, why="Below it p^β is infinite at p = 0"
    )


class WGATrainer(UnlearningTrainer):
    """Trains `wga`; no reference is made, since none is used."""

    config_class = WGAConfig
    title = "gradient ascent weighted by token probability"
    paper = "arXiv:2502.19301"

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        return wga(scores["forget"].log_probs, scores["forget"].mask, self.args.beta)
