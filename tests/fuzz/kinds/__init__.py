"""The kinds of input: one module each."""

from __future__ import annotations

from tests.fuzz.case import Kind
from tests.fuzz.kinds.caches import Caches
from tests.fuzz.kinds.checkpoints import Checkpoints
from tests.fuzz.kinds.command_lines import CommandLines
from tests.fuzz.kinds.kills import Kills
from tests.fuzz.kinds.logs import Logs
from tests.fuzz.kinds.programs import Programs
from tests.fuzz.kinds.recipes import Recipes
from tests.fuzz.kinds.rows import Rows
from tests.fuzz.kinds.values import Values

__all__ = ["KINDS"]

KINDS: tuple[type[Kind], ...] = (*(Recipes, Values, CommandLines, Rows, Logs, Caches, Checkpoints, Kills, Programs),)
