"""Self-distillation: the teacher is the student's own earlier weights, reading a prompt of its own.

With the same prompt both would be one model, and the loss 0 without a gradient. So rows need a `teacher_prompt`: the
question with a demonstration, a hint or a rule before it, which the student is to do without.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from torch import Tensor

from fdiv.distillation.teachers.base import teacher_inputs
from fdiv.distillation.teachers.local import HiddenStates, LocalTeacher, cut_head
from fdiv.errors import DataError, OptionError
from fdiv.models.fingerprints import weights_fingerprint
from fdiv.models.reference import Reference
from fdiv.models.vocabulary import check_head, last_hidden_states, model_head
from fdiv.training.config import option

__all__ = ["EMATeacher", "StartTeacher"]


@dataclass
class StartTeacher(LocalTeacher):
    """`teacher: start`: the student before its first step, frozen.

    Under a fresh LoRA adapter it is the base with the adapter off, without a second copy; under an adapter that goes
    on being trained a frozen copy of that; else a copy of the model.
    """

    title: ClassVar[str] = "the student's own weights before training"
    own_weights: ClassVar[bool] = True

    def check(self, args: Any) -> None:
        """No other model is named."""
        super().check(args)
        if args.teacher_model_name_or_path is not None:
            raise OptionError(
                f"teacher_model_name_or_path={args.teacher_model_name_or_path!r}: the teacher is {self.title}, and no "
                "other model: leave it out, or set `teacher: local`",
                key="teacher_model_name_or_path",
            )

    def copies(self, peft: bool) -> int | None:
        """A copy of the model; with an adapter that one or its copy."""
        return 0 if peft else 1

    def attach(self, trainer: Any, model: Any) -> None:
        """Keep the weights."""
        if model is not None:
            raise DataError(f"teacher_model is given, and the teacher is {self.title}: leave one of them out")
        check_head(trainer.model)
        self.fingerprint = weights_fingerprint(trainer.model)
        self.trainer = trainer
        self.reference = Reference(trainer, copy_adapter=self._copies_adapter(trainer))

    def _copies_adapter(self, trainer: Any) -> bool:
        return trainer.starting_adapter

    def settings(self) -> Any:
        """What it is."""
        return self.title

    def read(self, inputs: dict[str, Tensor], mask: Tensor) -> HiddenStates:
        """The hidden states of the earlier weights."""
        trainer, arguments = self.trainer, teacher_inputs(inputs)
        with self.reference.active() as model:
            inner = trainer.accelerator.unwrap_model(model)
            if inner is model:
                hidden = last_hidden_states(inner, *arguments)
            else:
                hidden = trainer._forward_redirection(model, inner, last_hidden_states, inner, *arguments)
            head = model_head(inner)  # here, where the right adapter is on
        if inner is trainer.model:
            return HiddenStates(hidden[mask], lambda: head)
        return HiddenStates(hidden[mask], lambda: cut_head(inner, None))


@dataclass
class EMATeacher(StartTeacher):
    """`teacher: {name: ema, decay: d}`: θ' ← d·θ' + (1 − d)·θ after every optimizer step, from θ' = θ on.

    Under LoRA the adapter's matrices are averaged, each for itself. A checkpoint holds θ', so a resumed run is the
    whole run.

    Args:
        decay: d; 0.999 remembers about 1,000 steps, 0 is the student of the step before.
    """

    title: ClassVar[str] = "the running average of the student's own weights"

    decay: float = option(0.999, "What is kept of the average at each optimizer step", least=0, below=1)

    def attach(self, trainer: Any, model: Any) -> None:
        """Begin the average."""
        half = next(
            (name for name, p in trainer.model.named_parameters() if p.requires_grad and p.element_size() < 4), None
        )
        if half is not None:
            raise DataError(
                f"teacher: ema adds small parts of the weights, and {half} is in half precision, which rounds them "
                "away: load the model in float32 (dtype: float32; bf16: true still computes in bfloat16)"
            )
        super().attach(trainer, model)
        if self.reference.is_sharded:
            raise DataError("teacher: ema cannot average sharded weights (ZeRO-3, FSDP): use DDP or ZeRO-2")

    def _copies_adapter(self, trainer: Any) -> bool:
        return is_peft_model(trainer.model)

    def identity(self) -> Any:
        """The weights it began with, and d."""
        return [self.fingerprint, f"ema {self.decay}"]

    def settings(self) -> Any:
        """What it is, and d."""
        return f"{self.title} (decay {self.decay:g})"

    def after_step(self) -> None:
        """Move the average."""
        with torch.no_grad():
            self.reference.refresh(1.0 - self.decay)

    def save(self, folder: Path) -> None:
        """The average; an adapter's is in the checkpoint already."""
        self.reference.save(folder / "teacher")

    def load(self, folder: Path) -> None:
        """Read it back."""
        self.reference.load(folder / "teacher")
