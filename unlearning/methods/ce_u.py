"""CE-U (Yang 2025): mean token CE(sg softmax(z, answer token at −∞), p_θ), the first answer tokens left out."""

from dataclasses import dataclass

from torch import Tensor

from fdiv.training.config import option
from fdiv.unlearning.config import UnlearningConfig, retain_option
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer
from fdiv.unlearning.vocabulary_losses import ce_u


@dataclass
class CEUConfig(UnlearningConfig):
    """Configuration of `CEUTrainer`: the shared keys and how many leading answer tokens are left out."""

    skip_first: int = option(1, "Leading answer tokens that are left out", least=0)
    retain_term: str = retain_option("none", "nll", "divergence")


class CEUTrainer(UnlearningTrainer):
    """Trains `ce_u`."""

    config_class = CEUConfig
    title = "cross-entropy to the own distribution without the answer token"
    paper = "arXiv:2503.01224"
    forget_needs_logits = True

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        forget = scores["forget"]
        return ce_u(forget.logits, forget.token_ids, forget.mask, self.args.skip_first)
