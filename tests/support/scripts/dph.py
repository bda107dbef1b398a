"""Run by test_dph_processes.py on one process and two: DPH on recorded rollouts. Writes one JSON file."""

from __future__ import annotations

import json
from pathlib import Path

from fdiv.rl.dph.rehearsal import RehearsalCache
from fdiv.training.rollouts import RecordedRollouts
from tests.support.runs.dph import flat, load, sgd, trainer


def main(model_dir: str, rollouts: str, rehearsal: str, batch_size: str, accumulation: str, output: str) -> None:
    model = load(model_dir)
    made = trainer(
        model, f"{output}.run", rollout_func=RecordedRollouts(rollouts), rehearsal=RehearsalCache.load(rehearsal),
        per_device_train_batch_size=int(batch_size), gradient_accumulation_steps=int(accumulation), max_steps=3,
        optimizers=sgd(model, 0.1), learning_rate=0.1, rehearsal_batch_size=5, rehearsal_coefficient=0.7,
        rehearsal_weighting="pooled", divergence="forward_kl", coefficient_clip=0.2, kl="k3_loss",
        advantage={"name": "pkpo", "k": 2},
    )  # fmt: skip
    made.train()
    result = {
        "processes": made.accelerator.num_processes,
        "weights": flat(made.accelerator.unwrap_model(made.model)).tolist(),
        "history": made.state.log_history,
    }
    if made.accelerator.is_main_process:
        Path(output).write_text(json.dumps(result))
