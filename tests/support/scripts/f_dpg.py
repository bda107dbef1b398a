"""Run by test_f_dpg_processes.py on one process or two: f-DPG on recorded rollouts. Writes one JSON file."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fdiv.training.rollouts import RecordedRollouts
from tests.support.runs.f_dpg import flat, load, trainer


def main(model_dir: str, rollouts: str, batch_size: str, output: str) -> None:
    model = load(model_dir)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    made = trainer(
        model, f"{output}.run", rollout_func=RecordedRollouts(rollouts), per_device_train_batch_size=int(batch_size),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)), max_steps=3,
        baseline=Path(output).name.split("-")[0], learning_rate=0.05,
    )  # fmt: skip
    made.train()
    result = {
        "processes": made.accelerator.num_processes,
        "weights": flat(made.accelerator.unwrap_model(made.model)).tolist(),
        "history": made.state.log_history,
        "z": made.estimates.state_dict(),
        "recent": list(made._recent_slopes),
    }
    everyone = made.accelerator.gather(torch.tensor([sum(s for s, _ in made.estimates.state_dict().values())]))
    result["same_z_everywhere"] = bool((everyone == everyone[0]).all())
    if made.accelerator.is_main_process:
        Path(output).write_text(json.dumps(result))
