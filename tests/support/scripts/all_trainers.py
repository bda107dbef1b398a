"""Run by test_sharding.py under torchrun or accelerate: trainers one after the other. Writes one JSON file."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import TrainingArguments

from fdiv.cli.ending import exit_after
from fdiv.training.rollouts import RecordedRollouts
from tests.support.runs.all_trainers import build

STEPS = 10


def main(model_dir: str, recorded: str, output: str, *names: str) -> None:
    faulthandler.dump_traceback_later(500, exit=True)  # before the test's time is up: where it stands still
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    results = {}
    # The processes find each other when a config is built; it has to be alive when a model is loaded under ZeRO-3.
    start = TrainingArguments(f"{output}.start", use_cpu=True)
    for name in names:
        # Each trainer brings a DeepSpeed configuration of its own; the state would keep the first one's.
        AcceleratorState._reset_state()
        results[name] = train(name, model_dir, Path(recorded), f"{output}.{name}", processes)
    del start
    if int(os.environ.get("RANK", "0")) == 0:
        Path(output).write_text(json.dumps(results))


def options(name: str, recorded: Path, processes: int) -> dict[str, Any]:
    """The settings under which one process and two do the same: equal global batch, recorded rollouts.

    An epsilon far above rounding keeps Adam, whose state is sharded, from making steps of it.
    """
    rows = 8 if name in ("f_dpg", "dph") else 4
    chosen: dict[str, Any] = {
        "per_device_train_batch_size": rows // processes, "max_steps": STEPS, "learning_rate": 5e-3,
        "adam_epsilon": 0.1, "lr_scheduler_type": "constant",
    }  # fmt: skip
    if name in ("f_dpg", "dph"):
        chosen["rollout_func"] = RecordedRollouts(recorded / "rollouts.jsonl")
    if name == "dph":  # scored beforehand: a bare forward fails while ZeRO-3 is on
        chosen["rehearsal_cache"] = str(recorded / "rehearsal.safetensors")
    if name in ("f_distill", "sinkhorn"):  # loaded as a run would: weights changed in place are shards under ZeRO-3
        chosen["teacher"] = recorded / "teacher"
        chosen["learning_rate"] = 0.1 if name == "f_distill" else 0.03  # its gradients are far below that epsilon
    if name == "d2o":
        chosen["given_anchors"] = 3  # a column of the data: nothing is sampled
    return chosen


def train(name: str, model_dir: str, recorded: Path, output: str, processes: int) -> dict[str, Any]:
    trainer = build(name, model_dir, output, **options(name, recorded, processes))
    trainer.train()
    share = parameter_share(trainer.model_wrapped)
    return {
        "processes": trainer.accelerator.num_processes,
        "distributed": str(trainer.accelerator.distributed_type),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "parameter_share": trainer.accelerator.gather(torch.tensor([share])).tolist(),
    }


def parameter_share(model: torch.nn.Module) -> float:
    """The part of all parameter elements that this process holds; those ZeRO-3 keeps whole everywhere count fully."""
    held = total = 0
    for parameter in model.parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())
        total += count
        sharded = hasattr(parameter, "ds_tensor") and not getattr(parameter, "ds_persist", False)
        held += parameter.ds_tensor.numel() if sharded else count
    return held / total


if __name__ == "__main__":
    exit_after(lambda: main(*sys.argv[1:]))
