"""NPO: negative preference optimisation (Zhang et al. 2024, arXiv:2404.05868)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fdiv.unlearning.config import UnlearningConfig, check_positive
from fdiv.unlearning.losses import npo
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer

__all__ = ["NPOConfig", "NPOTrainer"]


@dataclass
class NPOConfig(UnlearningConfig):
    """Configuration of `NPOTrainer`: the shared keys and β (0.1 in the paper)."""

    beta: float = field(default=0.1, metadata={"help": "Inverse temperature of NPO, above 0."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "beta")


class NPOTrainer(UnlearningTrainer):
    """Trains `npo`."""

    config_class = NPOConfig
    title = "negative preference optimisation"
    paper = "arXiv:2404.05868"
    forget_needs_reference = True

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        """−(2/β)·log σ(−β·log-ratio of the forget answer)."""
        return npo(scores["forget"].log_ratio, self.args.beta)
