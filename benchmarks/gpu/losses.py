"""Losses of the trainers on the same tiny model and recorded data, on one device: a process of `benchmarks/gpu`.

The model, the rollouts and the rehearsal rows are made in `--folder` where they are not there yet. The settings are
those under which `tests/robustness` compares one process with several: nothing is sampled during training. `--output`
is written again after each trainer, and what it holds already is kept.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.timing import write_whole

# Where advantages of a group cancel, gradients are rounding noise, which Adam's own 1e-8 would blow up to full steps.
_ADAM_EPSILON = 1e-4
TRAINERS = ("f_dpo", "f_dpg", "d2o", "flat", "dph")


def drift(reference: list[float], found: list[float]) -> dict[str, float]:
    """Maximum and mean over the steps of |found − reference|; infinite where a loss is missing or not a number."""
    if len(reference) != len(found):
        return {"max": float("inf"), "mean": float("inf")}
    differences = [abs(b - a) for a, b in zip(reference, found, strict=True)]
    if any(difference != difference for difference in differences):
        return {"max": float("inf"), "mean": float("inf")}
    return {"max": max(differences), "mean": sum(differences) / len(differences)}


def prepare(folder: Path) -> None:
    """The model, enough recorded rollouts for `STEPS` steps of all trainers, and a rehearsal cache."""
    from fdiv.models.tiny import build_tiny_model
    from tests.support.runs.dph import cache
    from tests.support.runs.f_dpg import recorded
    from tests.support.scripts.all_trainers import STEPS

    model_dir = build_tiny_model(folder / "model")
    cache(model_dir, shift=0.5).save(folder / "rehearsal.safetensors")
    records = recorded(model_dir, 4 * STEPS)
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def train(name: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train `name`; its losses, and under which circumstances."""
    import torch

    from tests.support.runs.all_trainers import build, losses
    from tests.support.scripts.all_trainers import options as recorded_options

    settings = {
        **recorded_options(name, options.folder, 1), "max_steps": options.steps, "use_cpu": options.device == "cpu",
        "bf16": precision == "bfloat16", "learning_rate": 1e-3, "adam_epsilon": _ADAM_EPSILON,
    }  # fmt: skip
    started = time.perf_counter()
    output = options.folder / f"{options.output.stem}_{precision}_{name}"
    trainer = build(name, options.folder / "model", output, **settings)
    trainer.train()
    plugin = trainer.args.deepspeed_plugin
    return {
        "losses": losses(trainer),
        "device": trainer.accelerator.device.type,
        "tf32": torch.backends.cuda.matmul.allow_tf32,  # torch's own setting; the driver's is NVIDIA_TF32_OVERRIDE
        "zero_stage": None if plugin is None else plugin.zero_stage,
        "processes": trainer.accelerator.num_processes,
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    from transformers import TrainingArguments

    if not (options.folder / "rollouts.jsonl").is_file():
        prepare(options.folder)
    # Alive while models are loaded: it is how they learn of ZeRO-3.
    start = TrainingArguments(str(options.folder / "start"), use_cpu=options.device == "cpu", bf16=False)
    runs = json.loads(options.output.read_text(encoding="utf-8")) if options.output.is_file() else {}
    for name in options.trainers:
        runs[name] = {precision: train(name, precision, options) for precision in options.precisions}
        if start.process_index == 0:
            write_whole(options.output, runs)


if __name__ == "__main__":
    main()
