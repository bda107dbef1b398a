"""Run by test_d2o_inputs.py on one process and two: D²O on recorded anchors, scored by a scorer. Writes one JSON file."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.runs.d2o import make_trainer, negative_rows
from tests.support.same_run import weights


def _length(completion_ids, **_):
    return [len(ids) / 10 for ids in completion_ids]


def main(model_dir: str, cache: str, batch_size: str, output: str) -> None:
    rows = negative_rows(24)
    trainer = make_trainer(
        Path(model_dir), rows, Path(f"{output}.run"), eval_dataset=rows.select(range(7)), optim="sgd", max_steps=6,
        learning_rate=0.05, per_device_train_batch_size=int(batch_size), per_device_eval_batch_size=2,
        anchor_cache=cache, harmfulness_func=_length, harmful_above=0.35,
    )  # fmt: skip
    trainer.train()
    evaluated = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        result = {"history": trainer.state.log_history, "evaluated": evaluated, "weights": weights(trainer).tolist()}
        Path(output).write_text(json.dumps({**result, "processes": trainer.accelerator.num_processes}))
