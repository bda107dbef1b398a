"""`fdiv replay`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fdiv.errors import RequirementError
from fdiv.provenance import command_line
from fdiv.report.table import run_table
from fdiv.terminal import info

__all__ = ["replay"]


def replay(args: argparse.Namespace, words: list[str]) -> int:
    """`fdiv replay RUN --without FILE …`."""
    from fdiv.run.replay import plan_replay
    from fdiv.run.replay import replay as carry_out

    made = plan_replay(Path(args.run), Path(args.without), None if args.output is None else Path(args.output))
    for line in made.lines():
        info(line)
    if args.dry_run:
        return 0
    result = carry_out(made, command_line(words))
    if result is None:
        return 0
    run_table(result, made.output)
    if result["unmet_requirements"]:
        raise RequirementError("eval.require: " + "; ".join(result["unmet_requirements"]))
    return 0
