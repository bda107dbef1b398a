"""Recorded samples as counts per task: reading `samples.jsonl`, and what becomes of unscored samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from fdiv.errors import DataError
from fdiv.files import numbered_json_lines
from fdiv.named import nearest
from fdiv.sealed import LISTING, check_listed
from fdiv.stamps import compare_stamps

__all__ = ["TaskCounts", "Unscored", "compare_made_with", "counts_of_samples", "read_counts"]

Unscored = Literal["reduce", "wrong", "leave_out"]
"""What a sample that could not be scored (`correct` is null) does to its task: `reduce` lowers the task's n by one,
`wrong` counts it as wrong, `leave_out` leaves the whole task out of every metric. It is counted in any case."""

_SAMPLE_KEYS = {"task_id", "correct"}
_TASK_KEYS = {"task_id", "num_samples", "num_correct"}
_LINKED = {"correct": ("passed", "is_correct", "score", "reward", "solved", "success")}


@dataclass
class TaskCounts:
    """n and c of every task, in the order of first appearance.

    Args:
        task_ids: names of the tasks, N of them.
        num_samples: scored samples of each, `[N]`.
        num_correct: correct ones, `[N]`.
        answers: per task and sample the answer given (None: none found); None when answers were not recorded.
        correct: per task and sample, beside `answers`.
        unscored: number of samples without a score, per task that has some.
        left_out: tasks that `leave_out` removed.
        made_with: settings that the samples were made with, where `digests.json` beside their file says so; None: not
            known, and the file was not checked.
    """

    task_ids: list[str]
    num_samples: np.ndarray
    num_correct: np.ndarray
    answers: list[list[str | None]] | None = None
    correct: list[list[bool | None]] | None = None
    unscored: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    made_with: dict[str, Any] | None = None

    def check_k(self, ks: Sequence[int], source: str) -> None:
        """Refuse a k that some task has not enough scored samples for.

        Raises:
            DataError: names the task with the fewest samples and the remedy.
        """
        least = int(self.num_samples.argmin())
        if max(ks) <= self.num_samples[least]:
            return
        task, n = self.task_ids[least], self.num_samples[least]
        lost = self.unscored.get(task, 0)
        because = f" ({lost} more could not be scored)" if lost else ""
        remedy = "sample more or lower k" + (", or choose `unscored: wrong` or `leave_out`" if lost else "")
        short = int((self.num_samples < max(ks)).sum())
        others = f"; so have {short - 1} other tasks" if short > 1 else ""
        raise DataError(
            f"{source}: pass@{max(ks)} needs {max(ks)} samples of every task, but task {task!r} has "
            f"{n}{because}{others}: {remedy}"
        )


def compare_made_with(ours: Mapping[str, Any] | None, base: TaskCounts, source: str) -> list[str]:
    """Refuse base samples of other prompts, sampling or scorer than ours.

    Args:
        ours: what our samples were made with (None: not known). base, source: the base samples, and their file.

    Returns:
        Notes: what differs and may be fine (number type, seed, end tokens), what is not known.

    Raises:
        DataError: another chat template, prompt format, system prompt, date, temperature, nucleus, bound, stop or
            scorer.
    """
    remedy = "sample the base again with these settings, or give samples that were made with them"
    return compare_stamps(ours or {}, base.made_with, f"the base samples {source}", remedy)


def counts_of_samples(samples: Iterable[Mapping[str, Any]], unscored: Unscored, source: str) -> TaskCounts:
    """Group samples (`task_id`, `correct`, perhaps `answer`) by task.

    Raises:
        DataError: an unknown `unscored`, no sample, or no task that is left.
    """
    if unscored not in get_args(Unscored):
        raise DataError(f"unscored={unscored!r}: choose {', '.join(get_args(Unscored))}")
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        rows.setdefault(str(sample["task_id"]), []).append(sample)
    if not rows:
        raise DataError(f"{source} is empty: it holds no sample")
    missing = {task: sum(s["correct"] is None for s in own) for task, own in rows.items()}
    missing = {task: count for task, count in missing.items() if count}
    left_out = list(missing) if unscored == "leave_out" else []
    kept = {task: own for task, own in rows.items() if task not in left_out}
    if not kept:
        raise DataError(f"{source}: every task has a sample that could not be scored, so leave_out leaves none")
    judged = {
        task: [False if s["correct"] is None and unscored == "wrong" else s["correct"] for s in own]
        for task, own in kept.items()
    }
    scored = [[c for c in values if c is not None] for values in judged.values()]
    with_answers = all("answer" in sample for own in kept.values() for sample in own)
    return TaskCounts(
        task_ids=list(kept),
        num_samples=np.array([len(values) for values in scored]),
        num_correct=np.array([sum(values) for values in scored], dtype=np.int64),
        answers=[[s["answer"] for s in own] for own in kept.values()] if with_answers else None,
        correct=list(judged.values()) if with_answers else None,
        unscored=missing,
        left_out=left_out,
    )


def read_counts(path: str | Path, unscored: Unscored = "reduce") -> TaskCounts:
    """Read recorded samples: one JSON object per line, either kind but not both in a file.

    * per sample: `task_id` (text or whole number), `correct` (true, false, or null: could not be scored), perhaps
      `sample` (its number within the task; no number twice) and `answer` (text or null; gives maj@n);
    * per task: `task_id`, `num_samples`, `num_correct`.

    Further columns are not read.

    Raises:
        DataError: no such file, an empty file, a line that is no JSON object or lacks a column, both kinds in one
            file, a task given twice, a value of the wrong type; each with the line. The file is not what we wrote.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no such file: {path}")
    made_with = check_listed(path, f"sample again, or remove {LISTING} where the file was edited on purpose")
    rows = list(_rows(path))
    if not rows:
        raise DataError(f"{path} is empty: give one JSON object per sample or per task")
    per_task = _TASK_KEYS <= rows[0][1].keys()
    wanted = _TASK_KEYS if per_task else _SAMPLE_KEYS
    for where, row in rows:
        if (_SAMPLE_KEYS if per_task else _TASK_KEYS) <= row.keys() or ("correct" in row and "num_correct" in row):
            raise DataError(
                f"{where}: mixes the two formats: give `correct` per sample, or `num_samples` and `num_correct` per "
                "task, the same in every line"
            )
        _check_columns(where, row, wanted)
    counts = _from_tasks(rows) if per_task else counts_of_samples(_checked_samples(rows), unscored, str(path))
    return replace(counts, made_with=made_with)


