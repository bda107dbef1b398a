"""Step time and peak memory of `FDPOTrainer` against TRL's `DPOTrainer`, as ratios.

    python -m benchmarks.f_dpo_step [--divergences reverse_kl …] [--pairs 30] [--output FILE]

One process builds both trainers on the same model and data. Pairs of optimizer steps (forward, reference forward,
backward, clipping, AdamW, and a log of every metric after every step) run on the same batch, in alternating order; the
time ratio is the median over the pairs, with a 95 % bootstrap interval. The batch is doubled until a step lasts long
enough. Memory is the peak of a whole step, weights and optimizer states included: allocated tensors as the profiler
counts them on a CPU (exact and repeatable), `max_memory_allocated` on an accelerator.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.timing import first_batch, in_turns, peak_bytes, ratio, ready, step, write_result

VALID: list[Any] = [
    "reverse_kl",
    "forward_kl",
    "jensen_shannon",
    {"name": "skew_jensen_shannon", "weight": 0.3},
    "jeffreys",
    {"name": "alpha", "alpha": 0.3},
    "squared_hellinger",
    "neyman_chi2",
    "chi2_kl",
]
TIME_GOAL, MEMORY_GOAL = 1.02, 1.01


def rows(count: int, length: int) -> Any:
    """Preference rows of about `length` bytes (tokens of the tiny tokenizer) each; no two alike."""
    from datasets import Dataset

    generator = random.Random(0)
    letters = "bcdfghjklmnpqrstvwxz0123456789"

    def text(size: int) -> str:
        return "".join(generator.choices(letters, k=size))

    half = length // 2
    return Dataset.from_list(
        [{"prompt": text(half), "chosen": text(half), "rejected": text(half - 2)} for _ in range(count)]
    )


def build(kind: str, model_dir: str, pairs: int, length: int, output_dir: str, **options: Any) -> Any:
    """A trainer of `kind` ("trl" or "fdiv") with optimizer and schedule, ready to step."""
    from trl import DPOConfig, DPOTrainer

    from fdiv.alignment import FDPOConfig, FDPOTrainer

    config, trainer_class = (DPOConfig, DPOTrainer) if kind == "trl" else (FDPOConfig, FDPOTrainer)
    args = config(
        output_dir=output_dir,
        per_device_train_batch_size=pairs,
        learning_rate=1e-5,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        max_length=None,
        **options,
    )
    return ready(trainer_class(model_dir, args=args, train_dataset=rows(pairs * 4, length)))


def compare(divergence: Any, pairs: int, model_dir: str, batch_pairs: int, length: int) -> dict[str, Any]:
    """Time and memory of both trainers under one divergence."""
    with tempfile.TemporaryDirectory() as folder:
        ours = build("fdiv", model_dir, batch_pairs, length, folder, divergence=divergence)
        theirs = build("trl", model_dir, batch_pairs, length, folder)
        trainers = {"fdiv": ours, "trl": theirs}
        batch = first_batch(ours)
        times = in_turns(trainers, dict.fromkeys(trainers, batch), pairs)
        memory = {name: peak_bytes(trainer, batch) for name, trainer in trainers.items()}
    found = ratio(times["fdiv"], times["trl"])
    return {
        "divergence": divergence,
        "time_ratio": found["time_ratio"],
        "time_ratio_interval": found["time_ratio_interval"],
        "memory_ratio": memory["fdiv"] / memory["trl"],
        "step_seconds": {name: statistics.median(values) for name, values in times.items()},
        "peak_bytes": memory,
        "pairs": pairs,
        "ratios": found["ratios"],
        "meets_goal": found["time_ratio"] <= TIME_GOAL and memory["fdiv"] <= MEMORY_GOAL * memory["trl"],
    }


def batch_for(seconds: float, model_dir: str, length: int) -> int:
    """The number of pairs per batch, a power of two, at which a step of TRL's trainer lasts `seconds` or more."""
    pairs = 1
    while True:
        with tempfile.TemporaryDirectory() as folder:
            trainer = build("trl", model_dir, pairs, length, folder)
            batch = first_batch(trainer)
            for _ in range(2):  # the first steps allocate the optimizer states and warm the caches
                step(trainer, batch)
            if min(step(trainer, batch) for _ in range(4)) >= seconds:
                return pairs
        pairs *= 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--divergences", nargs="+", help="names, or JSON mappings; all valid ones when left out")
    parser.add_argument("--pairs", type=int, default=30, help="interleaved pairs of steps per divergence")
    parser.add_argument("--min_step_seconds", type=float, default=0.6)
    parser.add_argument("--batch_pairs", type=int, help="preference pairs per step; found by doubling when left out")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence, about")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "f_dpo_step_time.json"))
    options = parser.parse_args()

    from fdiv.models.tiny import build_tiny_model
    from fdiv.provenance import environment

    named = options.divergences or VALID
    divergences = [json.loads(d) if isinstance(d, str) and d.startswith("{") else d for d in named]
    with tempfile.TemporaryDirectory() as folder:
        model_dir = str(
            build_tiny_model(
                f"{folder}/model", hidden_size=options.hidden_size, layers=options.layers, head_dim=64,
                max_positions=4 * options.length,
            )
        )  # fmt: skip
        batch_pairs = options.batch_pairs or batch_for(options.min_step_seconds, model_dir, options.length)
        results = []
        for divergence in divergences:
            result = compare(divergence, options.pairs, model_dir, batch_pairs, options.length)
            results.append(result)
            low, high = result["time_ratio_interval"]
            print(
                f"{divergence!s:48} time {result['time_ratio']:.4f} [{low:.4f}, {high:.4f}]  "
                f"memory {result['memory_ratio']:.4f}  step {result['step_seconds']['trl']:.2f} s"
            )
    content = {
        "goal": {"time_ratio": TIME_GOAL, "memory_ratio": MEMORY_GOAL},
        "settings": vars(options) | {"batch_pairs": batch_pairs, "output": Path(options.output).name},
        "results": results,
        "environment": environment(shlex.join(["python", *sys.argv]), seed=0),
    }
    write_result(options.output, content)


if __name__ == "__main__":
    main()
