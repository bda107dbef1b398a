"""`fdiv eval passk --dry_run`: what a run would sample, what it takes in memory, and how long."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fdiv.inference.batches import cut_batches

if TYPE_CHECKING:
    from fdiv.eval.pass_at_k.evaluation import SamplingPass
    from fdiv.memory.generation import GenerationMemory

__all__ = ["Batch", "SamplingPlan", "Speed", "duration", "make_plan", "plan_rows"]


@dataclass(frozen=True)
class Batch:
    """What is sampled together: completions, rows (twice as many under contrastive decoding), tokens of the longest
    prompt, the most new tokens of one, and the tokens of all its prompts."""

    completions: int
    rows: int
    width: int
    bound: int
    prompt_tokens: int


@dataclass(frozen=True)
class Speed:
    """What a probe found. All are seconds.

    Args:
        token: of a prompt's token. step: of one more token of every completion of a batch. request: from asking a
            server to its answer; None without servers. check: of the scoring of a completion; None: not measured.
        based_on, scored: what was measured for the sampling and for the scoring, in words.
    """

    token: float = 0.0
    step: float = 0.0
    request: float | None = None
    check: float | None = None
    based_on: str = ""
    scored: str = ""

    def of(self, batch: Batch) -> float:
        """Of a batch whose every completion is as long as it may be."""
        return batch.rows * batch.width * self.token + batch.bound * self.step


@dataclass(frozen=True)
class SamplingPlan:
    """What is to be sampled.

    Args:
        tasks, samples: problems, and completions of each; greedy: further, greedy ones. there: completions that are
            kept already. shares: the batches of each process, or of all servers a batch of one for each request.
        servers: how many; 0: the model is in this process. at_once: requests under way at each.
    """

    tasks: int
    samples: int
    greedy: int
    there: int
    shares: list[list[Batch]] = field(default_factory=list)
    servers: int = 0
    at_once: int = 0

    @property
    def total(self) -> int:
        """Completions of the whole evaluation."""
        return self.tasks * self.samples + self.greedy

    @property
    def batches(self) -> list[Batch]:
        """All that is left."""
        return [batch for share in self.shares for batch in share]

    @property
    def prompt_tokens(self) -> int:
        """Of the completions that are left, each with its own prompt."""
        return sum(batch.prompt_tokens for batch in self.batches)

    @property
    def most_new_tokens(self) -> int:
        """What is sampled if every completion that is left reaches its bound."""
        return sum(batch.completions * batch.bound for batch in self.batches)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its completion."""
        return max((batch.width + batch.bound for batch in self.batches), default=0)

    def sampling_seconds(self, speed: Speed) -> float:
        """At most: of the process with most to do, or of all requests, as many under way at once as may be."""
        if self.servers:
            requests = sum(batch.completions for batch in self.batches)
            return math.ceil(requests / (self.servers * self.at_once)) * (speed.request or 0.0)
        return max((sum(map(speed.of, share)) for share in self.shares), default=0.0)

    def scoring_seconds(self, speed: Speed) -> float:
        """Of the completions that are left, shared by the processes."""
        left = sum(batch.completions for batch in self.batches)
        return math.ceil(left / max(1, len(self.shares))) * (speed.check or 0.0)


def make_plan(
    passes: Sequence[SamplingPass],
    kept: Sequence[set[str]],
    *,
    tasks: int,
    samples: int,
    batch_size: int,
    processes: int = 1,
    servers: int = 0,
) -> SamplingPlan:
    """The plan of a run.

    Args:
        passes: see `PassKEvalConfig.passes`. kept: keys of each pass that are there already.
        tasks, samples: of the evaluation. batch_size: rows of a batch, or requests at once.
        processes: that share the batches, the i-th taking every n-th. servers: how many; 0: none.
    """
    shares: list[list[Batch]] = [[] for _ in range(processes)]
    there = 0
    for one, keys in zip(passes, kept, strict=True):
        there += sum(request.key in keys for request in one.requests)
        size = 1 if servers else batch_size
        missing = [request for request in one.requests if request.key not in keys] if servers else one.requests
        pending = [cut for cut in cut_batches(missing, size) if any(request.key not in keys for request in cut)]
        for rank in range(processes):
            shares[rank] += [_batch(cut) for cut in pending[rank::processes]]
    greedy = sum(len(one.requests) for one in passes if one.kind == "greedy")
    return SamplingPlan(tasks, samples, greedy, there, shares, servers, batch_size)


