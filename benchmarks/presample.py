"""Throughput of pre-sampling, and which share of it is verification.

    python -m benchmarks.presample [--prompts 64] [--samples 16] [--output FILE]

`fdiv presample` on arithmetic problems with a small random Llama: samples per second, and the share of the time that
sampling, verification (exact arithmetic in this process; the code, SQL and mathematics rewards have `reward_pool`),
scoring by the reference, and all else take. The shares of one run are what is to be read; seconds are this machine's.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.timing import write_result


@contextmanager
def timed(owner: Any, name: str, seconds: dict[str, float], part: str) -> Iterator[None]:
    """`owner.name` with its time added to `seconds[part]`."""
    inner: Callable[..., Any] = getattr(owner, name)

    def outer(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            seconds[part] += time.perf_counter() - began

    with patch.object(owner, name, outer):
        yield


def one_run(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds by part of one pre-sampling, and how many samples it drew."""
    from fdiv.inference.backends import TransformersSource
    from fdiv.rl.presample import run
    from fdiv.rl.presample.config import PresampleConfig

    seconds: dict[str, float] = defaultdict(float)
    config = PresampleConfig(
        model=str(folder / "task" / "model"), dataset=str(folder / "task" / "data"), split="train",
        reward="fdiv.recipes.tasks.arithmetic:arithmetic_reward", num_samples=options.samples, threshold="1/8",
        samples_per_prompt=min(8, options.samples), mode="expression", keep="solved",
        max_completion_length=14, batch_size=512, allow_empty=True,
    )  # fmt: skip
    with ExitStack() as parts, tempfile.TemporaryDirectory() as output:
        parts.enter_context(timed(TransformersSource, "draw", seconds, "sampling"))
        parts.enter_context(timed(run._Run, "_score", seconds, "verification"))
        parts.enter_context(timed(run, "reference_log_probs", seconds, "reference scores"))
        began = time.perf_counter()
        run.presample(config, output)
        seconds["all"] = time.perf_counter() - began
        lines = (Path(output) / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return dict(seconds) | {"samples": float(len(lines))}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16, help="samples a prompt")
    parser.add_argument("--steps", type=int, default=200, help="training steps of the model that is sampled")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "presample.json"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    from fdiv.provenance import environment
    from fdiv.recipes.tasks.arithmetic import ArithmeticTaskConfig

    with tempfile.TemporaryDirectory() as folder:
        ArithmeticTaskConfig(
            counts=[3], largest_number=9, train_problems=options.prompts, test_problems=8, steps=options.steps
        ).build(Path(folder) / "task")
        runs = [one_run(Path(folder), options) for _ in range(options.repeats)]
    parts = ("sampling", "verification", "reference scores")
    shares = {part: statistics.median(run.get(part, 0.0) / run["all"] for run in runs) for part in parts}
    shares["all else"] = 1.0 - sum(shares.values())
    rate = statistics.median(run["samples"] / run["all"] for run in runs)
    print(f"{rate:.0f} samples per second;", ", ".join(f"{part} {share:.1%}" for part, share in shares.items()))
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    write_result(
        options.output,
        {
            "settings": settings,
            "samples_per_second": rate,
            "shares": shares,
            "runs": runs,
            "environment": environment(shlex.join(["python", *sys.argv]), seed=0),
        },
    )


if __name__ == "__main__":
    main()
