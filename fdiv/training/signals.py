"""SIGTERM ends a training with a checkpoint and an exit code of its own."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
from transformers import TrainerCallback

from fdiv.interrupts import Sigterm

__all__ = ["StopOnSigterm"]


class StopOnSigterm(TrainerCallback):
    """While it is entered as a context manager, SIGTERM during `train()` saves and stops at the end of the optimizer
    step. Before, it raises `Sigterm` at once, which `fdiv.interrupts.stoppable` turns into one line; after the last
    step it waits in `requested`, so that the model can be saved first.

    Several processes agree before they stop, since the signal reaches them at different steps: one value is summed
    over them in each optimizer step.
    """

    def __init__(self) -> None:
        self.requested = False
        self.stopped_at: int | None = None
        self._training = False
        self._before: Any = None

    def __enter__(self) -> StopOnSigterm:
        # Python delivers signals to the main thread only, and refuses handlers from another
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _handle(self, *_: Any) -> None:
        self.requested = True
        if not self._training:
            raise Sigterm

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """From here on a checkpoint can be written."""
        self._training = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop, on all processes in the same step, once one of them was asked to."""
        if self._anyone(args):
            self.stopped_at = state.global_step
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Trainer comes here when it stops, too: in the middle of an epoch nothing of its end is due; at its end, the
        checkpoint is written again after log and evaluation."""
        if self.stopped_at is None:
            return
        ends = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        control.should_save = ends and (control.should_log or control.should_evaluate or control.should_save)
        control.should_log, control.should_evaluate = control.should_log and ends, control.should_evaluate and ends

    def _anyone(self, args: Any) -> bool:
        if args.world_size == 1:
            return self.requested
        flag = torch.tensor([float(self.requested)], device=args.device)
        torch.distributed.all_reduce(flag)
        return bool(flag.item() > 0)