def _batch(requests: Sequence[Any]) -> Batch:
    widths = [max(len(request.prompt_ids), len(request.stripped_ids)) for request in requests]
    rows = sum(request.rows for request in requests)
    prompts = sum(len(request.prompt_ids) + len(request.stripped_ids) for request in requests)
    return Batch(len(requests), rows, max(widths), max(request.max_new_tokens for request in requests), prompts)


def plan_rows(
    plan: SamplingPlan, memory: GenerationMemory | None, there: tuple[str, int] | None, speed: Speed | None
) -> list[tuple[str, str, str]]:
    """The plan as a table: what, how much, and a note.

    Args:
        plan: what is to be sampled. memory, there: what generating takes, and what can be had; None: elsewhere.
        speed: of a probe; None: nothing was measured.
    """
    left = sum(batch.completions for batch in plan.batches)
    greedy = f", and {plan.greedy:,} greedy ones" if plan.greedy else ""
    rows = [
        ("problems", f"{plan.tasks:,}", ""),
        ("completions", f"{plan.total:,}", f"{plan.samples} of each problem{greedy}"),
        ("there already", f"{plan.there:,}", "kept in cache/, and not sampled again" if plan.there else ""),
        ("left", f"{left:,}", _left_words(plan, left)),
    ]
    if not left:
        return rows
    rows += [
        ("prompt tokens", f"{plan.prompt_tokens:,}", "exact, by the tokenizer"),
        ("new tokens", f"{plan.most_new_tokens:,}", "at most: every completion at its bound"),
    ]
    if memory is not None and there is not None:
        rows += _memory_rows(memory, there, plan.longest)
    return rows + _time_rows(plan, speed)


def _left_words(plan: SamplingPlan, left: int) -> str:
    if not left:
        return "nothing is sampled"
    if plan.servers:
        many = f"{plan.servers} server{'s' if plan.servers > 1 else ''}"
        return f"{left:,} requests to {many}, {plan.at_once} at once each"
    batches = len(plan.batches)
    words = f"{batches:,} batch{'es' if batches > 1 else ''} of at most {max(b.rows for b in plan.batches)} rows"
    if batches and left < plan.total - plan.there:
        words += ", with what is sampled beside them"
    if len(plan.shares) > 1:
        counts = Counter(sum(batch.completions for batch in share) for share in plan.shares)
        each = ", ".join(f"{number} × {count:,}" for count, number in sorted(counts.items(), reverse=True))
        words += f"; completions of {len(plan.shares)} processes: {each}"
    return words


def _memory_rows(memory: GenerationMemory, there: tuple[str, int], longest: int) -> list[tuple[str, str, str]]:
    from fdiv.terminal import binary_size

    place, free = there
    most = memory.most_rows(free)
    fits = f"fits: {place} has {binary_size(free)} free"
    if memory.total > free:
        remedy = f"--batch_size {most} fits" if most else "the weights alone do not fit"
        fits = f"DOES NOT FIT: {place} has {binary_size(free)} free; {remedy}"
    return [
        ("weights", binary_size(memory.weights), "of each process"),
        ("keys, values, scores", binary_size(memory.rows * memory.row), f"{memory.rows} rows of {longest:,} tokens"),
        ("memory", binary_size(memory.total), fits),
    ]


def _time_rows(plan: SamplingPlan, speed: Speed | None) -> list[tuple[str, str, str]]:
    if speed is None:
        return [("time", "not estimated", "--probe measures it")]
    sampling, scoring = plan.sampling_seconds(speed), plan.scoring_seconds(speed)
    measured = speed.step > 0 or speed.request is not None
    rows = [("sampling", _at_most(sampling) if measured else "not estimated", speed.based_on)]
    if speed.check is not None:
        rows.append(("scoring", duration(scoring), f"{speed.check * 1000:.3g} ms each, measured on {speed.scored}"))
    if measured:
        rows.append(("time", _at_most(sampling + scoring), "completions that end early are cheaper"))
    return rows


def _at_most(seconds: float) -> str:
    return f"{'' if seconds < 1 else '≤ '}{duration(seconds)}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours and days, two units at most: `3 h 20 min`."""
    if seconds < 1:
        return "under 1 s"
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    whole = round(seconds)
    for place, (name, size) in enumerate(units):
        if whole >= size:
            number, rest = divmod(whole, size)
            if place + 1 == len(units):
                return f"{number} {name}"
            lower, part = units[place + 1]
            return f"{number} {name} {rest // part} {lower}" if rest >= part else f"{number} {name}"
    return "under 1 s"
