"""What a case is, what can become of one, and what a kind of input has to offer."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from tests.fuzz.world import World

__all__ = ["FAULTS", "VERDICTS", "Edit", "Kind", "Outcome", "Unavailable"]

FAULTS = ("traceback", "hang", "silent", "lost", "escape", "long")
"""`traceback`: an exception that no one made a message of. `hang`: no answer in time. `silent`: damage was accepted, or
a command failed without a word. `lost`: finished work was lost, or is another. `escape`: foreign code ran, or a wrong
program was called right. `long`: a message of more than ten lines."""
VERDICTS = ("ok", "refused", *FAULTS)
"""`refused`: one clear line and an exit code that is not 0."""

Edit = tuple[Any, ...]
"""One thing that is done to a valid input; of plain values, so that it can be printed."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Args:
        verdict: one of `VERDICTS`.
        reason: in a few words; faults with one reason are one fault.
        message: what the command said.
    """

    verdict: str
    reason: str = ""
    message: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether the driver reports it."""
        return self.verdict in FAULTS

    @property
    def signature(self) -> tuple[str, str]:
        """Equal for outcomes of one cause: the reason without numbers, paths and quoted values."""
        return self.verdict, re.sub(r"'[^']*'|\"[^\"]*\"|/\S+|-?\d[\d.e+]*", "…", self.reason)


class Unavailable(Exception):
    """A kind cannot be tried on this machine; says why."""


class Kind:
    """One kind of input.

    Args:
        world: where valid inputs stand.
    """

    name: ClassVar[str]
    what: ClassVar[str]
    """One line for the table."""
    few: ClassVar[int] = 20
    """Cases of a short run."""

    def __init__(self, world: World) -> None:
        self.world = world

    def members(self, rng: random.Random) -> list[Edit]:
        """What is done to a valid input."""
        raise NotImplementedError

    def judge(self, edits: list[Edit], folder: Path) -> Outcome:
        """Do it in an empty folder, run the command, and say what became of it."""
        raise NotImplementedError
