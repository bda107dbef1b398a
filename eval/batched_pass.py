"""One pass over many texts: sorted by length, shared among processes, resumable, in an order that does not matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from fdiv.errors import DataError
from fdiv.eval.item_cache import ItemCache

__all__ = ["run_batches"]


class _Request(Protocol):
    key: str

    @property
    def length(self) -> int: ...


R = TypeVar("R", bound=_Request)


def _collective_forward() -> bool:
    """Whether every process must run the same number of forwards (parameters are sharded)."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


def run_batches(
    requests: Sequence[R],
    compute: Callable[[list[R]], list[dict[str, Any]]],
    *,
    batch_size: int,
    cache: ItemCache,
    group: Callable[[R], Any] = lambda request: 0,
    title: str = "evaluating",
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Compute every request not in the cache yet and return all results by key, the same on every process.

    Batches are cut from the list sorted by (group, length, key), whatever the number of processes, and the i-th
    pending batch goes to process i mod n. So results depend on neither the order of the requests nor the number of
    processes, and on the batch size only through floating-point rounding.

    Args:
        requests: with unique `key`s.
        compute: one batch in, one result per request out, each with its `key`.
        batch_size: rows of a batch.
        cache: where finished items are looked up and stored.
        group: requests of different groups never share a batch.
        title: shown beside the progress bar of the main process.
        progress: False: no bar.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object
    from rich.progress import Progress

    if batch_size < 1:
        raise DataError(f"batch_size={batch_size}: must be at least 1")
    keys = [request.key for request in requests]
    if len(set(keys)) != len(keys):
        raise DataError(f"{title}: request keys are not unique")
    state = PartialState()
    ordered = sorted(requests, key=lambda r: (str(group(r)), -r.length, r.key))
    batches: list[list[R]] = []
    for request in ordered:
        if not batches or len(batches[-1]) == batch_size or group(batches[-1][0]) != group(request):
            batches.append([])
        batches[-1].append(request)
    pending = [batch for batch in batches if any(request.key not in cache.items for request in batch)]
    state.wait_for_everyone()  # everybody has read the cache before anybody appends
    own = pending[state.process_index :: state.num_processes]
    steps = -(-len(pending) // state.num_processes) if _collective_forward() else len(own)
    with Progress(disable=not progress or not state.is_main_process, transient=True) as bar:
        task = bar.add_task(title, total=steps)
        for step in range(steps):
            if step < len(own):
                cache.add(compute(own[step]))
            else:
                compute(pending[-1])  # keeps sharded forwards in step; the result is another process's
            bar.advance(task)
    if state.num_processes > 1:
        mine = [cache.items[request.key] for batch in own for request in batch]
        for item in gather_object(mine):
            cache.items[item["key"]] = item
    return {key: cache.items[key] for key in keys}
