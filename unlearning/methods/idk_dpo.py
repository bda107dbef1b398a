"""IdkDPO, "I don't know" preferred to the answer: (2/β)·f-DPO loss(template, forget), for every f with f'(0+) = −∞.

With `reverse_kl` it is TOFU's DPO baseline.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fdiv.alignment.f_dpo.loss import check_f_dpo_divergence
from fdiv.training.config import CappedDivergenceOptions, divergence_option, option
from fdiv.unlearning.config import TemplateConfig
from fdiv.unlearning.losses import idk_dpo
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer


@dataclass
class IdkDPOConfig(CappedDivergenceOptions, TemplateConfig):
    """Configuration of `IdkDPOTrainer`: the shared keys, f-DPO's `divergence`, `normalized`, `max_exponent`, and β."""

    divergence: dict[str, Any] | str | None = divergence_option("reverse_kl", "The f of f-DPO, with f'(0+) = −∞")
    beta: float = option(0.1, "β, the weight of the divergence", above=0)
    check_divergence = staticmethod(check_f_dpo_divergence)


class IdkDPOTrainer(UnlearningTrainer):
    """Trains `idk_dpo`."""

    config_class = IdkDPOConfig
    title = "f-DPO of a refusal over the forget answer"
    paper = "arXiv:2401.06121"
    check_divergence = staticmethod(check_f_dpo_divergence)
    forget_needs_reference = True

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        ratios = scores["template"].log_ratio, scores["forget"].log_ratio
        return idk_dpo(*ratios, self.divergence, self.args.beta, max_exponent=self.args.max_exponent)

    def method_columns(self, scores: dict[str, RoleScores]) -> dict[str, Tensor]:
        """Also `clamped_fraction`: pairs with a score beyond `max_exponent`."""
        cap = self.args.max_exponent
        touched = [self.divergence.capped(scores[role].log_ratio, cap) for role in ("template", "forget")]
        return super().method_columns(scores) | {"clamped_fraction": (touched[0] | touched[1]).float()}
