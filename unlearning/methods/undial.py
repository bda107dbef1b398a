"""UNDIAL, self-distillation (Dong et al. 2024): mean token CE(softmax(z_ref − β·onehot(y_t)), p_θ)."""

from dataclasses import dataclass

from torch import Tensor

from fdiv.training.config import option
from fdiv.unlearning.config import UnlearningConfig, retain_option
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer
from fdiv.unlearning.vocabulary_losses import undial


@dataclass
class UNDIALConfig(UnlearningConfig):
    """Configuration of `UNDIALTrainer`: the shared keys and β; published: β = 10, rate 1e-4, no retain term."""

    beta: float = option(
        10.0, "β, nats taken off the answer token's logit", least=0, why="Below it the answer would be reinforced"
    )
    retain_term: str = retain_option("none", "nll", "divergence")


class UNDIALTrainer(UnlearningTrainer):
    """Trains `undial`."""

    config_class = UNDIALConfig
    title = "self-distillation with the answer's logit lowered"
    paper = "arXiv:2402.10052"
    forget_needs_logits = True
    forget_needs_reference = True

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        forget = scores["forget"]
        return undial(forget.logits, forget.reference.logits, forget.token_ids, forget.mask, self.args.beta)
