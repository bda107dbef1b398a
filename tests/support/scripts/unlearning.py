"""Run by torchrun from test_processes.py: train each method given and write its weights and history.

usage: distributed_run.py MODEL_DIR OUTPUT_DIR PER_DEVICE_BATCH METHOD[:KEY=JSON…] …
"""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

from fdiv.cli.ending import exit_after
from tests.support.runs.unlearning import forget_rows, make_trainer
from tests.support.same_run import weights


def main() -> None:
    model_dir, output_dir, batch = sys.argv[1:4]
    for specification in sys.argv[4:]:
        name, *pairs = specification.split(":")
        options = {key: json.loads(value) for key, value in (pair.split("=") for pair in pairs)}
        trainer = make_trainer(
            name, model_dir, Path(output_dir) / name, per_device_train_batch_size=int(batch), optim="sgd",
            max_steps=4, eval_dataset=forget_rows(5), per_device_eval_batch_size=2, **options,
        )  # fmt: skip
        trainer.train()
        metrics = {k: v for k, v in trainer.evaluate().items() if "time" not in k and "second" not in k}
        if trainer.is_world_process_zero():
            folder = Path(output_dir)
            save_file({"weights": weights(trainer)}, folder / f"{name}.safetensors")
            logged = [{k: v for k, v in row.items() if k != "epoch"} for row in trainer.state.log_history[:4]]
            extra = {"processes": trainer.accelerator.num_processes, "multiplier": getattr(trainer, "multiplier", 0)}
            (folder / f"{name}.json").write_text(json.dumps({"log": logged, "eval": metrics, **extra}))


if __name__ == "__main__":
    exit_after(main)
