"""Evaluation around training: the same measurements before the first step and after the last."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ProgressCallback, TrainerCallback

from fdiv.errors import FdivError
from fdiv.eval.context import EvalContext
from fdiv.recipe import Block
from fdiv.run_directory import RunDirectory, read_json, write_json
from fdiv.terminal import number

__all__ = ["Evaluations", "MetricsFile", "ProgressBar", "preserved_random_state", "unmet_requirements"]


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Whatever is drawn inside, the random streams outside go on as if nothing had been: an evaluation must not change
    the training it looks at."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class Evaluations(TrainerCallback):
    """The `eval:` blocks of a run. As a callback it measures the start when training has prepared the model for its
    devices (DDP, DeepSpeed and FSDP do that inside `train()`); `measure("after")` is called when training is over.

    Args:
        evaluations: `(block, instance)` pairs.
        datasets: Split → untokenised rows.
        output_dir: The run's directory.
    """

    def __init__(self, evaluations: list[tuple[Block, Any]], datasets: Mapping[str, Any], output_dir: Path):
        self.evaluations, self.datasets, self.output_dir = evaluations, datasets, output_dir
        self.trainer: Any = None
        self.results: dict[str, dict[str, float | None]] = {}
        self.notes: dict[str, str] = {}
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the start; a resumed run takes what its first part measured."""
        if not self.evaluations:
            return
        earlier = self.output_dir / "eval_before.json"
        if state.global_step == 0:
            self.measure("before")
        elif earlier.is_file():
            self.results["before"] = read_json(earlier)["metrics"]
        else:
            self.results["before"] = {}
            self.notes["before"] = f"not measured: the run was resumed at step {state.global_step}"

    def measure(self, stage: str) -> dict[str, float | None]:
        """Run every evaluation on the model as it is, on every process; the main process writes `eval_STAGE.json`."""
        started = time.perf_counter()
        trainer = self.trainer
        model, was_training = trainer.model, trainer.model.training
        metrics: dict[str, float | None] = {}
        notes: dict[str, str] = {}
        model.eval()
        with preserved_random_state(), torch.no_grad():
            for block, evaluation in self.evaluations:
                found = dict(evaluation.evaluate(model, trainer.processing_class, self.datasets, self._context(stage)))
                notes.update(found.pop("notes", {}))
                for name, value in found.items():
                    if name in metrics:
                        name = f"{block.name}_{name}"
                    metrics[name] = None if value is None else float(value)
        model.train(was_training)
        self.results[stage] = metrics
        self.notes.update(notes)
        self.seconds += time.perf_counter() - started
        if trainer.is_world_process_zero():
            write_json(self.output_dir / f"eval_{stage}.json", {"metrics": metrics, "notes": notes})
        return metrics

    def _context(self, stage: str) -> EvalContext:
        folder = self.output_dir / "eval" / stage
        folder.mkdir(parents=True, exist_ok=True)
        return EvalContext(
            training_args=self.trainer.args,
            output_dir=folder,
            reference_model=getattr(self.trainer, "ref_model", None),  # GRPO-like trainers without a KL have none
            seed=self.trainer.args.seed,
            stage=stage,
            extra={"trainer": self.trainer},
        )


class ProgressBar(ProgressCallback):
    """The training bar, with the few numbers one watches beside it; everything else goes to `metrics.jsonl`."""

    def close(self) -> None:
        """End the bar's line, so that an error stands on its own."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the loss, accuracies, rewards and divergences of the newest log."""
        if not state.is_world_process_zero or self.training_bar is None:
            return
        watched = ("loss", "rewards/accuracies", "rewards/margins", "reward")
        kept = {
            name: number(value)
            for name, value in (logs or {}).items()
            if (name in watched or name.startswith("divergence/")) and not name.endswith("_se")
        }
        if "loss" in kept:  # the last log of a training has totals only
            self.training_bar.set_postfix(kept, refresh=False)


class RecordFiles(TrainerCallback):
    """`recipe_resolved.yaml` and `environment.json`, written when training begins: a resumption that is refused leaves
    those of the run it was to go on with."""

    def __init__(self, directory: RunDirectory, recipe: str, environment: Mapping[str, Any]):
        self.directory, self.recipe, self.environment = directory, recipe, environment

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write both; the checkpoint has been accepted by now."""
        if state.is_world_process_zero:
            self.directory.write("recipe_resolved.yaml", self.recipe)
            write_json(self.directory.path / "environment.json", dict(self.environment))


class MetricsFile(TrainerCallback):
    """`metrics.jsonl`: one line per log, written as it happens, so that a killed run keeps its curves."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the file; a resumed run starts from the history in its checkpoint."""
        if state.is_world_process_zero:
            self.path.write_text("".join(json.dumps(entry) + "\n" for entry in state.log_history), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Append the newest entry."""
        if state.is_world_process_zero and state.log_history:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


def unmet_requirements(
    evaluations: list[tuple[Block, Any]], before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[str]:
    """One line for every `require:` entry that does not hold.

    Raises:
        FdivError: a required metric was not measured.
    """
    unmet = []
    for block, evaluation in evaluations:
        lower = getattr(evaluation, "lower_is_better", ())  # optional class attribute, see fdiv.methods.EVALUATIONS
        for metric, direction in block.require.items():
            start, end = before.get(metric), after.get(metric)
            if start is None or end is None:
                known = ", ".join(sorted(after)) or "none"
                raise FdivError(f"eval.require: {metric!r} was not measured before and after; metrics are: {known}")
            down = direction == "decreased" or (direction == "improved" and metric in lower)
            if not (end < start if down else end > start):
                unmet.append(f"{metric} has not {direction}: {start:.6g} before training, {end:.6g} after")
    return unmet
