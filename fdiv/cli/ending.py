"""How a process ends that may be one of several."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

__all__ = ["exit_after"]


def exit_after(main: Callable[[], int | None]) -> NoReturn:
    """Run `main`, and end this process with the exit code it returns (None is 0).

    A process that took part in a process group ends after its `atexit` functions without taking the interpreter down.
    A thread of gloo may still hold a tensor then, needs the interpreter to let go of it, and aborts the process at the
    very end, with all work done (pytorch pull request 179291, not merged); the launcher would call the run failed.
    Destroying the group is not enough: DeepSpeed keeps a reference to it. An error that leaves `main` ends the process
    as ever.
    """
    codes: list[int] = []
    atexit.register(_leave, codes)  # functions run in reverse: those that the run registers come before it
    codes.append(main() or 0)
    sys.exit(codes[0])


def _leave(codes: list[int]) -> None:
    distributed = sys.modules.get("torch.distributed")
    joined = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if not joined or not codes:
        return
    try:  # what the functions that were registered before would have done
        for child in multiprocessing.active_children():
            if child.daemon:
                child.terminate()
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # a closed pipe, a full disk
                stream.flush()
    finally:
        os._exit(codes[0])
