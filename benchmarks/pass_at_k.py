"""Pass@k from an array of counts against a `math.comb` loop, in one run.

    python -m benchmarks.pass_at_k            # prints the ratio, writes benchmarks/results/pass_at_k.json

10,000 problems × 256 samples × every k up to 128, values per problem; no bootstrap on either side. The loop is the
formula as written, 1 − C(n−c, k)/C(n, k), with Python's exact integers.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np

from fdiv.eval.pass_at_k.metrics import pass_at_k
from fdiv.provenance import command_line, environment


def loop(correct: list[int], samples: int, largest: int) -> list[list[float]]:
    """The formula, problem by problem and k by k."""
    return [[1.0 - math.comb(samples - c, k) / math.comb(samples, k) for k in range(1, largest + 1)] for c in correct]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--largest", type=int, default=128, help="every k up to this")
    parser.add_argument("--repeats", type=int, default=9, help="of the array side; its median counts")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "pass_at_k.json")
    args = parser.parse_args()
    correct = np.random.default_rng(0).integers(0, args.samples + 1, args.problems)
    ks = list(range(1, args.largest + 1))
    times = []
    for _ in range(args.repeats):
        began = time.process_time()
        table = pass_at_k(correct, args.samples, ks)
        times.append(time.process_time() - began)
    began = time.process_time()
    expected = np.array(loop(correct.tolist(), args.samples, args.largest))
    loop_seconds = time.process_time() - began
    ours = statistics.median(times)
    report = {
        "problems": args.problems,
        "samples": args.samples,
        "largest_k": args.largest,
        "array_seconds": ours,
        "array_seconds_all": times,
        "loop_seconds": loop_seconds,
        "ratio": loop_seconds / ours,
        "largest_difference": float(np.abs(table - expected).max()),
        "clock": "CPU time of the process",
        "environment": environment(command_line(["-m", "benchmarks.pass_at_k"]).replace("fdiv", "python", 1)),
    }
    print(f"array {1e3 * ours:.1f} ms, loop {loop_seconds:.2f} s, ratio {report['ratio']:.0f}, ", end="")
    print(f"largest difference {report['largest_difference']:.1e}")
    args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
