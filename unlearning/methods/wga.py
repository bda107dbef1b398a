"""WGA: gradient ascent weighted by the token's own probability (Wang et al. 2025, arXiv:2502.19301)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fdiv.unlearning.config import UnlearningConfig
from fdiv.unlearning.losses import wga
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer

__all__ = ["WGAConfig", "WGATrainer"]


@dataclass
class WGAConfig(UnlearningConfig):
    """Configuration of `WGATrainer`: the shared keys and the exponent β of the weight p^β."""

    beta: float = field(default=1.0, metadata={"help": "Exponent of the token probability in its weight."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 0:
            raise ValueError(f"beta={self.beta}: must be at least 0, or the weight is infinite at probability 0")


class WGATrainer(UnlearningTrainer):
    """Trains `wga`; no reference is made, since none is used."""

    config_class = WGAConfig
    title = "gradient ascent weighted by token probability"
    paper = "arXiv:2502.19301"

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        """Mean of p^β·log p over the forget answer's tokens, weights detached."""
        return wga(scores["forget"].log_probs, scores["forget"].mask, self.args.beta)
