"""IdkDPO: prefer "I don't know" to the answer, through f-DPO and so for every divergence lawful there.

With `reverse_kl` it is TOFU's DPO baseline (arXiv:2401.06121).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fdiv.alignment.f_dpo.loss import check_f_dpo_divergence
from fdiv.unlearning.config import TemplateConfig, check_positive, named_divergence
from fdiv.unlearning.losses import idk_dpo
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer

__all__ = ["IdkDPOConfig", "IdkDPOTrainer"]


@dataclass
class IdkDPOConfig(TemplateConfig):
    """Configuration of `IdkDPOTrainer`: the shared keys, f-DPO's `divergence`, `beta` and `max_exponent`."""

    _VALID_DICT_FIELDS = [*TemplateConfig._VALID_DICT_FIELDS, "divergence"]

    divergence: dict[str, Any] | str | None = field(
        default="reverse_kl", metadata={"help": "f of f-DPO, with f'(0+) = -inf."}
    )
    beta: float = field(default=0.1, metadata={"help": "Weight of the divergence, above 0."})
    max_exponent: float | None = field(
        default=None, metadata={"help": "Overflow cap on exp-type scores, in (0, 80]. Not set: the registry's own."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "beta")
        check_f_dpo_divergence(named_divergence(self.divergence, "divergence"))


class IdkDPOTrainer(UnlearningTrainer):
    """Trains `idk_dpo`."""

    config_class = IdkDPOConfig
    title = "f-DPO of a refusal over the forget answer"
    paper = "arXiv:2401.06121"
    check_divergence = staticmethod(check_f_dpo_divergence)
    forget_needs_reference = True

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        """(2/β)·f-DPO loss, template over forget answer."""
        ratios = scores["template"].log_ratio, scores["forget"].log_ratio
        return idk_dpo(*ratios, self.args.divergence, self.args.beta, max_exponent=self.args.max_exponent)
