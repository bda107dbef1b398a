"""SHRED (Hu et al. 2026): KL(q ‖ p_θ) on forget answers, q the frozen model without the answer's least likely tokens.

The formula is that of the method's figure on the authors' project page; neither the text of its method section nor its
code could be read, so the published P, π and k are not known here.
"""

from dataclasses import dataclass

from torch import Tensor

from fdiv.training.config import option
from fdiv.unlearning.config import UnlearningConfig, retain_option
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer
from fdiv.unlearning.vocabulary_losses import shred


@dataclass
class SHREDConfig(UnlearningConfig):
    """Configuration of `SHREDTrainer`: the shared keys and those below."""

    forget_share: float = option(
        0.5, "P, the share of an answer's tokens, the least likely ones, that are demoted", above=0, most=1
    )
    nucleus: float = option(
        0.0,
        "π, the mass of the most likely tokens that are demoted beside the answer's own; 0: none",
        least=0,
        below=1,
    )
    top_k: int | None = option(
        None, "k, how many of the frozen model's tokens the target keeps; not set: the whole vocabulary", least=2
    )
    retain_term: str = retain_option("none", "nll", "divergence")


class SHREDTrainer(UnlearningTrainer):
    """Trains `shred`."""

    config_class = SHREDConfig
    title = "self-distillation with the least likely answer tokens demoted, no retain rows"
    paper = "arXiv:2605.07482"
    forget_needs_logits = True
    forget_needs_reference = True

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        forget, args = scores["forget"], self.args
        return shred(
            forget.logits, forget.reference.logits, forget.token_ids, forget.mask, args.forget_share,
            nucleus=args.nucleus, top_k=args.top_k,
        )  # fmt: skip
