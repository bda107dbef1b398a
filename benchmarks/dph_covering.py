"""DPH-RL with a cache that covers against GRPO with a live reference, and what counting Pass@k costs: as ratios.

    python -m benchmarks.dph_covering [--pairs 20] [--output FILE]

Three trainers get the same recorded completions, so sampling costs none of them anything:

* covering: `DPHTrainer` with a cache of eight weighted samples for each of 16 prompts, of which it rehearses `--rows`
  a step; groups are counted (`group/pass@k`, `group/modes`), no reference model is in memory.
* grpo: the same trainer without rehearsal, with the k3 penalty of a live reference on the rollouts.
* uncounted: `covering` without the counts of the groups.

What is timed, and how the kinds take turns: see `benchmarks.timing`. Memory is the peak resident set of a process of
its own per kind, the least of `--memory_repeats`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.dph_step import rehearsal_cache, rows_of
from benchmarks.timing import FixedRollouts, in_turns, ratio, ready, step, write_result

TIME_GOAL, COUNTING_GOAL = 0.9, 1.02
KINDS = ("covering", "grpo", "uncounted")
PROMPTS, SAMPLES, VOCABULARY = 16, 8, 260


def correct(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """1 or 0, so that the groups have a Pass@k."""
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


def covering_cache(model_dir: str, length: int) -> Any:
    """`SAMPLES` rows for each of `PROMPTS` prompts, all prompts weighing the same."""
    cache = rehearsal_cache(model_dir, PROMPTS * SAMPLES, length)
    first = cache.rows[::SAMPLES]
    cache.rows[:] = [
        row._replace(prompt_ids=first[number // SAMPLES].prompt_ids, index=number // SAMPLES, weight=1.0)
        for number, row in enumerate(cache.rows)
    ]
    return cache


def build(kind: str, model_dir: str, options: argparse.Namespace, folder: str) -> Any:
    """A trainer of `kind`, with optimizer and schedule, ready to step."""
    from datasets import Dataset

    from fdiv.rl import DPHConfig, DPHTrainer

    class Uncounted(DPHTrainer):
        """Leaves the groups uncounted."""

        def _record_groups(self, completions, mode):
            pass

    count = options.completions
    args = DPHConfig(
        folder, per_device_train_batch_size=count, num_generations=count // 2, learning_rate=1e-5,
        max_completion_length=options.length, bf16=False, use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False, report_to=[], disable_tqdm=True, divergence="jensen_shannon",
        rehearsal_batch_size=options.rows, kl="k3_loss" if kind == "grpo" else None, mode="text",
    )  # fmt: skip
    trainer = (Uncounted if kind == "uncounted" else DPHTrainer)(
        model_dir, args, Dataset.from_dict({"prompt": ["a", "b"]}), reward_funcs=correct,
        rehearsal=None if kind == "grpo" else covering_cache(model_dir, options.length),
        rollout_func=FixedRollouts(count, options.length, VOCABULARY),
    )  # fmt: skip
    return ready(trainer)


def measure_time(model_dir: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step of the three kinds, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {kind: build(kind, model_dir, options, folder) for kind in KINDS}
        rows = rows_of(options.completions)
        seconds = in_turns(trainers, dict.fromkeys(trainers, rows), options.pairs, options.log_every)
    return {
        "step_seconds": {kind: statistics.median(values) for kind, values in seconds.items()},
        "covering_to_grpo": ratio(seconds["covering"], seconds["grpo"]),
        "counted_to_uncounted": ratio(seconds["covering"], seconds["uncounted"]),
    }


def peak_memory(kind: str, model_dir: str, options: argparse.Namespace) -> dict[str, int]:
    """Peak resident set of this process after three steps, and the bytes of the models it holds."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(kind, model_dir, options, folder)
        for _ in range(3):
            step(trainer, rows_of(options.completions))
    models = [trainer.model] + ([] if trainer.reference is None else [trainer.reference.model])
    held = [sum(p.numel() * p.element_size() for p in model.parameters()) for model in models]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_bytes": peak, "policy_bytes": held[0], "reference_bytes": sum(held[1:])}


def measure_memory(model_dir: str, options: argparse.Namespace) -> dict[str, Any]:
    """`peak_memory` of two kinds in processes of their own; the least peak of the repeats."""
    results: dict[str, Any] = {}
    for _ in range(options.memory_repeats):
        for kind in KINDS[:2]:
            command = [sys.executable, "-m", "benchmarks.dph_covering", "--memory_of", kind, "--model_dir", model_dir]
            for name in ("completions", "rows", "length"):
                command += [f"--{name}", str(getattr(options, name))]
            # One arena and a fixed threshold: what is freed goes back, so that the peak is that of live tensors.
            environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
            found = json.loads(done.stdout.strip().splitlines()[-1])
            if kind not in results or found["peak_bytes"] < results[kind]["peak_bytes"]:
                results[kind] = found
    saved = results["grpo"]["peak_bytes"] - results["covering"]["peak_bytes"]
    results["saved_over_reference_weights"] = saved / results["grpo"]["reference_bytes"]
    return results


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="rounds; each kind steps once in a round")
    parser.add_argument("--completions", type=int, default=16, help="rollouts per step, half for each of two prompts")
    parser.add_argument("--rows", type=int, default=2, help="rehearsal rows per step (the release: an eighth)")
    parser.add_argument("--length", type=int, default=64, help="tokens per completion; prompts have half as many")
    parser.add_argument("--log_every", type=int, default=10)
    parser.add_argument("--memory_repeats", type=int, default=2)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "dph_covering.json"))
    parser.add_argument("--memory_of", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--model_dir", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.memory_of:
        print(json.dumps(peak_memory(options.memory_of, options.model_dir, options)))
        return
    from fdiv.models.tiny import build_tiny_model
    from fdiv.provenance import environment

    with tempfile.TemporaryDirectory() as folder:
        model_dir = str(
            build_tiny_model(
                f"{folder}/model", hidden_size=options.hidden_size, layers=options.layers, head_dim=64,
                max_positions=4 * options.length,
            )
        )  # fmt: skip
        memory, times = measure_memory(model_dir, options), measure_time(model_dir, options)
    for name in ("covering_to_grpo", "counted_to_uncounted"):
        low, high = times[name]["time_ratio_interval"]
        print(f"{name:22} {times[name]['time_ratio']:.4f} [{low:.4f}, {high:.4f}]")
    print(f"memory saved: {memory['saved_over_reference_weights']:.3f} x the reference's weights")
    hidden = ("output", "memory_of", "model_dir")
    content = {
        "goal": {
            "covering_to_grpo": TIME_GOAL, "counted_to_uncounted": COUNTING_GOAL, "saved_over_reference_weights": 1.0,
        },
        "settings": {name: value for name, value in vars(options).items() if name not in hidden},
        "time": times,
        "memory": memory,
        "environment": environment(shlex.join(["python", *sys.argv]), seed=0),
    }  # fmt: skip
    write_result(options.output, content)


if __name__ == "__main__":
    main()
