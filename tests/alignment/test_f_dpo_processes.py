"""One process and two give the same f-DPO run, metrics and evaluation at equal global batch."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from fdiv.cli.build_locks import remove_stale_locks
from tests.support.processes import end_with_group, run_well
from tests.support.scripts import f_dpo as run_f_dpo

ZERO3 = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config:
  zero_stage: 3
  zero3_init_flag: true
  zero3_save_16bit_model: true
  offload_optimizer_device: none
  offload_param_device: none
  gradient_accumulation_steps: auto
  deepspeed_multinode_launcher: standard
machine_rank: 0
main_training_function: main
mixed_precision: 'no'
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
use_cpu: false
"""


def _run(processes: int, model_dir: Path, data: Path, output: Path) -> dict:
    words = [str(model_dir), str(data), str(8 // processes), str(output)]
    run_well(run_f_dpo.main, *words, processes=processes)
    return json.loads(output.read_text())


def _run_zero3(model_dir: Path, data: Path, output: Path) -> dict:
    config = output.with_suffix(".yaml")
    config.write_text(ZERO3)
    launcher = ["accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
    remove_stale_locks()
    done = end_with_group(
        [sys.executable, "-m", *launcher, run_f_dpo.__file__, str(model_dir), str(data), "4", str(output)],
        timeout=1100,  # it may compile an extension of DeepSpeed
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


def _assert_same_logs(one: dict, two: dict) -> None:
    for first, second in [*zip(one["history"], two["history"], strict=True), (one["evaluated"], two["evaluated"])]:
        assert first.keys() == second.keys()
        for key in first:
            if not key.endswith(("runtime", "per_second")) and key != "total_flos":
                assert first[key] == pytest.approx(second[key], abs=1e-4, rel=1e-4), key


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
    _assert_same_logs(one, two)
    without_reference = {name for name, value in one["preferences"].items() if value is None}
    assert bool(without_reference) == (reference == "precompute")
    for name, value in one["preferences"].items():
        expected = None if name in without_reference else pytest.approx(value, abs=1e-4, rel=1e-4)
        assert two["preferences"][name] == expected, name
    assert one["evaluated"]["eval_ece_margin"] > 0 and one["preferences"]["entropy"] > 0
    assert two["stopped"] == [True, True]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_zero3_equals_one_process(tiny_model_dir, data, tmp_path):
    """Sharded policy and reference (DeepSpeed ZeRO-3): training, evaluation with sampling, and the stop."""
    one = _run(1, tiny_model_dir, data, tmp_path / "live-1.json")
    two = _run_zero3(tiny_model_dir, data, tmp_path / "live-zero3.json")
    assert two["processes"] == 2
    _assert_same_logs(one, two)
    assert one["preferences"] == pytest.approx(two["preferences"], abs=1e-4, rel=1e-4)
    assert two["stopped"] == [True, True]
