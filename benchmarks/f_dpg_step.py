"""Step time of `FDPGTrainer` against TRL's `GRPOTrainer` with beta > 0 on the same rollouts, as a ratio.

    python -m benchmarks.f_dpg_step [--divergences jensen_shannon …] [--pairs 30] [--output FILE]

Both trainers get the same recorded completions, with their log-probabilities, from a rollout function, so sampling
costs neither of them anything. What is timed is the rest of a step: scoring by the reward function, the reference
forward, the forward and backward of the policy, clipping, AdamW, and a log every `--log_every` steps (10 is TRL's
default; for f-DPG it includes distinct-n and self-BLEU). Steps alternate in order; the ratio is the median over the
pairs, with a 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.timing import FixedRollouts, in_turns, ratio, ready, reward, write_result

VALID: list[Any] = [
    "reverse_kl", "forward_kl", "jensen_shannon", {"name": "skew_jensen_shannon", "weight": 0.3}, "jeffreys",
    {"name": "alpha", "alpha": 0.75}, "squared_hellinger", "neyman_chi2", "pearson_chi2", "chi2_kl", "le_cam",
    "total_variation",
]  # fmt: skip
TIME_GOAL = 1.05


def build(kind: str, model_dir: str, rollouts: FixedRollouts, length: int, folder: str, **options: Any) -> Any:
    """A trainer of `kind` ("trl" or "fdiv") with optimizer and schedule, ready to step."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from fdiv.alignment import FDPGConfig, FDPGTrainer

    count = len(rollouts.completions)
    common: dict[str, Any] = {
        "output_dir": folder, "per_device_train_batch_size": count, "num_generations": count // 2,
        "learning_rate": 1e-5, "max_completion_length": length, "bf16": False,
        "gradient_checkpointing": False, "report_to": [], "disable_tqdm": True,
    }  # fmt: skip
    data = Dataset.from_dict({"prompt": ["a", "b"]})
    if kind == "trl":
        args = GRPOConfig(**common, beta=0.1, disable_dropout=True)
        trainer = GRPOTrainer(model_dir, reward, args, data, rollout_func=rollouts)
    else:
        args = FDPGConfig(**common, **options)
        target = {"name": "reward", "scorers": [reward], "beta": 1.0}
        trainer = FDPGTrainer(model_dir, args, data, target=target, rollout_func=rollouts)
    return ready(trainer)


def compare(divergence: Any, model_dir: str, rollouts: FixedRollouts, options: argparse.Namespace) -> dict[str, Any]:
    """Both trainers under one divergence."""
    with tempfile.TemporaryDirectory() as folder:
        ours = build("fdiv", model_dir, rollouts, options.length, folder, divergence=divergence)
        theirs = build("trl", model_dir, rollouts, options.length, folder)
        count = len(rollouts.completions)
        rows = [{"prompt": "a"}] * (count // 2) + [{"prompt": "b"}] * (count // 2)
        trainers = {"fdiv": ours, "trl": theirs}
        times = in_turns(trainers, dict.fromkeys(trainers, rows), options.pairs, options.log_every)
    found = ratio(times["fdiv"], times["trl"])
    total = sum(times["fdiv"]) / sum(times["trl"])  # with the steps that log at their full weight
    return {
        "divergence": divergence,
        "time_ratio": found["time_ratio"],
        "time_ratio_interval": found["time_ratio_interval"],
        "total_time_ratio": float(total),
        "step_seconds": {name: statistics.median(values) for name, values in times.items()},
        "pairs": options.pairs,
        "ratios": found["ratios"],
        "meets_goal": found["time_ratio"] <= TIME_GOAL,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--divergences", nargs="+", help="names, or JSON mappings; all when left out")
    parser.add_argument("--pairs", type=int, default=30, help="interleaved pairs of steps per divergence")
    parser.add_argument(
        "--completions", type=int, default=8, help="completions per step, half for each of two prompts"
    )
    parser.add_argument("--length", type=int, default=64, help="tokens per completion")
    parser.add_argument("--log_every", type=int, default=10)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "f_dpg_step_time.json"))
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
        rollouts = FixedRollouts(options.completions, options.length, 260)
        results = []
        for divergence in divergences:
            result = compare(divergence, model_dir, rollouts, options)
            results.append(result)
            low, high = result["time_ratio_interval"]
            print(
                f"{divergence!s:48} time {result['time_ratio']:.4f} [{low:.4f}, {high:.4f}]  "
                f"total {result['total_time_ratio']:.4f}  step {result['step_seconds']['trl']:.2f} s"
            )
    content = {
        "goal": {"time_ratio": TIME_GOAL},
        "settings": vars(options) | {"output": Path(options.output).name},
        "results": results,
        "environment": environment(shlex.join(["python", *sys.argv]), seed=0),
    }
    write_result(options.output, content)


if __name__ == "__main__":
    main()
