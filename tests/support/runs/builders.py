"""Builders of `prepare:` for tests, named `tests.support.runs.builders:Trains`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdiv.errors import FdivError

__all__ = ["Trains", "prepared"]


@dataclass
class Trains:
    """Trains a model for two steps with a stock trainer, and writes down how it was trained.

    Args:
        model: its path. fails: how the build ends instead: with `rows` missing, or with `rollouts` that failed.
    """

    model: str
    fails: str = ""

    def build(self, folder: Path) -> dict[str, Any]:
        from accelerate import PartialState
        from datasets import Dataset
        from transformers.integrations import is_deepspeed_zero3_enabled
        from trl import SFTConfig, SFTTrainer

        from fdiv.errors import RolloutError

        if self.fails == "rollouts":
            raise RolloutError("the server is gone")
        if self.fails == "rows":
            raise FileNotFoundError("no rows at all")
        rows = Dataset.from_list([{"text": f"row {number}"} for number in range(8)])
        args = SFTConfig(
            str(folder / "sft"), max_steps=2, per_device_train_batch_size=2, use_cpu=True, bf16=False, report_to=[]
        )
        trainer = SFTTrainer(self.model, args, train_dataset=rows)
        trainer.train()
        seen = {
            "processes": PartialState().num_processes,
            "wrapped": type(trainer.model_wrapped).__name__,
            "zero3": is_deepspeed_zero3_enabled(),
        }
        (folder / "seen.json").write_text(json.dumps(seen))
        return {"dataset_name": str(folder / "seen.json")}


def prepared(root: str, model: str, fails: str, said: str) -> None:
    """Run the step of a run that prepares, on every process as a run does; `said` gets what rank 0 knows then."""
    import os

    from accelerate import PartialState

    from fdiv.inference.processes import main_process_first
    from fdiv.run.build import build

    state = PartialState(cpu=True)
    found: dict[str, Any] = {"group": state.num_processes}
    with main_process_first():
        try:
            _, keys = build("tests.support.runs.builders:Trains", Trains(model, fails), Path(root))
            found |= json.loads(Path(keys["dataset_name"]).read_text())
        except (FdivError, OSError) as error:
            found |= {"error": type(error).__name__, "message": str(error)}
    state.wait_for_everyone()
    Path(f"{said}.{os.environ.get('RANK', '0')}").write_text(json.dumps(found))


def order(folder: str, group_seconds: float, build_seconds: float) -> None:
    """Both processes append their rank to a file, the main one first and late; they wait in a group with little time."""
    import datetime
    import os
    import time

    from accelerate import PartialState

    from fdiv.inference.processes import main_process_first, process_state

    PartialState(cpu=True, timeout=datetime.timedelta(seconds=group_seconds))
    with main_process_first():
        if process_state().is_main_process:
            time.sleep(build_seconds)
        with open(Path(folder) / "order", "a") as file:
            file.write(os.environ["RANK"])
    process_state().wait_for_everyone()
