"""GA, gradient ascent on the forget answers: mean token log p(y_f), unbounded; no retain rows, no reference."""

from dataclasses import dataclass

from torch import Tensor

from fdiv.unlearning.config import UnlearningConfig, retain_option
from fdiv.unlearning.losses import grad_ascent
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer


@dataclass
class GradAscentConfig(UnlearningConfig):
    """Configuration of `GradAscentTrainer`: the shared keys, without a retain term."""

    retain_term: str = retain_option(
        "none", why="With a retain term it is the method grad_diff (nll) or kl_retain (divergence)"
    )


class GradAscentTrainer(UnlearningTrainer):
    """Trains `grad_ascent`."""

    config_class = GradAscentConfig
    title = "gradient ascent on the forget answers"
    paper = "arXiv:2210.01504"

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        return grad_ascent(scores["forget"].log_probs, scores["forget"].mask)
