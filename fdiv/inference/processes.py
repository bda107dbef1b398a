"""The processes an evaluation runs in."""

from __future__ import annotations

import datetime
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from accelerate import PartialState

__all__ = ["SharedCount", "alone", "join_processes", "main_process_first", "process_state", "whole_models"]

_ALONE: list[SimpleNamespace] = []
_PATIENCE = datetime.timedelta(days=7)
_LOOK = 0.5
_EFFICIENT_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"
_counts = itertools.count()  # every process counts the same passes in the same order


def process_state() -> PartialState:
    """accelerate's state: this process's index, the number of processes, the device.

    Without an accelerator, accelerate joins the processes of a launcher only when it is told to use the CPU;
    otherwise each would believe to be alone.
    """
    if _ALONE:
        return _ALONE[-1]
    return _state()


def _state(**options: Any) -> PartialState:
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    on_cpu = several and (parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    return PartialState(cpu=True, **options) if on_cpu else PartialState(**options)


def join_processes() -> None:
    """Join the processes of a launcher for an evaluation, before anything else does.

    They may wait for each other for a week instead of torch's half an hour: shares of unequal work (long completions,
    slow tests of programs) end at unequal times, and the launcher ends all of them where one fails.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _state(timeout=_PATIENCE)


class SharedCount:
    """A number that all processes add to and each can read, without a collective call: how far a pass has come.

    Make one on every process, in the same order. With one process, or where torch.distributed has no store, it counts
    this process alone.
    """

    def __init__(self) -> None:
        self._store: Any = None
        self._own = 0
        if process_state().num_processes > 1:
            self._key = f"fdiv/count/{next(_counts)}"
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                self._store = torch.distributed.distributed_c10d._get_default_store()

    @property
    def shared(self) -> bool:
        """Whether other processes are counted too."""
        return self._store is not None

    def add(self, number: int) -> int:
        """Add `number`, 0 to read; the sum over all processes."""
        self._own += number
        return self._own if self._store is None else int(self._store.add(self._key, number))


@contextmanager
def main_process_first() -> Iterator[None]:
    """The main process runs the body before the others do, however long that takes.

    accelerate's context of this name waits in a collective call, which ends the waiting processes when the time of the
    group is up: half an hour, or what `ddp_timeout` says.
    """
    ended, state = SharedCount(), process_state()
    if not ended.shared:  # one process, or no store to look into
        with state.main_process_first() if state.num_processes > 1 else nullcontext():
            yield
        return
    while not state.is_main_process and not ended.add(0):
        time.sleep(_LOOK)
    yield
    if state.is_main_process:
        ended.add(1)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, `process_state()` is that of a single process on this one's device, and loaded models are whole.

    For an evaluation or a generation that the main process does while the others wait. A stock trainer inside still
    finds the group: what trains runs in a process of its own (`fdiv.run.build`).
    """
    state = SimpleNamespace(
        device=process_state().device,
        num_processes=1,
        process_index=0,
        is_main_process=True,
        wait_for_everyone=lambda: None,
    )
    _ALONE.append(state)
    try:
        with whole_models():
            yield
    finally:
        _ALONE.remove(state)


@contextmanager
def whole_models() -> Iterator[None]:
    """Models that are built or loaded inside are whole on every process, also beside a training that shards its own.

    Under ZeRO-3 transformers shards whatever it loads, and under FSDP with efficient loading it may leave the weights
    of the other processes to what the first one sends. Nothing would gather or send those of a model that is not
    trained.
    """
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    active = reference() if reference is not None else None
    efficient = os.environ.pop(_EFFICIENT_LOADING, None)
    if active is not None:
        deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if active is not None:
            deepspeed.set_hf_deepspeed_config(active)
        if efficient is not None:
            os.environ[_EFFICIENT_LOADING] = efficient
