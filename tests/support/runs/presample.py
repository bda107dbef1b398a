"""Data and settings that the pre-sampling tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fdiv.rl.presample.config import PresampleConfig

KINDS = ["easy", "half", "never", "unknown", "half", "easy", "half", "half", "half", "half"]
REWARD = "tests.support.presample_rewards:by_kind"


def write_rows(path: Path, kinds: list[str] = KINDS) -> Path:
    """Rows with texts of different lengths and a column that JSON readers take for a date."""
    rows = [
        {"prompt": "What is " + "1 + " * number + "1?", "kind": kind, "day": f"2020-01-0{number + 1}"}
        for number, kind in enumerate(kinds)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(model: Path, dataset: Path, **more: Any) -> dict[str, Any]:
    """Small and quick."""
    small = {"num_samples": 4, "max_completion_length": 5, "batch_size": 8, "threshold": "1/4"}
    return {"model": str(model), "dataset": str(dataset), "reward": REWARD, **small, **more}


def config(model: Path, dataset: Path, **more: Any) -> PresampleConfig:
    """The settings as an object."""
    return PresampleConfig(**settings(model, dataset, **more))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
