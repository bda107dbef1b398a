"""What a run shows and records while it trains: the progress bar, the records, `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from fdiv.run.directory import RunDirectory
from fdiv.sealed import forget_listed, write_record
from fdiv.secrets import redacted
from fdiv.terminal import number

__all__ = ["MetricsFile", "ProgressBar", "RecordFiles"]


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
            if (name in watched or name.startswith(("divergence/", "mean_f/"))) and not name.endswith("_se")
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
            forget_listed(self.directory.path / "recipe_resolved.yaml")
            self.directory.write("recipe_resolved.yaml", self.recipe)
            write_record(self.directory.path / "environment.json", dict(self.environment))


class MetricsFile(TrainerCallback):
    """`metrics.jsonl`: one line per log, written as it happens, so that a killed run keeps its curves."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the file; a resumed run starts from the history in its checkpoint."""
        if state.is_world_process_zero:
            forget_listed(self.path)
            self.path.write_text("".join(map(_line, state.log_history)), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Append the newest entry."""
        if state.is_world_process_zero and state.log_history:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(state.log_history[-1]))


def _line(entry: Mapping[str, Any]) -> str:
    """One log as a JSON line, without secrets: rewards and scorers name their own metrics."""
    return redacted(json.dumps(entry)) + "\n"
