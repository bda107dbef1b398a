"""GradDiff, ascent on forget, descent on retain answers (Liu et al. 2022): γ·mean log p(y_f) − α·mean log p(y_r)."""

from dataclasses import dataclass

from torch import Tensor

from fdiv.unlearning.config import UnlearningConfig, retain_option
from fdiv.unlearning.losses import grad_diff
from fdiv.unlearning.methods.grad_ascent import GradAscentTrainer
from fdiv.unlearning.roles import RoleScores


@dataclass
class GradDiffConfig(UnlearningConfig):
    """Configuration of `GradDiffTrainer`: the shared keys; γ and α are `forget_weight` and `retain_weight`."""

    retain_term: str = retain_option("nll", "divergence", why="Without a retain term it is the method grad_ascent")


class GradDiffTrainer(GradAscentTrainer):
    """Trains `grad_diff`; with `retain_term: divergence` the weighted sum of gradient ascent and that term."""

    config_class = GradDiffConfig
    title = "gradient ascent on forget, descent on retain answers"
    paper = "arXiv:2203.12817"

    def example_loss(
        self, scores: dict[str, RoleScores], forget_term: Tensor, retain_term: Tensor | None = None
    ) -> Tensor:
        if self.args.retain_term != "nll":
            return super().example_loss(scores, forget_term, retain_term)
        rows = [tensor for role in ("forget", "retain") for tensor in (scores[role].log_probs, scores[role].mask)]
        return grad_diff(*rows, forget_weight=self.args.forget_weight, retain_weight=self.args.retain_weight)
