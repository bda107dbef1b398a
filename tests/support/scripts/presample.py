"""Run by test_presample_resume.py in processes of its own: pre-sampling that is killed after a number of stored batches, in the
middle of writing the next."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from fdiv.inference.cache import ItemCache
from fdiv.rl.presample.config import PresampleConfig
from fdiv.rl.presample.run import presample


def main(settings: dict[str, Any], output: Path, kill_after: int | None) -> None:
    stored, add = 0, ItemCache.add

    def add_or_die(self, items):
        nonlocal stored
        if stored == kill_after:
            with self._file.open("a", encoding="utf-8") as file:
                file.write('{"key": "0/0", "id')
            os.kill(os.getpid(), signal.SIGKILL)
        stored += 1
        add(self, items)

    ItemCache.add = add_or_die
    presample(PresampleConfig(**settings), output)
