"""The processes an evaluation runs in."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import PartialState

__all__ = ["process_state"]


def process_state() -> PartialState:
    """accelerate's state: this process's index, the number of processes, the device.

    Without an accelerator, accelerate joins the processes of a launcher only when it is told to use the CPU;
    otherwise each would believe to be alone.
    """
    from accelerate import PartialState

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return PartialState(cpu=True) if several and not torch.accelerator.is_available() else PartialState()
