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

__all__ = ["Evaluations", "Names", "add_metrics", "summary_metrics", "unmet_requirements"]

Names = Sequence[Mapping[str, str]]
"""Of every `eval:` block: metric as the block calls it → its name in the results; empty where it did not measure."""


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
        self.names: dict[str, Names] = {}
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
            record = read_record(earlier, "remove it: the start is then not measured")
            self.results["before"] = record["metrics"]
            if "names" in record:  # not in a record of an earlier release
                self.names["before"] = record["names"]
        else:
            self.results["before"] = {}
            self.notes["before"] = f"not measured: the run was resumed at step {state.global_step}"

    def measure(self, stage: str) -> dict[str, float | None]:
        """Run every evaluation on the current model, on every process; the main process writes `eval_STAGE.json`."""
        started = time.perf_counter()
        trainer = self.trainer
        model, was_training = trainer.model, trainer.model.training
        metrics: dict[str, float | None] = {}
        names: list[dict[str, str]] = []
        notes: dict[str, str] = {}
        model.eval()
        with preserved_random_state(), torch.no_grad():
            for block, evaluation in self.evaluations:
                if stage == "before" and not block.before:
                    names.append({})
                    continue
                found = dict(evaluation.evaluate(model, trainer.processing_class, self.datasets, self._context(stage)))
                notes.update(found.pop("notes", {}))
                names.append(add_metrics(metrics, found, block.name))
        model.train(was_training)
        self.results[stage], self.names[stage] = metrics, names
        if stage == "after" and "before" in self.names:
            self._name_the_start_as_the_end()
        self.notes.update(notes)
        self.seconds += time.perf_counter() - started
        if trainer.is_world_process_zero():
            record = {"metrics": metrics, "names": names, "notes": notes}
            write_record(self.output_dir / f"eval_{stage}.json", record)
        return metrics

    def _name_the_start_as_the_end(self) -> None:
        """Give the numbers of the start the names that their blocks' metrics got at the end.

        A block with `before: false` takes names at the end only, so another's may differ there.
        """
        before, early, late = self.results["before"], self.names["before"], self.names["after"]
        renamed: dict[str, float | None] = {}
        given = [
            {metric: end[metric] for metric in start if metric in end} for start, end in zip(early, late, strict=True)
        ]
        for start, names in zip(early, given, strict=True):
            renamed |= {names[metric]: before[start[metric]] for metric in names}
        for (block, _), start, names in zip(self.evaluations, early, given, strict=True):
            alone = {metric: before[old] for metric, old in start.items() if metric not in names}
            names |= add_metrics(renamed, alone, block.name)
        self.results["before"], self.names["before"] = renamed, given

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


def add_metrics(metrics: dict[str, float | None], found: Mapping[str, Any], evaluation: str) -> dict[str, str]:
    """Add what an evaluation found; a name that is taken becomes `EVALUATION_NAME`, then `EVALUATION_2_NAME` …

    Returns:
        The name that each metric got.
    """
    taken = set(metrics)
    given = {}
    for name, value in found.items():
        names = itertools.chain(
            (name, f"{evaluation}_{name}"), (f"{evaluation}_{count}_{name}" for count in itertools.count(2))
        )
        given[name] = next(free for free in names if free not in taken)
        metrics[given[name]] = None if value is None else float(value)
    return given


def unmet_requirements(
    evaluations: Sequence[tuple[Block, Any]],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    method: str,
    names: Mapping[str, Names] | None = None,
) -> list[str]:
    """One line for every `require:` entry that does not hold.

    `improved` goes the way that `lower_is_better` of the evaluation, else the glossary of metrics, says is better:
    down, or towards 0; up where neither says anything.

    Args:
        evaluations: `(block, instance)` pairs.
        before, after: the metrics of all of them. method: of the run.
        names: stage → the names that the blocks' metrics got there; None: their own.

    Raises:
        FdivError: a required metric was not measured.
    """
    unmet = []
    for number, (block, evaluation) in enumerate(evaluations):
        lower = getattr(evaluation, "lower_is_better", ())  # optional class attribute, see fdiv.catalog.EVALUATIONS
        for metric, direction in block.require.items():
            shown, start, end = _required(metric, number, before, after, names or {})
            if start is None or end is None:
                known = ", ".join(sorted(after)) or "none"
                raise FdivError(f"eval.require: {shown!r} was not measured before and after; metrics are: {known}")
            way = "lower" if metric in lower else better(metric, method)
            falls = direction == "decreased" or (direction == "improved" and way == "lower")
            nears = direction == "improved" and way == "zero"
            if not (abs(end) < abs(start) if nears else end < start if falls else end > start):
                unmet.append(f"{shown} has not {direction}: {start:.6g} before training, {end:.6g} after")
    return unmet


def _required(
    metric: str, number: int, before: Mapping[str, Any], after: Mapping[str, Any], names: Mapping[str, Names]
) -> tuple[str, float | None, float | None]:
    """The name in the results of what block `number` calls `metric`, and its values before and after.

    A metric that the block itself does not give is another block's, by its name in the results.
    """
    late = names["after"][number] if "after" in names else {}
    # Without names of the start (a record of an earlier release) those of the end hold: the same blocks gave them.
    early = names["before"][number] if "before" in names else late
    if metric not in late and metric not in early:
        return metric, before.get(metric), after.get(metric)
    start = before.get(early[metric]) if metric in early else None
    end = after.get(late[metric]) if metric in late else None
    return late.get(metric, metric), start, end


def summary_metrics(evaluations: Sequence[tuple[Block, Any]], after: Mapping[str, Any], names: Names) -> list[str]:
    """The metrics of the end-of-run table: those an evaluation puts forward, all of them where it does not say.

    Args:
        evaluations: `(block, instance)` pairs.
        after: the metrics of all of them. names: those that the blocks' metrics got in it.
    """
    chosen: list[str] = []
    for (block, evaluation), given in zip(evaluations, names, strict=True):
        # `summary_metrics` is an optional class attribute, see fdiv.catalog.EVALUATIONS
        wanted = block.summary or getattr(evaluation, "summary_metrics", ())
        chosen += [given.get(name, name) for name in wanted]
    return [name for name in dict.fromkeys(chosen) if name in after] or list(after)
