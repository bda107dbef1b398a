"""One process and two give the same f-DPO run, metrics and evaluation at equal global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("run_f_dpo.py")


def _run(processes: int, model_dir: Path, data: Path, output: Path) -> dict:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), str(model_dir), str(data), str(8 // processes), str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"prompt": f"Question {i}:", "chosen": f" {i + 1} is next", "rejected": " no" * (1 + i % 5)} for i in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("reference", ["live", pytest.param("precompute", marks=pytest.mark.slow)])
def test_two_processes_equal_one(tiny_model_dir, data, tmp_path, reference):
    one, two = (_run(n, tiny_model_dir, data, tmp_path / f"{reference}-{n}.json") for n in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    weights = [torch.tensor(run["weights"]) for run in (one, two)]
    assert (weights[0] - weights[1]).abs().max() < 1e-5
    timing = ("runtime", "per_second")
    for first, second in [*zip(one["history"], two["history"], strict=True), (one["evaluated"], two["evaluated"])]:
        assert first.keys() == second.keys()
        for key in first:
            if not key.endswith(timing) and key != "total_flos":
                assert first[key] == pytest.approx(second[key], abs=1e-4, rel=1e-4), key
    without_reference = {name for name, value in one["preferences"].items() if value is None}
    assert bool(without_reference) == (reference == "precompute")
    for name, value in one["preferences"].items():
        expected = None if name in without_reference else pytest.approx(value, abs=1e-4, rel=1e-4)
        assert two["preferences"][name] == expected, name
    assert one["evaluated"]["eval_ece_margin"] > 0 and one["preferences"]["entropy"] > 0
    assert two["stopped"] == [True, True]
