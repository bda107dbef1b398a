"""Sample the reference n times per prompt, score, split the prompts into rehearsal and exploration, and cache one
verified sample with reference log-probabilities for each near-perfect prompt. Go on after a kill with the same
command; several processes: `torchrun --nproc_per_node N -m fdiv presample …`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per field of `PresampleConfig`, with its name and default."""
    from fdiv.rl.presample.config import PresampleConfig
    from fdiv.training.flags import add_flags

    add_flags(parser, PresampleConfig, required=("model", "dataset", "reward"))
    parser.add_argument("--output", required=True, metavar="DIR", help="new, or that of a run to go on with")
    parser.add_argument("--repartition", action="store_true", help="split the samples of a DIR that exists again")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="check, print the settings and stop")


def run(args: argparse.Namespace) -> int:
    """Run it, print the partition. Returns the exit code 0.

    Raises:
        RecipeError: an option outside its range.
        DataError, RolloutError: see `fdiv.rl.presample.run.presample`.
    """
    from fdiv.rl.presample.config import PresampleConfig
    from fdiv.training.flags import config_of

    config = config_of(PresampleConfig, args)
    if args.dry_run:
        return _dry_run(config, Path(args.output))
    from fdiv.rl.presample.run import presample
    from fdiv.terminal import info

    began = time.monotonic()
    content = presample(config, Path(args.output), repartition=args.repartition)
    show_partition(content)
    info(f"written: {args.output} ({time.monotonic() - began:.1f} s)")
    return 0


def _dry_run(config: Any, output: Path) -> int:
    import yaml

    from fdiv.rl.presample.data import load_prompts, load_reward
    from fdiv.terminal import is_main_process

    with closing(load_reward(config.reward)) as reward:
        rows = load_prompts(config, reward.scorer)
    if is_main_process():
        settings = {"output": str(output), **dataclasses.asdict(config)}
        sys.stdout.write(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        sys.stdout.write(f"# {len(rows)} prompts, {len(rows) * config.num_samples} samples\n")
    return 0


def show_partition(content: dict[str, Any]) -> None:
    """The partition as a table on stdout."""
    from fdiv.rows.report import RowReport
    from fdiv.terminal import print_table

    names = {
        "near_perfect": f"near-perfect (share of correct ≥ {content['threshold']} of {content['num_samples']})",
        "rehearsal": "rehearsed: verified samples in the cache",
        "rehearsed_and_explored": "  also explored",
        "moved_to_explore": "near-perfect without a correct verification sample: explored",
        "to_explore": "to explore",
        "wrong": "wrong (no correct sample)",
        "dropped": "  dropped",
        "explore": "explore set, all together",
    }
    rows = [
        (text, str(content["counts"][name]), f"{100 * content['shares'][name]:.1f} %") for name, text in names.items()
    ]
    tally = content["samples"]
    notes = [
        f"{tally['drawn']} samples: {tally['correct']} correct, {tally['unscored']} not scored, "
        f"{tally['truncated']} truncated, {tally['empty']} empty",
        f"{content['rehearsal_rows']} rows in the cache; prompts to rehearse without a verified sample: "
        f"{len(content['without_verified_sample'])}",
        *(f"warning: {line}" for line in content["coverage"]["warnings"]),
    ]
    notes.append(RowReport.of_record("prompts", content["rows"]["prompts"]).line())
    print_table(f"{content['counts']['prompts']} prompts", ("part", "prompts", "share"), rows, notes)
    kinds = content["coverage"]["kinds"]
    if kinds:
        lines = [
            (
                kind,
                *(str(row[name]) for name in ("prompts", "rehearsed", "rows", "explored")),
                f"{row['solve_rate']:.2f}",
            )
            for kind, row in kinds.items()
        ]
        print_table("by kind", ("kind", "prompts", "rehearsed", "rows", "explored", "solve rate"), lines, [])


command = PresampleCommand = sys.modules[__name__]  # names of release 0.1
