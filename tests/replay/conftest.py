"""Runs of a few seconds whose rows can be left out, and what two of them are compared by."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fdiv.cli import main
from fdiv.models.tiny import build_tiny_model
from fdiv.run.batch_log import LOG, BatchLog
from tests.support.runs import f_distill

COMMON = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 3,
    "learning_rate": 1e-2,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "report_to": "none",
    "seed": 3,
    "use_cpu": True,
    "bf16": False,
}
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "learning_rate": 5e-2}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def forget_rows(count: int = 12) -> list[dict[str, Any]]:
    return [
        {"question": f"What is number {i}?", "answer": f"It is {i}" + ", surely" * (i % 4) + "."} for i in range(count)
    ]


def retain_rows(count: int = 30) -> list[dict[str, Any]]:
    return [{"question": f"Who is {i}?", "answer": f"Person {i} " * (1 + i % 3)} for i in range(count)]


@dataclass
class Bench:
    """A folder with a model, data and the runs made there."""

    folder: Path
    model: Path
    values: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def use(self, method: str, rows: list[dict[str, Any]], **values: Any) -> Bench:
        """Set the recipe; its training rows go to `data.jsonl`."""
        data = write_rows(self.folder / "data.jsonl", rows)
        keys = {"model_name_or_path": str(self.model), "dataset_name": str(data), "method": method}
        self.values, self.rows = {**COMMON, **keys, **values}, rows
        return self

    def recipe(self, name: str, **values: Any) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**self.values, "output_dir": str(self.folder / name), **values}))
        return path

    def run(self, name: str, **values: Any) -> Path:
        """A run of the recipe with some keys changed."""
        assert main(["run", str(self.recipe(name, **values))]) == 0
        return self.folder / name

    def without(self, *rows: dict[str, Any]) -> Path:
        return write_rows(self.folder / "without.jsonl", list(rows))

    def replay(self, run: Path, without: Path, name: str = "replayed", *words: str) -> Path:
        assert main(["replay", str(run), "--without", str(without), "--output", str(self.folder / name), *words]) == 0
        return self.folder / name


def begins_late(run: Path, rows: list[dict[str, Any]], count: int = 1) -> list[dict[str, Any]]:
    """The `count` rows of the data that a run met last for the first time."""
    from fdiv.rows.digests import row_digest
    from fdiv.run.batch_log import read_key

    first, key = BatchLog.read(run / LOG).first_steps(), read_key(run)
    return sorted(rows, key=lambda row: first[row_digest(row, key)])[-count:]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    file = run / "adapter_model.safetensors"
    return load_file(file if file.is_file() else run / "model.safetensors")


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor inside a nested value, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for entry in inner for tensor in tensors_in(entry)]


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimizer and random state of the last checkpoint are the same, bit for bit."""
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    states = []
    for run in (one, other):
        last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
        parts = [torch.load(last / name, weights_only=False) for name in ("optimizer.pt", "rng_state.pth")]
        states.append((last.name, tensors_in(parts)))
    assert states[0][0] == states[1][0]
    assert len(states[0][1]) == len(states[1][1]) > 1
    assert all(torch.equal(a, b) for a, b in zip(states[0][1], states[1][1], strict=True))


def differs(one: Path, other: Path) -> bool:
    ours, theirs = weights_of(one), weights_of(other)
    return any(not torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="session")
def start_model(tmp_path_factory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("start") / "model")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    return f_distill.make_teacher(tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture
def bench(tmp_path: Path, start_model: Path) -> Bench:
    return Bench(tmp_path, start_model)


@pytest.fixture
def refused(capsys):
    """Run a command that must fail with one line; return it."""

    def run(*words: object, code: int = 1) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == code
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fdiv: ")]
        assert len(lines) == 1, lines
        return lines[0]

    return run
