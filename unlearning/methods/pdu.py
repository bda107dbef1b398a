"""PDU: mean token (max_v z_v − mean_v z_v)² on forget answers under a constraint on the retain loss R.

min F + λ·(R − ε), and after every step (past the warm-up) λ ← max(0, λ + η·(R − ε)), R the retain loss of the whole
step, over all processes and accumulation steps.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainerCallback

from fdiv.training.config import option
from fdiv.unlearning.config import UnlearningConfig, retain_option
from fdiv.unlearning.roles import RoleScores
from fdiv.unlearning.trainer import UnlearningTrainer
from fdiv.unlearning.vocabulary_losses import pdu

_STATE_FILE = "pdu_state.json"


@dataclass
class PDUConfig(UnlearningConfig):
    """Configuration of `PDUTrainer`; published for TOFU: ε = 0.3, start λ = 100, η = 5, warm-up 5 epochs."""

    retain_term: str = retain_option("nll", "divergence", why="PDU is a constraint on the retain loss")
    retain_epsilon: float | None = option(None, "ε, the retain loss that is allowed; required, it is the model's own")
    retain_weight: float = option(50.0, "λ at the start, the weight of the constraint", least=0)
    dual_step: float = option(1.0, "η, step size of λ", least=0)
    dual_warmup_epochs: float = option(5.0, "Epochs during which λ stays", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retain_epsilon is None:
            raise ValueError("retain_epsilon is not set: give the retain loss that is allowed (0.3 for TOFU)")


class _DualStep(TrainerCallback):
    """Moves the multiplier after each optimizer step."""

    def __init__(self, trainer: "PDUTrainer") -> None:
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
        """λ ← max(0, λ + η·mean(R − ε)) over the step that just ended, once `epoch` is past the warm-up.

        A step of empty places alone (`fdiv.training.places`) leaves λ as it was.
        """
        if not self._step_retain:
            return
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
