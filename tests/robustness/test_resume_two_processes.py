"""Two CPU processes, DDP and ZeRO-3: a run that goes on from its checkpoint is the run without interruption."""

import json
import os
import shutil
import sys

import pytest
from safetensors.torch import load_file

from tests.cli.conftest import pairs, write_recipe  # noqa: F401  (fixtures)
from tests.support.processes import end_with_group


def run(recipe, accelerate, output, repository, *words):
    """`fdiv run` in a process of its own."""
    command = [sys.executable, "-m", "fdiv", "run", recipe, "--accelerate", accelerate, "--output_dir", output, *words]
    done = end_with_group(
        [str(word) for word in command], timeout=560, cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def numbers(folder):
    """Every line of the log without what a clock says; the last has the sums of the run."""
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    times = ("runtime", "per_second", "step_time")
    return [{name: entry[name] for name in entry if not any(part in name for part in times)} for entry in entries]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # two launches
@pytest.mark.parametrize("accelerate", ["cpu_ddp", "cpu_zero3"])
def test_a_resumed_run_is_the_uninterrupted_one(accelerate, write_recipe, tmp_path, repository):  # noqa: F811
    recipe = write_recipe(max_steps=4, save_strategy="steps", save_steps=2, per_device_train_batch_size=1)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(recipe, accelerate, whole, repository)
    shutil.copytree(whole, resumed)
    for name in ("checkpoint-4", "result.json", "model.safetensors"):  # as if it had ended after step 3
        path = resumed / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    said = run(recipe, accelerate, resumed, repository, "--resume_from_checkpoint", "true")
    assert "checkpoint-2, the newest complete checkpoint" in said
    assert numbers(resumed) == numbers(whole) and len(numbers(whole)) == 5
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all(first[name].equal(second[name]) for name in first)
