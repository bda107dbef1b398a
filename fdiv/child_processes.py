"""The processes that a process has started, also those that have left its group: a launcher's workers do."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

__all__ = ["descendants", "wait_until_gone"]


def descendants(pid: int) -> set[psutil.Process]:
    """The children of a process, theirs, and so on; none when the process is not there."""
    import psutil

    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def wait_until_gone(processes: Iterable[psutil.Process], seconds: float) -> set[psutil.Process]:
    """Wait until the processes have ended, at most so long; those that have not.

    One that has ended and that nobody has collected counts as gone: its parent may be gone before it, and not every
    container has an init process that collects.
    """
    ends = time.monotonic() + seconds
    left = {process for process in processes if _runs(process)}
    while left and time.monotonic() < ends:
        time.sleep(0.05)
        left = {process for process in left if _runs(process)}
    return left


def _runs(process: psutil.Process) -> bool:
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
