"""Run by test_presample_resume.py, alone or under torchrun: pre-sampling that is killed after so many stored batches,
in the middle of writing the next."""

from __future__ import annotations

import json
import os
import signal
import sys

from fdiv.inference.cache import ItemCache
from fdiv.rl.presample.config import PresampleConfig
from fdiv.rl.presample.run import presample

stored = 0
add = ItemCache.add


def add_or_die(self, items):
    global stored
    if stored == kill_after:
        with self._file.open("a", encoding="utf-8") as file:
            file.write('{"key": "0/0", "id')
        os.kill(os.getpid(), signal.SIGKILL)
    stored += 1
    add(self, items)


if __name__ == "__main__":
    settings, output, kill_after = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    if kill_after >= 0:
        ItemCache.add = add_or_die
    presample(PresampleConfig(**settings), output)
