"""The same run on one process and on two: DDP over gloo through torchrun, and DeepSpeed's absence is no matter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

RUNS = ["FLAT:learning_rate=20", "IdkDPO:precompute_reference=true:learning_rate=0.02", "PDU:dual_warmup_epochs=0"]


@pytest.mark.slow
def test_two_processes_give_the_run_of_one(tiny_model_dir, tmp_path, repository):
    """Template, retain and forget rows, the reference table, the multiplier: equal at equal global batch."""
    script = str(Path(__file__).parents[1] / "support" / "scripts" / "unlearning.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository), "HF_HUB_OFFLINE": "1"}
    for processes, batch in ((1, 8), (2, 4)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
        arguments = [script, str(tiny_model_dir), str(folder), str(batch), *RUNS]
        done = subprocess.run([*launch, *arguments], env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
    for name in (run.split(":")[0] for run in RUNS):
        one, two = (json.loads((tmp_path / n / f"{name}.json").read_text()) for n in ("1", "2"))
        assert (one["processes"], two["processes"]) == (1, 2)
        weights = [load_file(tmp_path / n / f"{name}.safetensors")["weights"] for n in ("1", "2")]
        torch.testing.assert_close(*weights, atol=3e-6, rtol=1e-5)
        for row_one, row_two in zip(one["log"], two["log"], strict=True):
            assert row_two == pytest.approx(row_one, rel=1e-3, abs=1e-5)
        assert two["eval"] == pytest.approx(one["eval"], rel=1e-3, abs=1e-5)
        assert two["multiplier"] == pytest.approx(one["multiplier"], rel=1e-4)
