"""How fast this machine, or a server, samples and scores: measured on a little of the real work."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from fdiv.eval.pass_at_k.backends import Backend
from fdiv.eval.pass_at_k.data import LoadedTasks
from fdiv.eval.pass_at_k.evaluation import SamplingPass
from fdiv.eval.pass_at_k.gold_check import RIGHT
from fdiv.eval.pass_at_k.plan import Speed
from fdiv.eval.pass_at_k.scoring import Scorer, score_completions
from fdiv.inference.batches import cut_batches
from fdiv.inference.cache import ItemCache
from fdiv.inference.sampling import SamplingRequest

__all__ = ["measure"]

_STEPS = 16
_GOLDS = 8


def measure(
    backend: Backend, one: SamplingPass, loaded: LoadedTasks, scorer: Scorer, *, batch_size: int, requests: int
) -> Speed:
    """Sample and score a little of a pass; nothing is kept.

    With transformers, the batch in the middle of the list, once with one new token and once with a few; with servers
    `requests` completions, one of each problem, all at once; vLLM in this process is not started. Scoring is measured
    on golds, as a model would write them.
    """
    check, scored = _check(loaded, scorer)
    speed = Speed(based_on="vLLM is not started for a probe")
    if backend.servers is not None:
        speed = _servers(backend, one.requests, requests)
    elif backend.model is not None:
        speed = _here(backend, one, batch_size)
    return dataclasses.replace(speed, check=check, scored=scored)


def _here(backend: Backend, one: SamplingPass, batch_size: int) -> Speed:
    batches: list[list[SamplingRequest]] = cut_batches(one.requests, batch_size)
    batch = batches[len(batches) // 2]
    bound = min(_STEPS + 1, batch[0].max_new_tokens)
    _timed(backend, one, batch[:1], 1)  # what is set up once
    first, _ = _timed(backend, one, batch, 1)
    whole, length = _timed(backend, one, batch, bound)
    step = max(0.0, whole - first) / (length - 1) if length > 1 else first
    width = max(len(request.prompt_ids) for request in batch)
    rows = sum(request.rows for request in batch)
    return Speed(
        token=first / (rows * width),
        step=step,
        based_on=f"{rows} rows with {width} tokens of prompt and {length} new ones, measured here in one process; "
        "later tokens take a little longer",
    )


def _timed(backend: Backend, one: SamplingPass, batch: Sequence[SamplingRequest], bound: int) -> tuple[float, int]:
    """Seconds, and the steps that were made."""
    short = [dataclasses.replace(request, max_new_tokens=bound) for request in batch]
    began = time.perf_counter()
    drawn = backend.draw(short, one.settings, ItemCache(None, "probe", ""))
    return time.perf_counter() - began, max(len(ids) for ids in drawn.values())


def _servers(backend: Backend, requests: Sequence[SamplingRequest], number: int) -> Speed:
    first = {request.key.rpartition("#")[0]: request for request in reversed(requests)}
    asked = list(first.values())[::-1][:number] or list(requests[:number])
    assert backend.servers is not None
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(backend.servers.timed, range(len(asked)), asked))
    seconds = [one for one, _ in found]
    cut = sum(record.get("finish_reason") == "length" for _, record in found)
    return Speed(
        request=sum(seconds) / len(seconds),
        based_on=f"{len(asked)} requests at once, {sum(seconds) / len(seconds):.3g} s each on average, {cut} cut at "
        "the bound; it holds if --batch_size at once are answered as fast",
    )


def _check(loaded: LoadedTasks, scorer: Scorer) -> tuple[float, str]:
    """Seconds for a completion, and what was scored."""
    form = next(iter(RIGHT.get(scorer.name, {}).values()), lambda task: task.answer)
    texts = {task.task_id: (task, form(task) or "") for task in loaded.tasks[:_GOLDS]}
    score_completions(scorer, dict(list(texts.items())[:1]), progress=False)  # starts its workers
    began = time.perf_counter()
    score_completions(scorer, texts, progress=False)
    seconds = (time.perf_counter() - began) / len(texts)
    return seconds, f"{len(texts)} gold{'s' if len(texts) > 1 else ''}"
