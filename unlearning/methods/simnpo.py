"""SimNPO: NPO without a reference, length-normalised (Fan et al. 2024, arXiv:2410.07163)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fdiv.unlearning.config import UnlearningConfig, check_positive
from fdiv.unlearning.losses import simnpo
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer

__all__ = ["SimNPOConfig", "SimNPOTrainer"]


@dataclass
class SimNPOConfig(UnlearningConfig):
    """Configuration of `SimNPOTrainer`: the shared keys, β and the margin δ; defaults as published for TOFU."""

    beta: float = field(default=4.5, metadata={"help": "Inverse temperature of SimNPO, above 0."})
    delta: float = field(default=0.0, metadata={"help": "Margin in nats per token (the paper's gamma / beta)."})
    forget_weight: float = field(default=0.125, metadata={"help": "Weight of the forget term (gamma)."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "beta")


class SimNPOTrainer(UnlearningTrainer):
    """Trains `simnpo`."""

    config_class = SimNPOConfig
    title = "NPO without a reference, length-normalised"
    paper = "arXiv:2410.07163"

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        """−(2/β)·log σ(β·(mean token NLL − δ))."""
        return simnpo(scores["forget"].log_probs, scores["forget"].mask, self.args.beta, self.args.delta)
