"""From counts per task to the numbers of `out.json`: every metric as `{"value": …, "se": …}`."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from fdiv.errors import DataError
from fdiv.eval.pass_at_k.metrics import (
    bootstrap_standard_error,
    g_pass_at_k,
    keep_and_explore,
    majority_at_n,
    mean_at_n,
    mg_pass_at_k,
    pass_at_k,
    pass_hat_k,
)
from fdiv.eval.pass_at_k.records import TaskCounts
from fdiv.rl.modes import mode_of

__all__ = [
    "G_PASS_THRESHOLDS",
    "compare_with_base",
    "describe_counts",
    "distinct_correct",
    "parse_k",
    "summarise",
]

G_PASS_THRESHOLDS = (0.5, 0.75, 1.0)
"""τ of the reported G-Pass@k, the values of arXiv:2412.13147."""


def parse_k(text: str | Sequence[int]) -> list[int]:
    """`"1,8,64"` or a list of whole numbers as a sorted list without repetitions.

    Raises:
        DataError: something that is no whole number of at least 1, or nothing at all.
    """
    words = text.split(",") if isinstance(text, str) else list(text)
    found = set()
    for word in words:
        try:
            value = int(str(word).strip())
        except ValueError:
            raise DataError(
                f"k={text!r}: {str(word).strip()!r} is no whole number; write for instance 1,8,64"
            ) from None
        if value < 1:
            raise DataError(f"k={value}: must be at least 1")
        found.add(value)
    if not found:
        raise DataError("k is empty: write for instance 1,8,64")
    return sorted(found)


def summarise(
    counts: TaskCounts, ks: Sequence[int], *, source: str, resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, float | None]]:
    """All metrics: mean over tasks, and bootstrap standard error over tasks (None for a single task).

    `pass@K` and `pass^K` for each K; `mean@n`; `maj@n` where answers were recorded; for K ≥ 2 `g_pass@K_τ` and
    `mg_pass@K`.

    Raises:
        DataError: a task has fewer than max(ks) scored samples.
    """
    counts.check_k(ks, source)
    c, n = counts.num_correct, counts.num_samples
    columns: dict[str, np.ndarray] = {}
    for name, metric in (("pass@{}", pass_at_k), ("pass^{}", pass_hat_k)):
        columns |= {name.format(k): values for k, values in zip(ks, metric(c, n, ks).T, strict=True)}
    columns["mean@n"] = mean_at_n(c, n)
    if counts.answers is not None and counts.correct is not None:
        columns["maj@n"] = majority_at_n(counts.answers, counts.correct)
    for k in (k for k in ks if k >= 2):
        columns |= {f"g_pass@{k}_{threshold:g}": g_pass_at_k(c, n, k, threshold) for threshold in G_PASS_THRESHOLDS}
        columns[f"mg_pass@{k}"] = mg_pass_at_k(c, n, k)
    table = np.stack(list(columns.values()), axis=1)
    errors = bootstrap_standard_error(table, resamples=resamples, seed=seed)
    return {
        name: {"value": float(mean), "se": None if math.isnan(error) else float(error)}
        for name, mean, error in zip(columns, table.mean(axis=0), errors, strict=True)
    }


def distinct_correct(rows: Sequence[Mapping[str, Any]], mode: Callable[[str], Hashable] | None = None) -> float:
    """Different correct completions per task, mean over tasks; greedy ones (sample −1) do not count.

    Args:
        rows: `task_id`, `sample`, `completion` and `correct` of every sample.
        mode: maps a completion to what makes two of them the same, see `fdiv.rl.modes`; None: itself.

    Raises:
        DataError: the mode function fails, or returns what cannot be told apart.
    """
    right: dict[str, set[Hashable]] = {}
    for row in rows:
        found = right.setdefault(row["task_id"], set())
        if row["correct"] and row["sample"] >= 0:
            text, where = row["completion"], f"sample {row['sample']} of task {row['task_id']}"
            found.add(text if mode is None else mode_of(mode, text, where))
    return float(np.mean([len(found) for found in right.values()]))


def compare_with_base(
    counts: TaskCounts,
    base: TaskCounts,
    ks: Sequence[int],
    *,
    source: str,
    base_source: str,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, float | None]]:
    """`keep_rate@K` and `explore_rate@K` against the base model's samples of the same tasks.

    Raises:
        DataError: the two hold different tasks, or one has fewer than max(ks) scored samples of a task.
    """
    where = {task: i for i, task in enumerate(base.task_ids)}
    # What `leave_out` removed on one side is removed on the other, so that both rates speak of the same tasks.
    skipped = {*counts.left_out, *base.left_out}
    own = [i for i, task in enumerate(counts.task_ids) if task not in skipped]
    names = [counts.task_ids[i] for i in own]
    missing = [task for task in names if task not in where] or [
        task for task in base.task_ids if task not in skipped and task not in set(names)
    ]
    if missing:
        without = base_source if missing[0] not in where else source
        raise DataError(
            f"keep and explore rates need the same tasks on both sides: task {missing[0]!r} (one of {len(missing)}) "
            f"is not in {without}"
        )
    if not names:
        raise DataError(f"no task of {source} and {base_source} is left to compare")
    counts.check_k(ks, source)
    base.check_k(ks, base_source)
    theirs = np.array([where[task] for task in names])
    mine = pass_at_k(counts.num_correct[own], counts.num_samples[own], ks)
    start = pass_at_k(base.num_correct[theirs], base.num_samples[theirs], ks)
    result: dict[str, dict[str, float | None]] = {}
    for j, k in enumerate(ks):
        rates = keep_and_explore(start[:, j], mine[:, j], resamples=resamples, seed=seed)
        result[f"keep_rate@{k}"] = {"value": rates.keep, "se": rates.keep_se}
        result[f"explore_rate@{k}"] = {"value": rates.explore, "se": rates.explore_se}
    return result


def describe_counts(counts: TaskCounts) -> dict[str, Any]:
    """What the metrics rest on: tasks, samples per task, samples and tasks without a score."""
    n = counts.num_samples
    return {
        "tasks": len(counts.task_ids),
        "samples_per_task": {"min": int(n.min()), "max": int(n.max())},
        "unscored_samples": sum(counts.unscored.values()),
        "tasks_with_unscored_samples": len(counts.unscored),
        "tasks_left_out": counts.left_out,
    }
