"""Read given completions with a teacher once, and keep the k most likely tokens of each distribution with the mass of
the rest, so that `teacher: {name: cache, path: DIR}` trains a student with no teacher in memory. Go on after a kill
with the same command; several processes: `torchrun --nproc_per_node N -m fdiv teach …`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per field of `TeachConfig`, with its name and default."""
    from fdiv.distillation.teach.config import TeachConfig
    from fdiv.training.flags import add_flags

    add_flags(parser, TeachConfig, required=("model", "dataset"))
    parser.add_argument("--output", required=True, metavar="DIR", help="new, or that of a run to go on with")
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="check, print settings, size and time, and stop"
    )


def run(args: argparse.Namespace) -> int:
    """Run it, print the counts and the share. Returns the exit code 0.

    Raises:
        RecipeError: an option outside its range.
        DataError, RolloutError: see `fdiv.distillation.teach.run.teach`.
    """
    from fdiv.distillation.teach.config import TeachConfig
    from fdiv.training.flags import config_of

    config = config_of(TeachConfig, args)
    if args.dry_run:
        return _dry_run(config, Path(args.output))
    from fdiv.distillation.teach.run import teach
    from fdiv.terminal import binary_size, info

    began = time.monotonic()
    content = teach(config, Path(args.output))
    counts = content["counts"]
    info(
        f"{counts['rows']} rows, {counts['tokens']} tokens, {binary_size(counts['bytes'])}, "
        f"{content['bytes_per_token']:.0f} bytes a token"
    )
    show_share(content)
    info(f"written: {args.output} ({time.monotonic() - began:.1f} s)")
    return 0


def show_share(content: dict[str, Any]) -> None:
    """The share that the top k holds, per divergence, as a table on stdout."""
    from fdiv.distillation.teach.share import share_table
    from fdiv.terminal import print_table

    if content["share"] is not None:
        title, columns, rows = share_table(content["share"])
        student = content["share"]["student"]
        print_table(title, columns, rows, [f"a lower bound that grows with k; between the teacher and {student}"])


def _dry_run(config: Any, output: Path) -> int:
    import yaml

    from fdiv.distillation.teach.run import estimate, make_source, plan_teaching
    from fdiv.terminal import binary_size, is_main_process

    plan = plan_teaching(config)
    seconds = estimate(plan, make_source(plan))
    if is_main_process():
        settings = {"output": str(output), **dataclasses.asdict(config)}
        sys.stdout.write(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        shown = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
        sys.stdout.write(
            f"# {len(plan.taught.rows)} rows, {plan.tokens} tokens: {binary_size(plan.size)} in {len(plan.parts)} "
            f"parts, about {shown} (by one batch)\n"
        )
    return 0