def _rows(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """(place, object) of every line that is not blank."""
    for number, row in numbered_json_lines(path):
        where = f"{path}, line {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where} holds {type(row).__name__}, not an object: give one JSON object per line")
        yield where, row


def _check_columns(where: str, row: Mapping[str, Any], wanted: set[str]) -> None:
    for column in sorted(wanted):
        if column not in row:
            near = [name for name in _LINKED.get(column, ()) if name in row]
            near += nearest(column, row)
            hint = f"; did you mean {near[0]!r} to be it? rename it" if near else ""
            raise DataError(
                f"{where} has no {column!r}; it has {', '.join(sorted(row)) or 'nothing'}{hint}. A line per sample "
                "holds task_id and correct; a line per task task_id, num_samples and num_correct"
            )
    if isinstance(row["task_id"], bool) or not isinstance(row["task_id"], (str, int)):
        raise DataError(f"{where}: task_id is {row['task_id']!r}: give text or a whole number")


def _checked_samples(rows: Sequence[tuple[str, dict[str, Any]]]) -> Iterable[dict[str, Any]]:
    seen: set[tuple[str, int]] = set()
    for where, row in rows:
        if row["correct"] is not None and not isinstance(row["correct"], bool):
            raise DataError(
                f"{where}: correct is {row['correct']!r}: write true or false (null where it could not be scored)"
            )
        answer = row.get("answer")
        if answer is not None and not isinstance(answer, str):
            raise DataError(f"{where}: answer is {answer!r}: give text or null")
        if "sample" in row:
            if isinstance(row["sample"], bool) or not isinstance(row["sample"], int):
                raise DataError(f"{where}: sample is {row['sample']!r}: give a whole number")
            key = (str(row["task_id"]), row["sample"])
            if key in seen:
                raise DataError(f"{where}: sample {key[1]} of task {key[0]!r} stands in the file twice")
            seen.add(key)
        yield row


def _from_tasks(rows: Sequence[tuple[str, dict[str, Any]]]) -> TaskCounts:
    counts: dict[str, tuple[int, int]] = {}
    for where, row in rows:
        task = str(row["task_id"])
        if task in counts:
            raise DataError(f"{where}: task {task!r} stands in the file twice")
        n, c = row["num_samples"], row["num_correct"]
        for name, value in (("num_samples", n), ("num_correct", c)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise DataError(f"{where}: {name} is {value!r}: give a whole number")
        if not (n >= 1 and 0 <= c <= n):
            raise DataError(f"{where}: {c} correct of {n} samples: needs num_samples ≥ 1 and 0 ≤ num_correct ≤ it")
        counts[task] = (n, c)
    both = np.array(list(counts.values()), dtype=np.int64)
    return TaskCounts(list(counts), both[:, 0], both[:, 1])
