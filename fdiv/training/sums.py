"""What a run adds up over its steps, kept in its checkpoints: the numbers of a resumed run are those of the whole run.

`train_loss`, `num_tokens`, the speeds and the times count every step of the run, those before a resumption too (of a
part that was killed, what came after its last checkpoint does not count: those steps are made again). Averages that
were not logged yet when a checkpoint was written go on after it: a log does not show where its run was cut.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback

from fdiv.terminal import info
from fdiv.training.finite import check_weights

__all__ = ["RunSumsMixin"]

_FILE = "run_sums.safetensors"


class RunSumsMixin:
    """Put it before a `transformers.Trainer` in the bases. `ResumableMixin` writes and reads the sums.

    Attributes:
        clocks: name → function that gives the seconds of this part of the run; checkpoints hold what they say.
    """

    clocks: dict[str, Callable[[], float]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.clocks = {}
        self._earlier_seconds: dict[str, float] = {}
        self._stored_sums: dict[str, Any] | None = None
        self._uncounted_steps = 0
        super().__init__(*args, **kwargs)
        self.add_callback(_SaveAfterTheEpoch())
        self.add_callback(_GoOnCounting(self))

    def run_seconds(self, clock: str) -> float:
        """What a clock of `clocks` says, with the earlier parts of a resumed run."""
        return self._earlier_seconds.get(clock, 0.0) + self.clocks[clock]()

    # ---------------------------------------------------------------- in checkpoints
    def _save_sums(self, folder: Path) -> None:
        """Write the sums up to this step. Called on every process; the main one writes."""
        # Each process adds up its own losses, and the log shows their mean.
        tensors = {"loss": self.accelerator.reduce(self._tr_loss.detach().clone(), reduction="mean")}
        if not self.args.should_save:
            return
        if recorded := self._examples["train"]:
            tensors["examples"] = torch.cat(recorded).contiguous()
        sums = {
            "logged_loss": self._total_loss_scalar,
            "logged_step": self._globalstep_last_logged,
            "tokens": self._total_train_tokens,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "columns": self._example_columns,
            "seconds": {name: self.run_seconds(name) for name in self.clocks},
        }
        save_file(tensors, folder / _FILE, metadata={"sums": json.dumps(sums, default=float)})

    def _load_sums(self, folder: Path) -> None:
        """Read them back. What Trainer sets to 0 when training begins is restored by a callback after that."""
        path = folder / _FILE
        if not path.is_file():
            self._uncounted_steps = step = self.state.global_step
            info(f"resume: {folder.name} holds no {_FILE}: train_loss, num_tokens and times count from step {step}")
            return
        with safe_open(path, framework="pt") as file:
            self._stored_sums = sums = json.loads(file.metadata()["sums"])
            sums["loss"] = file.get_tensor("loss")
            recorded = [file.get_tensor("examples")] if "examples" in file.keys() else []
        self._examples["train"] = [table.to(self.accelerator.device) for table in recorded]
        self._example_columns = tuple(sums["columns"])
        self._total_train_tokens = sums["tokens"]
        self._metrics["train"].clear()
        for name, values in sums["metrics"].items():
            self._metrics["train"][name] = values
        self._earlier_seconds = sums["seconds"]

    def _restore_sums(self) -> None:
        """When training begins, or goes on."""
        sums, self._stored_sums = self._stored_sums, None
        if sums is None:
            self._earlier_seconds = {}
            return
        self._tr_loss = sums["loss"].to(self._tr_loss)
        self._total_loss_scalar, self._globalstep_last_logged = sums["logged_loss"], sums["logged_step"]
        self._initial_global_step = self._initial_num_input_tokens_seen = 0

    # ---------------------------------------------------------------- inside Trainer's loop
    def _run_epoch(self, *args: Any, start_time: float, **kwargs: Any) -> None:
        """As in Trainer, which makes one step more when it goes on from the checkpoint of the last one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, start_time=self._start_of_run(start_time), **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: float, start_time: float) -> Any:
        """As in Trainer; the last log has the averages of training, whether a step or an evaluation came before.

        Raises:
            NonFiniteLossError: the last step made a weight NaN or infinite.
        """
        check_weights(self)
        if self._uncounted_steps and not hasattr(self, "_initial_global_step"):
            # Trainer of transformers below 5.18 divides by all steps, those too whose losses it has not.
            share = self.state.global_step / max(self.state.global_step - self._uncounted_steps, 1)
            self._total_loss_scalar, self._tr_loss = self._total_loss_scalar * share, self._tr_loss * share
        training = self.model.training
        self.model.train()
        try:
            return super()._finalize_training(trial, num_train_samples, self._start_of_run(start_time))
        finally:
            self.model.train(training)

    def _start_of_run(self, start_time: float) -> float:
        """When the run would have begun had it not been cut: `train_runtime` is counted from there."""
        self.clocks["train_runtime"] = lambda: time.time() - start_time
        return start_time - self._earlier_seconds.get("train_runtime", 0.0)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """As in Trainer; `eval_on_start`, which skips the scheduler, means the start of the run."""
        if skip_scheduler and self.state.global_step > 0:
            return {}
        check_weights(self)
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)


class _GoOnCounting(TrainerCallback):
    """Restores the sums once Trainer has set its own to 0."""

    def __init__(self, trainer: RunSumsMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._restore_sums()


class _SaveAfterTheEpoch(TrainerCallback):
    """A checkpoint of the last step of an epoch is written after what happens at the end of the epoch.

    The log and the evaluation of the epoch, and the random numbers it took, would else be lost where it is resumed.
    """

    def __init__(self) -> None:
        self.due = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        ends = control.should_training_stop or control.should_epoch_stop or float(state.epoch).is_integer()
        self.due = control.should_save and ends
        control.should_save = control.should_save and not ends

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = control.should_save or self.due
        self.due = False
