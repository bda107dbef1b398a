"""JensUn (Singh et al. 2025): mean token D_f(p_θ‖onehot(refusal token)) on forget, D_f(p_θ‖p_ref) on retain answers.

The paper takes Jensen–Shannon for both halves; here each may be any f that is valid for it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdiv.training.config import DivergenceOptions, divergence_option, option
from fdiv.unlearning.config import UnlearningConfig, retain_option
from fdiv.unlearning.data import UnlearningCollator
from fdiv.unlearning.losses import check_one_hot_divergence, jensun
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer


def target_log_probs(rows: RoleScores) -> Tensor:
    """log p of the target token at every answer position, 0 elsewhere → [B, T−1]."""
    scores = rows.logits[rows.mask].float()
    chosen = scores.gather(-1, rows.target_ids[rows.mask].unsqueeze(-1)).squeeze(-1)
    log_probs = torch.zeros(rows.mask.shape, device=scores.device)
    return log_probs.masked_scatter(rows.mask, chosen - scores.logsumexp(-1))


@dataclass
class JensUnConfig(DivergenceOptions, UnlearningConfig):
    """Configuration of `JensUnTrainer`: the shared keys and those below."""

    divergence: dict[str, Any] | str | None = divergence_option(
        "jensen_shannon", "f of the forget half, with f'(∞) < ∞, since the target is one-hot"
    )
    pattern: str = option(" No idea", "Refusal whose tokens are repeated over the forget answer as the target")
    retain_term: str = retain_option("divergence", "none", "nll")
    retain_divergence: dict[str, Any] | str | None = divergence_option(
        "jensen_shannon", "f of the retain half, policy against reference"
    )
    check_divergence = staticmethod(check_one_hot_divergence)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pattern:
            raise ValueError("pattern is empty: give the refusal to steer to, for example ' No idea'")


class JensUnTrainer(UnlearningTrainer):
    """Trains `jensun` on forget answers and, by default, `vocabulary_divergence` on retain answers."""

    config_class = JensUnConfig
    title = "token-level divergences to a refusal pattern and to the reference"
    paper = "arXiv:2509.02820"
    check_divergence = staticmethod(check_one_hot_divergence)
    forget_needs_logits = True

    def make_collator(self) -> UnlearningCollator:
        """The shared collator with the refusal pattern's tokens."""
        collator = super().make_collator()
        collator.pattern = self._tokenizer(self.args.pattern, add_special_tokens=False)["input_ids"]
        return collator

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        forget = scores["forget"]
        return jensun(target_log_probs(forget), forget.mask, self.divergence)
