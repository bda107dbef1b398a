"""vLLM in the trainer's process, on its CPU build: each rollout trainer samples from the weights it has just trained.

What a CPU cannot show: TRL's own hand-over of weights, sleep mode, tensor parallelism (tests/support/scripts/colocate.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def colocated(repository, tmp_path, model, *words) -> subprocess.CompletedProcess:
    # A folder named vllm, or a checkout of it, on the path would shadow the package: the output is the working directory.
    environment = {**os.environ, "PYTHONPATH": str(repository), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.scripts.colocate", words[0], str(model), str(tmp_path), *words[1:]]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


def log_of(result) -> list[dict]:
    assert result.returncode == 0, result.stderr[-3000:]
    entries = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"')]
    return [entry for entry in entries if "loss" in entry]


@pytest.mark.parametrize("words", [("f_dpg",), ("f_dpg", "--lora")], ids=" ".join)
def test_the_engine_samples_from_the_weights_just_trained(vllm_python, repository, tiny_model_dir, tmp_path, words):
    """π/q = 1 on fresh samples after every update; a step of 0.05 moves log-probabilities by nats."""
    log = log_of(colocated(repository, tmp_path, tiny_model_dir, *words))
    assert len(log) == 3
    for entry in log:
        assert entry["importance_weight/mean"] == pytest.approx(1.0, abs=1e-3)
    assert abs(log[-1]["kl_to_base"]) > 1e-2


@pytest.mark.parametrize("name", ["dph", "d2o", "f_distill"])
def test_every_other_rollout_trainer_learns(vllm_python, repository, tiny_model_dir, tmp_path, name):
    log = log_of(colocated(repository, tmp_path, tiny_model_dir, name))
    assert len(log) == 3 and all(entry["grad_norm"] > 0 for entry in log)


def test_trls_own_hand_over_stops_on_a_cpu(vllm_python, repository, tiny_model_dir, tmp_path):
    """What docs/versions.md says; when it no longer holds, the script can go."""
    result = colocated(repository, tmp_path, tiny_model_dir, "f_dpg", "--as_shipped")
    assert result.returncode != 0
    assert "has no attribute 'weight_loader'" in result.stderr
