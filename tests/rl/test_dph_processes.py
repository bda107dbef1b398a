"""One process and two, one micro-step and several, give the same DPH run on the same rollouts and rehearsal rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.processes import run_well
from tests.support.runs.dph import cache, recorded
from tests.support.scripts import dph as run_dph
from tests.support.scripts import dph_bank

pytestmark = pytest.mark.slow


def _run(processes: int, batch: int, accumulation: int, folder: Path, model_dir: Path) -> dict:
    output = folder / f"{processes}x{batch}x{accumulation}.json"
    files = [str(model_dir), str(folder / "rollouts.jsonl"), str(folder / "rehearsal.safetensors")]
    run_well(run_dph.main, *files, str(batch), str(accumulation), str(output), processes=processes)
    return json.loads(output.read_text())


def test_processes_and_accumulation_equal_one_batch(tiny_model_dir, tmp_path):
    """16 completions of 4 groups and 5 rehearsal rows per step, spread over 1, 2 or 4 slots (one row more in some)."""
    records = recorded(tiny_model_dir, 12)
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    cache(tiny_model_dir, shift=0.6).save(tmp_path / "rehearsal.safetensors")
    one, two, four = (_run(*layout, tmp_path, tiny_model_dir) for layout in ((1, 16, 1), (2, 8, 1), (2, 4, 2)))
    assert [run["processes"] for run in (one, two, four)] == [1, 2, 2]
    expected = torch.tensor(one["weights"])
    for run in (two, four):
        assert (torch.tensor(run["weights"]) - expected).abs().max() < 1e-5
        for first, second in zip(one["history"][:-1], run["history"][:-1], strict=True):
            for key in (
                "loss", "explore_loss", "rehearsal/loss", "rehearsal/rows", "rehearsal/clipped_fraction",
                "divergence/forward_kl", "divergence/forward_kl_se", "log_ratio/rehearsal_p05",
                "log_ratio/rehearsal_p95", "reward", "kl/k3_loss", "advantage/skipped_fraction",
            ):  # fmt: skip
                assert second[key] == pytest.approx(first[key], abs=2e-5, rel=1e-4), key
    assert one["history"][0]["rehearsal/rows"] == 5 and one["history"][2]["kl/k3_loss"] > 1e-4


def test_a_bank_on_two_processes_is_one_bank_and_resumes_exactly(tiny_model_dir, tmp_path):
    """Groups of two are often all alike, so one process samples again where the other has nothing to."""

    def run(resume, name):
        folder, output = str(tmp_path / "run"), tmp_path / name
        run_well(dph_bank.main, str(tiny_model_dir), folder, resume, str(output), processes=2)
        return [json.loads(Path(f"{output}.{rank}").read_text()) for rank in (0, 1)]

    whole = run("", "whole")
    again = run(str(tmp_path / "run" / "checkpoint-2"), "again")
    for first, second in (whole, again):
        assert first["processes"] == 2 and first["rows"] == second["rows"] and len(first["rows"]) > 4
    assert again[0]["rows"] == whole[0]["rows"]
    logs = [entry for entry in whole[0]["history"] if "loss" in entry]
    resumed = [entry for entry in again[0]["history"] if "loss" in entry]
    assert sum(entry["groups/sampled_again"] for entry in logs) > 0 and len(logs) == len(resumed) == 4
    for name in ("loss", "rehearsal/loss", "bank/rows", "bank/added", "groups/left_without_signal", "num_tokens"):
        assert [entry.get(name) for entry in resumed] == [entry.get(name) for entry in logs], name
