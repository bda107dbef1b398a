"""PDU: flatten the logits on forget answers under a constraint on the retain loss (arXiv:2506.05314).

min F + λ·(R − ε), and after every step (past the warm-up) λ ← max(0, λ + η·(R − ε)), R the retain loss of the whole
step, over all processes and accumulation steps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import TrainerCallback

from fdiv.unlearning.config import UnlearningConfig
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer
from fdiv.unlearning.vocabulary_losses import pdu

__all__ = ["PDUConfig", "PDUTrainer"]

_STATE_FILE = "pdu_state.json"


@dataclass
class PDUConfig(UnlearningConfig):
    """Configuration of `PDUTrainer`; published for TOFU: ε = 0.3, start λ = 100, η = 5, warm-up 5 epochs.

    Args:
        retain_epsilon: ε, the retain loss that is allowed; it has no default, since it is the model's own.
        retain_weight: λ at the start.
        dual_step: η. dual_warmup_epochs: epochs during which λ stays.
    """

    retain_terms: ClassVar[tuple[str, ...]] = ("nll", "divergence")
    retain_reason: ClassVar[str] = "PDU is a constraint on the retain loss"

    retain_epsilon: float | None = field(default=None, metadata={"help": "Allowed retain loss; required."})
    retain_weight: float = field(default=50.0, metadata={"help": "Lagrange multiplier at the start (lambda)."})
    dual_step: float = field(default=1.0, metadata={"help": "Step size of the multiplier (eta)."})
    dual_warmup_epochs: float = field(default=5.0, metadata={"help": "Epochs during which the multiplier stays."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retain_epsilon is None:
            raise ValueError("retain_epsilon is not set: give the retain loss that is allowed (0.3 for TOFU)")
        if self.dual_step < 0 or self.dual_warmup_epochs < 0:
            raise ValueError(f"dual_step={self.dual_step}, dual_warmup_epochs={self.dual_warmup_epochs}: at least 0")


class _DualStep(TrainerCallback):
    """Moves the multiplier after each optimizer step."""

    def __init__(self, trainer: PDUTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.trainer.dual_update(state.epoch)


class PDUTrainer(UnlearningTrainer):
    """Trains `pdu` + λ·(R − ε); λ is logged as `retain_multiplier` and resumes from the checkpoint."""

    config_class = PDUConfig
    title = "flattened logits under a constraint on the retain loss"
    paper = "arXiv:2506.05314"
    forget_needs_logits = True

    def __init__(self, model, args: PDUConfig | None = None, **kwargs) -> None:
        super().__init__(model, args, **kwargs)
        self.multiplier = self.args.retain_weight
        self._step_retain: list[Tensor] = []
        self.add_callback(_DualStep(self))

    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        """Squared gap between the largest and the mean logit."""
        return pdu(scores["forget"].logits, scores["forget"].mask)

    def retain_weight(self) -> float:
        """λ."""
        return self.multiplier

    def retain_loss(self, retain: RoleScores) -> Tensor:
        """R − ε."""
        excess = super().retain_loss(retain) - self.args.retain_epsilon
        if self.model.training:
            self._step_retain.append(excess.detach())
        return excess

    def method_columns(self, scores: dict[str, RoleScores]) -> dict[str, Tensor]:
        """λ, for the log."""
        return {"retain_multiplier": torch.tensor([self.multiplier], device=scores["forget"].mask.device)}

    def dual_update(self, epoch: float) -> None:
        """λ ← max(0, λ + η·mean(R − ε)) over the step that just ended, once `epoch` is past the warm-up."""
        excess = self.accelerator.gather(torch.cat(self._step_retain)).mean().item()
        self._step_retain.clear()
        if epoch > self.args.dual_warmup_epochs:
            self.multiplier = max(0.0, self.multiplier + self.args.dual_step * excess)

    def save_method_state(self, folder: Path) -> None:
        """λ."""
        super().save_method_state(folder)
        if self.args.should_save:
            (folder / _STATE_FILE).write_text(json.dumps({"multiplier": self.multiplier}))

    def load_method_state(self, folder: Path) -> None:
        """Read it back."""
        super().load_method_state(folder)
        self.multiplier = json.loads((folder / _STATE_FILE).read_text())["multiplier"]
