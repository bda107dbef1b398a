"""`fdiv replay`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fdiv.errors import FdivError, RequirementError
from fdiv.provenance import command_line
from fdiv.report.table import run_table
from fdiv.run.directory import AFTER_TRAINING
from fdiv.terminal import info

__all__ = ["replay"]

_OWN_WORDS = {
    "; continue it with --resume_from_checkpoint true, start again with --overwrite_output_dir true, or choose": (
        "; remove it, or choose"
    ),
    f"; {AFTER_TRAINING}, or": "; remove it, or",
    ", or replace it with --overwrite_output_dir true": "",
    "--output_dir": "--output",
}


def _in_own_words(line: str) -> str:
    """A line of `fdiv run` about its folder with the options of `fdiv replay`."""
    for theirs, own in _OWN_WORDS.items():
        line = line.replace(theirs, own)
    return line


def replay(args: argparse.Namespace, words: list[str]) -> int:
    """`fdiv replay RUN --without FILE …`."""
    from fdiv.run.replay import plan_replay
    from fdiv.run.replay import replay as carry_out

    made = plan_replay(Path(args.run), Path(args.without), None if args.output is None else Path(args.output))
    for line in made.lines():
        info(line)
    if args.dry_run:
        return 0
    try:
        result = carry_out(made, command_line(words))
    except FdivError as error:
        error.args = (_in_own_words(str(error)), *error.args[1:])
        raise
    if result is None:
        return 0
    run_table(result, made.output)
    if result["unmet_requirements"]:
        raise RequirementError("eval.require: " + "; ".join(result["unmet_requirements"]))
    return 0
