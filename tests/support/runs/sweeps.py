"""A sweep in one of several processes, for tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["swept"]


def swept(words: list[str], folder: str, alone: str | None = None) -> None:
    """`fdiv WORDS`; `folder/trained.RANK` gets the cells that this process trained, `folder/code.RANK` the exit code.

    Args:
        words: the command. folder: see above. alone: the cell in which the main process fails, and no other does.
    """
    from fdiv.cli import main
    from fdiv.errors import FdivError
    from fdiv.run import run, sweep

    rank, train = os.environ["RANK"], run._train

    def written(plan, *arguments):
        name = plan.output_dir.name
        if rank == "0" and name == alone:
            raise FdivError("the disk is full")
        with Path(folder, f"trained.{rank}").open("a") as file:
            file.write(f"{name}\n")
        train(plan, *arguments)

    run._train, sweep._GIVING_UP = written, 60.0 if alone is None else 1.0
    code = main(words)
    Path(folder, f"code.{rank}").write_text(str(code))
    sys.exit(0 if alone is None else code)
