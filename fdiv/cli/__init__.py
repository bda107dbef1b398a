"""The command line, `fdiv VERB …`; also `python -m fdiv` and `accelerate launch -m fdiv`."""

from fdiv.cli.command import main

__all__ = ["main"]
