"""A DPH-RL step against the same rows with a live reference: time and peak memory, as ratios.

    python -m benchmarks.dph_step [--pairs 20] [--output FILE]

Three trainers get the same recorded completions and the same rehearsal rows, so sampling costs none of them anything:

* cached: `DPHTrainer` unchanged. Reference log-probabilities of the rehearsal rows come from the cache.
* live: a reference model in memory scores every row, rollouts and rehearsal, in each step (GRPO's KL penalty k3 on the
  rollouts, the rehearsal term on live scores).
* live_rehearsal: a reference model scores the rehearsal rows only.

What is timed is the rest of a step: reward, scoring, forward and backward of the policy, clipping, AdamW, and a log
every `--log_every` steps. The kinds take turns in changing order; a ratio is the median over the rounds, with a 95 %
bootstrap interval. Memory is the peak resident set of a process of its own per kind, the least of `--memory_repeats`.
"""

from __future__ import annotations

import argparse
import json
import math
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

from benchmarks.timing import FixedRollouts, in_turns, ratio, ready, reward, step, write_result

TIME_GOAL = 0.85
KINDS = ("cached", "live", "live_rehearsal")
_VOCABULARY = 260


def rehearsal_cache(model_dir: str, rows: int, length: int, prompt_length: int | None = None) -> Any:
    """`rows` random completions under random prompts; their log-probabilities are made up, as only time matters."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fdiv.models.fingerprints import tokenizer_fingerprint, weights_fingerprint
    from fdiv.rl.dph.rehearsal import RehearsalCache, RehearsalHeader, RehearsalRow

    generator = torch.Generator().manual_seed(1)

    def drawn(count: int) -> list[int]:
        return torch.randint(4, _VOCABULARY, (count,), generator=generator).tolist()

    header = RehearsalHeader(
        tokenizer=tokenizer_fingerprint(AutoTokenizer.from_pretrained(model_dir)),
        model=weights_fingerprint(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)),
        temperature=1.0,
    )
    log_probs = [-math.log(_VOCABULARY)] * length
    before = length // 2 if prompt_length is None else prompt_length
    made = [RehearsalRow("a", drawn(before), drawn(length), log_probs, number) for number in range(rows)]
    return RehearsalCache(header, made)


def build(kind: str, model_dir: str, options: argparse.Namespace, folder: str) -> Any:
    """A trainer of `kind`, with optimizer and schedule, ready to step."""
    from datasets import Dataset

    from fdiv.models.reference import Reference
    from fdiv.rl import DPHConfig, DPHTrainer

    class LiveReferenceTrainer(DPHTrainer):
        """Rehearsal rows are scored by a reference model in each step instead of being looked up."""

        def _next_rows(self):
            rows = super()._next_rows()
            batch = rows._asdict()
            with torch.no_grad(), self.live_reference.active() as model:
                return rows._replace(reference_log_probs=self._score(model, batch))

    count = options.completions
    args = DPHConfig(
        folder, per_device_train_batch_size=count, num_generations=count // 2, learning_rate=1e-5,
        max_completion_length=options.length, bf16=False, use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False, report_to=[], disable_tqdm=True, divergence="jensen_shannon",
        rehearsal_batch_size=options.rows, kl="k3_loss" if kind == "live" else None,
    )  # fmt: skip
    trainer = (DPHTrainer if kind == "cached" else LiveReferenceTrainer)(
        model_dir, args, Dataset.from_dict({"prompt": ["a", "b"]}), reward_funcs=reward,
        rehearsal=rehearsal_cache(model_dir, options.rows, options.length),
        rollout_func=FixedRollouts(count, options.length, _VOCABULARY),
    )  # fmt: skip
    if kind != "cached":
        trainer.live_reference = trainer.reference or Reference(trainer)
    return ready(trainer)


def rows_of(count: int) -> list[dict[str, str]]:
    return [{"prompt": "a"}] * (count // 2) + [{"prompt": "b"}] * (count // 2)


# ---------------------------------------------------------------- time
def measure_time(model_dir: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step of the three kinds, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {kind: build(kind, model_dir, options, folder) for kind in KINDS}
        rows = rows_of(options.completions)
        seconds = in_turns(trainers, dict.fromkeys(trainers, rows), options.pairs, options.log_every)
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    ratios = {f"cached_to_{kind}": ratio(seconds["cached"], seconds[kind]) for kind in KINDS[1:]}
    return {"step_seconds": medians, **ratios}


# ---------------------------------------------------------------- memory
def peak_memory(kind: str, model_dir: str, options: argparse.Namespace) -> dict[str, int]:
    """Peak resident set of this process after three steps, and the bytes of the models it holds."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(kind, model_dir, options, folder)
        for _ in range(3):
            step(trainer, rows_of(options.completions))
    models = [trainer.model] if kind == "cached" else [trainer.model, trainer.live_reference.model]
    held = [sum(p.numel() * p.element_size() for p in model.parameters()) for model in models]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_bytes": peak, "policy_bytes": held[0], "reference_bytes": sum(held[1:])}


def measure_memory(model_dir: str, options: argparse.Namespace) -> dict[str, Any]:
    """`peak_memory` of each kind in processes of its own; the least peak of the repeats."""
    results: dict[str, Any] = {}
    for _ in range(options.memory_repeats):
        for kind in KINDS:
            command = [sys.executable, "-m", "benchmarks.dph_step", "--memory_of", kind, "--model_dir", model_dir]
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
    for kind in KINDS[1:]:
        live = results[kind]
        live["saved_bytes"] = live["peak_bytes"] - results["cached"]["peak_bytes"]
        live["cached_to_this"] = results["cached"]["peak_bytes"] / live["peak_bytes"]
        live["saved_over_reference_weights"] = live["saved_bytes"] / live["reference_bytes"]
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
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "dph_step.json"))
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
    for kind in KINDS[1:]:
        found = times[f"cached_to_{kind}"]
        low, high = found["time_ratio_interval"]
        print(
            f"cached / {kind:14} time {found['time_ratio']:.4f} [{low:.4f}, {high:.4f}]  "
            f"memory {memory[kind]['cached_to_this']:.4f}, "
            f"saved {memory[kind]['saved_over_reference_weights']:.3f} x the reference's weights"
        )
    hidden = ("output", "memory_of", "model_dir")
    content = {
        "goal": {"time_ratio": TIME_GOAL, "saved_over_reference_weights": 1.0},
        "meets_time_goal": times["cached_to_live"]["time_ratio"] <= TIME_GOAL,
        "meets_memory_goal": memory["live"]["saved_over_reference_weights"] >= 1.0,
        "settings": {name: value for name, value in vars(options).items() if name not in hidden},
        "time": times,
        "memory": memory,
        "environment": environment(shlex.join(["python", *sys.argv]), seed=0),
    }
    write_result(options.output, content)


if __name__ == "__main__":
    main()
