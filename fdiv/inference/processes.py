"""The processes an evaluation runs in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import PartialState

__all__ = ["alone", "process_state"]

_ALONE: list[SimpleNamespace] = []


def process_state() -> PartialState:
    """accelerate's state: this process's index, the number of processes, the device.

    Without an accelerator, accelerate joins the processes of a launcher only when it is told to use the CPU;
    otherwise each would believe to be alone.
    """
    if _ALONE:
        return _ALONE[-1]
    from accelerate import PartialState

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return PartialState(cpu=True) if several and not torch.accelerator.is_available() else PartialState()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, `process_state()` is that of a single process on this one's device: for work that the main process does
    while the others wait, where a collective call would hang."""
    device = process_state().device
    state = SimpleNamespace(
        device=device, num_processes=1, process_index=0, is_main_process=True, wait_for_everyone=lambda: None
    )
    _ALONE.append(state)
    try:
        yield
    finally:
        _ALONE.remove(state)
