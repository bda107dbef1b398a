"""Processor time of the commands that load nothing: `fdiv run … --dry_run` beside importing the TRL config that its
method extends, and the listings, all in one run and in turns.

    python -m benchmarks.dry_run
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

RECIPES = {"tiny/f_dpo": "DPOConfig", "tiny/dph": "GRPOConfig", "tiny/flat": "SFTConfig"}
LISTINGS = (
    ["--help"],
    ["run", "--help"],
    ["divergences"],
    ["methods"],
    ["recipes"],
    ["recipes", "tofu/mini/npo"],
    ["models"],
)
LIMITS = {"dry_run_above_import_s": 1.5, "listing_s": 1.0}


def processor_seconds(words: list[str]) -> float:
    """User and system time of a Python process with these arguments."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, *words], check=True, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="of every command; the median is reported")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "dry_run.json")
    args = parser.parse_args()
    commands = {f"import {config}": ["-c", f"from trl import {config}"] for config in dict.fromkeys(RECIPES.values())}
    commands |= {f"fdiv run {recipe} --dry_run": ["-m", "fdiv", "run", recipe, "--dry_run"] for recipe in RECIPES}
    commands |= {" ".join(["fdiv", *words]): ["-m", "fdiv", *words] for words in LISTINGS}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(args.turns + 1):
        for name, words in commands.items():
            seconds = processor_seconds(words)
            if turn:  # the first fills the caches of the disk
                times[name].append(seconds)
    medians = {name: statistics.median(found) for name, found in times.items()}
    above = {}
    for recipe, config in RECIPES.items():
        pairs = zip(times[f"fdiv run {recipe} --dry_run"], times[f"import {config}"], strict=True)
        above[recipe] = statistics.median(run - imported for run, imported in pairs)
    report = {
        "command": "python -m benchmarks.dry_run",
        "turns": args.turns,
        "machine": f"{platform.machine()}, {platform.system()}, CPU",
        "unit": "seconds of processor time, medians",
        "limits": LIMITS,
        "dry_run_above_import_s": {recipe: round(value, 3) for recipe, value in above.items()},
        "processor_s": {name: round(value, 3) for name, value in medians.items()},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for name, value in medians.items():
        print(f"{name:40s} {value:7.2f} s")
    for recipe, value in above.items():
        print(f"{recipe:40s} {value:7.2f} s above the import")


if __name__ == "__main__":
    main()
