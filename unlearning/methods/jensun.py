"""JensUn: the token-level divergence pair, a refusal pattern on forget answers and the reference on retain answers.

Singh et al. 2025 (arXiv:2509.02820) take Jensen–Shannon for both halves; here each may be any f that is
lawful for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fdiv.unlearning.config import UnlearningConfig, named_divergence
from fdiv.unlearning.data import UnlearningCollator
from fdiv.unlearning.losses import check_one_hot_divergence, jensun
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer

__all__ = ["JensUnConfig", "JensUnTrainer"]


@dataclass
class JensUnConfig(UnlearningConfig):
    """Configuration of `JensUnTrainer`.

    Args:
        divergence: f of the forget half; needs f'(∞) < ∞, since the target is one-hot.
        pattern: text whose tokens are repeated over the forget answer's positions as the target.
        retain_divergence: f of the retain half, any.
    """

    _VALID_DICT_FIELDS = [*UnlearningConfig._VALID_DICT_FIELDS, "divergence"]

    divergence: dict[str, Any] | str | None = field(
        default="jensen_shannon", metadata={"help": "f of the forget half, with a finite slope at infinity."}
    )
    pattern: str = field(default=" No idea", metadata={"help": "Refusal whose tokens are repeated as the target."})
    retain_term: str = field(
        default="divergence", metadata={"help": "Retain half of the loss.", "choices": ("none", "nll", "divergence")}
    )
    retain_divergence: dict[str, Any] | str | None = field(
        default="jensen_shannon", metadata={"help": "f of the retain half, policy against reference."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_hot_divergence(named_divergence(self.divergence, "divergence"))
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

    def _target_log_probs(self, forget: RoleScores) -> Tensor:
        """log p of the target token at every answer position, 0 elsewhere → [B, T−1]."""
        scores = forget.logits[forget.mask].float()
        chosen = scores.gather(-1, forget.target_ids[forget.mask].unsqueeze(-1)).squeeze(-1)
        log_probs = torch.zeros(forget.mask.shape, device=scores.device)
        return log_probs.masked_scatter(forget.mask, chosen - scores.logsumexp(-1))

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        """D_f(policy ‖ one-hot pattern), mean over the forget answer's positions."""
        forget = scores["forget"]
        return jensun(self._target_log_probs(forget), forget.mask, self.args.divergence)
