"""One process and two give the same f-DPG run on the same rollouts: Z and baselines are over all processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.processes import run_well
from tests.support.runs.f_dpg import recorded
from tests.support.scripts import f_dpg as run_f_dpg


def _run(processes: int, model_dir: Path, rollouts: Path, output: Path) -> dict:
    words = [str(model_dir), str(rollouts), str(16 // processes), str(output)]
    run_well(run_f_dpg.main, *words, processes=processes)
    return json.loads(output.read_text())


@pytest.mark.parametrize("baseline", ["loo", pytest.param("history", marks=pytest.mark.slow)])
def test_two_processes_equal_one(tiny_model_dir, tmp_path, baseline):
    rollouts = tmp_path / "rollouts.jsonl"
    rollouts.write_text("".join(json.dumps(record) + "\n" for record in recorded(tiny_model_dir, 12)))
    one, two = (_run(n, tiny_model_dir, rollouts, tmp_path / f"{baseline}-{n}.json") for n in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    weights = [torch.tensor(run["weights"]) for run in (one, two)]
    assert (weights[0] - weights[1]).abs().max() < 1e-5
    assert two["same_z_everywhere"]
    assert one["z"].keys() == two["z"].keys() and len(one["z"]) == 4
    for key, (log_sum, count) in one["z"].items():
        assert two["z"][key] == [pytest.approx(log_sum, abs=1e-6), count] and count == 12
    assert one["recent"] == pytest.approx(two["recent"], abs=1e-4)
    assert bool(one["recent"]) == (baseline == "history")
    for first, second in zip(one["history"][:-1], two["history"][:-1], strict=True):
        assert first.keys() == second.keys()
        for key, value in first.items():
            if key not in ("step_time", "num_tokens", "epoch") and not key.startswith("completions"):
                expected = None if value is None else pytest.approx(value, abs=1e-4, rel=1e-4)
                assert second[key] == expected, key
