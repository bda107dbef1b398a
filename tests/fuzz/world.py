"""Valid inputs, each made when it is first asked for: a tiny model, rows, a finished run, caches, logs."""

from __future__ import annotations

import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

__all__ = ["World", "write_rows"]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class World:
    """Where the valid inputs stand. Judges copy from it, and never write to it.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def model(self) -> Path:
        """A random Llama with its tokenizer and chat template."""
        from transformers.utils.logging import disable_progress_bar

        from fdiv.models.tiny import build_tiny_model

        disable_progress_bar()
        return build_tiny_model(self.folder / "model")

    @cached_property
    def pairs(self) -> Path:
        """Preference pairs: `train.jsonl` and `test.jsonl`."""
        for split, count in (("train", 8), ("test", 4)):
            write_rows(self.folder / "pairs" / f"{split}.jsonl", self.preference_rows(count))
        return self.folder / "pairs"

    @staticmethod
    def preference_rows(count: int) -> list[dict[str, Any]]:
        """Rows of plain text."""
        return [{"prompt": f"Say {i}:", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(count)]

    def recipe(self, output: Path, **changes: Any) -> dict[str, Any]:
        """A recipe that trains for two steps in half a second; None leaves a key out."""
        values = {
            "method": "f_dpo",
            "divergence": {"name": "alpha", "alpha": 0.3},
            "beta": 0.1,
            "model_name_or_path": str(self.model),
            "dataset_name": str(self.pairs),
            "output_dir": str(output),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.01,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "seed": 7,
            **changes,
        }
        return {key: value for key, value in values.items() if value is not None}

    def write_recipe(self, folder: Path, **changes: Any) -> Path:
        """`recipe.yaml` in a folder; its `output_dir` is `out` beside it."""
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe(folder / "out", **changes), sort_keys=False), encoding="utf-8")
        return path

    def copy(self, source: Path, folder: Path) -> Path:
        """A copy of a folder of this world, to be damaged."""
        return Path(shutil.copytree(source, folder / source.name))
