"""One pass over many texts: sorted by length, shared among processes, resumable, in an order that does not matter."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from fdiv.errors import DataError
from fdiv.inference.cache import ItemCache
from fdiv.inference.processes import SharedCount, process_state
from fdiv.terminal import info

__all__ = ["collective_forward", "cut_batches", "run_batches"]


class _Unit(Protocol):
    """What is computed together: `rows` rows of a batch that give one result per key; groups never share a batch."""

    @property
    def keys(self) -> tuple[str, ...]: ...
    @property
    def group(self) -> str: ...
    @property
    def length(self) -> int: ...
    @property
    def rows(self) -> int: ...


_LOOK = 0.2  # seconds between two looks at how far the others have come

U = TypeVar("U", bound=_Unit)


def collective_forward() -> bool:
    """Whether every process must run the same forwards in step, because parameters are sharded (ZeRO-3, FSDP)."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")


def cut_batches(units: Sequence[U], batch_size: int) -> list[list[U]]:
    """Batches of at most `batch_size` rows (a larger unit stands alone), group by group, longest first."""
    batches: list[list[U]] = []
    rows = 0
    for unit in sorted(units, key=lambda u: (u.group, -u.length, u.keys)):
        if not batches or rows + unit.rows > batch_size or batches[-1][0].group != unit.group:
            batches.append([])
            rows = 0
        batches[-1].append(unit)
        rows += unit.rows
    return batches


def run_batches(
    units: Sequence[U],
    compute: Callable[[list[U]], list[dict[str, Any]]],
    *,
    batch_size: int,
    cache: ItemCache,
    title: str = "evaluating",
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Compute every unit not in the cache yet and return all results by key, the same on every process.

    Batches are cut from the list sorted by (group, length, key), whatever the number of processes, and the i-th
    pending batch goes to process i mod n. So results depend on neither the order of the units nor the number of
    processes, and on the batch size only through floating-point rounding.

    Args:
        units: with unique keys.
        compute: one batch in, one result per key out, each with its `key`.
        batch_size: rows of a batch.
        cache: where finished items are looked up and stored.
        title: shown beside the progress bar, which is the main process's and counts the batches of all.
        progress: False: no bar.
    """
    from accelerate.utils import gather_object
    from rich.progress import Progress

    if batch_size < 1:
        raise DataError(f"batch_size={batch_size}: must be at least 1")
    keys = [key for unit in units for key in unit.keys]
    if len(set(keys)) != len(keys):
        raise ValueError(f"{title}: request keys are not unique")
    state = process_state()
    pending = [
        b for b in cut_batches(units, batch_size) if any(key not in cache.items for unit in b for key in unit.keys)
    ]
    state.wait_for_everyone()  # everybody has read the cache before anybody appends
    own = pending[state.process_index :: state.num_processes]
    steps = -(-len(pending) // state.num_processes) if collective_forward() else len(own)
    count = SharedCount()
    if 0 < len(pending) < state.num_processes and progress:
        idle = state.num_processes - len(pending)
        said = f"{len(pending)} {'batches' if len(pending) > 1 else 'batch'} for {state.num_processes} processes"
        info(f"{title}: {said}, so {idle} of them wait; batches of fewer rows are shared by more")
    with Progress(disable=not progress or not state.is_main_process, transient=True) as bar:
        task = bar.add_task(title, total=len(pending))
        for step in range(steps):
            if step < len(own):
                cache.add(compute(own[step]))
                bar.update(task, completed=count.add(1))
            else:
                compute(pending[-1])  # keeps sharded forwards in step; the result is another process's
        while count.shared and (done := count.add(0)) < len(pending):  # a signal is heard here, in a collective not
            bar.update(task, completed=done)
            time.sleep(_LOOK)
    if state.num_processes > 1:
        mine = [cache.items[key] for batch in own for unit in batch for key in unit.keys]
        for item in gather_object(mine):
            cache.items[item["key"]] = item
    return {key: cache.items[key] for key in keys}
