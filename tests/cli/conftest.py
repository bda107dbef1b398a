"""A recipe that trains the tiny model for two steps on a handful of generated pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fdiv.cli import main


def write_pairs(path: Path, count: int, **extra: str) -> Path:
    """`count` preference rows; `extra` renames columns (`rejected="bad"`)."""
    rows = [
        {"prompt": f"Say {index}:", "chosen": f" yes {index}", "rejected": f" no {index}"} for index in range(count)
    ]
    named = [{extra.get(name, name): value for name, value in row.items()} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in named), encoding="utf-8")
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A data folder with a train and a test split."""
    write_pairs(tmp_path / "data" / "train.jsonl", 8)
    write_pairs(tmp_path / "data" / "test.jsonl", 4)
    return tmp_path / "data"


def recipe_values(model: Path, data: Path, output: Path) -> dict:
    """The smallest useful recipe."""
    return {
        "method": "f_dpo",
        "model_name_or_path": str(model),
        "dataset_name": str(data),
        "output_dir": str(output),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 7,
    }


@pytest.fixture
def write_recipe(tmp_path: Path, tiny_model_dir: Path, pairs: Path):
    """Write `recipe.yaml` with some keys changed (None leaves one out) and return its path."""

    def write(text: str = "", **changes: object) -> Path:
        values = {**recipe_values(tiny_model_dir, pairs, tmp_path / "out"), **changes}
        values = {key: value for key, value in values.items() if value is not None}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False) + text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def fails(capsys: pytest.CaptureFixture):
    """Run a command that must fail with exactly one line on stderr; return that line."""

    def run(*words: object, code: int = 2) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == code
        captured = capsys.readouterr()
        assert captured.err.endswith("\n")
        assert captured.err.count("\n") == 1, captured.err
        assert "Traceback" not in captured.err
        return captured.err.rstrip("\n")

    return run
