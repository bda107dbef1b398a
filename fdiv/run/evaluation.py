"""Evaluation around training: the same measurements before the first step and after the last."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from fdiv.errors import FdivError
from fdiv.evaluation import EvalContext
from fdiv.recipe.model import Block
from fdiv.report.metrics import better
from fdiv.rows.report import RowReport
from fdiv.sealed import read_record, write_record
from fdiv.training.evaluation import preserved_random_state

__all__ = ["Evaluations", "unmet_requirements"]


class Evaluations(TrainerCallback):
    """The `eval:` blocks of a run. As a callback it measures the start when training has prepared the model for its
    devices (DDP, DeepSpeed and FSDP do that inside `train()`); `measure("after")` is called when training is over.

    Args:
        evaluations: `(block, instance)` pairs.
        datasets: Split → untokenised rows.
        output_dir: The run's directory.
    """

    def __init__(self, evaluations: Sequence[tuple[Block, Any]], datasets: Mapping[str, Any], output_dir: Path):
        self.evaluations, self.datasets, self.output_dir = evaluations, datasets, output_dir
        self.trainer: Any = None
        self.results: dict[str, dict[str, float | None]] = {}
        self.notes: dict[str, str] = {}
        self.row_reports: list[RowReport] = []
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the start; a resumed run takes what its first part measured."""
        if not self.evaluations:
            return
        earlier = self.output_dir / "eval_before.json"
        if state.global_step == 0:
            self.measure("before")
        elif earlier.is_file():
            self.results["before"] = read_record(earlier, "remove it: the start is then not measured")["metrics"]
        else:
            self.results["before"] = {}
            self.notes["before"] = f"not measured: the run was resumed at step {state.global_step}"

    def measure(self, stage: str) -> dict[str, float | None]:
        """Run every evaluation on the current model, on every process; the main process writes `eval_STAGE.json`."""
        started = time.perf_counter()
        trainer = self.trainer
        model, was_training = trainer.model, trainer.model.training
        metrics: dict[str, float | None] = {}
        notes: dict[str, str] = {}
        model.eval()
        with preserved_random_state(), torch.no_grad():
            for block, evaluation in self.evaluations:
                if stage == "before" and not block.before:
                    continue
                found = dict(evaluation.evaluate(model, trainer.processing_class, self.datasets, self._context(stage)))
                notes.update(found.pop("notes", {}))
                add_metrics(metrics, found, block.name)
        model.train(was_training)
        self.results[stage] = metrics
        self.notes.update(notes)
        self.seconds += time.perf_counter() - started
        if trainer.is_world_process_zero():
            write_record(self.output_dir / f"eval_{stage}.json", {"metrics": metrics, "notes": notes})
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
            row_reports=self.row_reports,
        )


def add_metrics(metrics: dict[str, float | None], found: Mapping[str, Any], evaluation: str) -> None:
    """Add what an evaluation found; a name that is taken becomes `EVALUATION_NAME`, then `EVALUATION_2_NAME` …"""
    taken = set(metrics)
    for name, value in found.items():
        names = itertools.chain(
            (name, f"{evaluation}_{name}"), (f"{evaluation}_{count}_{name}" for count in itertools.count(2))
        )
        metrics[next(free for free in names if free not in taken)] = None if value is None else float(value)


def unmet_requirements(
    evaluations: Sequence[tuple[Block, Any]], before: Mapping[str, Any], after: Mapping[str, Any], method: str
) -> list[str]:
    """One line for every `require:` entry that does not hold.

    `improved` goes the way that `lower_is_better` of the evaluation, else the glossary of metrics, says is better:
    down, or towards 0; up where neither says anything.

    Raises:
        FdivError: a required metric was not measured.
    """
    unmet = []
    for block, evaluation in evaluations:
        lower = getattr(evaluation, "lower_is_better", ())  # optional class attribute, see fdiv.catalog.EVALUATIONS
        for metric, direction in block.require.items():
            start, end = before.get(metric), after.get(metric)
            if start is None or end is None:
                known = ", ".join(sorted(after)) or "none"
                raise FdivError(f"eval.require: {metric!r} was not measured before and after; metrics are: {known}")
            way = "lower" if metric in lower else better(metric, method)
            falls = direction == "decreased" or (direction == "improved" and way == "lower")
            nears = direction == "improved" and way == "zero"
            if not (abs(end) < abs(start) if nears else end < start if falls else end > start):
                unmet.append(f"{metric} has not {direction}: {start:.6g} before training, {end:.6g} after")
    return unmet
