"""`fdiv eval passk --check_golds`: does the scorer take every gold for right, and what is wrong on purpose for wrong?

No model is needed. A gold that does not score 1 against itself is a fault of the data, of the scorer, or of the match
of the two; every figure measured on it would be too low.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fdiv.eval.pass_at_k.data import EvalTask, LoadedTasks
from fdiv.eval.pass_at_k.scoring import Scorer, score_completions

__all__ = ["RIGHT", "WRONG", "GoldCheck", "check_golds"]

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")

Form = Callable[[EvalTask], str | None]
"""A completion made from a task; None: the task has no such form."""


def _plain(task: EvalTask) -> str:
    return task.answer


def _last_statement(task: EvalTask) -> str:
    return task.answer.rstrip().rstrip(";").rpartition(";")[2].strip()


def _program(task: EvalTask) -> str:
    """The reference program as a whole: one that does not define the entry point continues the prompt."""
    name = task.columns.get("entry_point")
    continues = name and not re.search(
        rf"^(?:async\s+)?(?:def|class)\s+{re.escape(name)}\b", task.answer, re.MULTILINE
    )
    return f"{task.prompt}{task.answer}" if continues and isinstance(task.prompt, str) else task.answer


def _restated(task: EvalTask) -> str | None:
    """The tested function alone, as chat models write it: without the imports and helpers of the prompt."""
    name, program = task.columns.get("entry_point"), _program(task)
    begin = re.search(rf"^(?:async\s+)?def\s+{re.escape(name)}\b", program, re.MULTILINE) if name else None
    return None if begin is None else f"```python\n{program[begin.start() :]}\n```"


def _neighbour(task: EvalTask) -> str | None:
    number = _NUMBER.fullmatch(task.answer.strip())
    return None if number is None else rf"\boxed{{{number[0]}1}}"


def _format(pattern: str, content: Callable[[EvalTask], str] = _plain) -> Form:
    return lambda task: pattern.replace("%s", content(task))


RIGHT: dict[str, dict[str, Form]] = {
    "exact": {"as it stands": _plain, "with white space": _format("\n %s \n")},
    "math": {
        "boxed": _format(r"So it is \boxed{%s}."),
        "boxed in a formula": _format(r"Thus $\boxed{%s}$."),
        "boxed on lines of its own": _format("Thus\r\n\\[\r\n\\boxed{%s}\r\n\\]\r\n"),
        "boxed after reasoning": _format("<think>It may be \\boxed{0}.</think>\n**Answer:** \\(\\boxed{%s}\\)"),
        "after ####": _format("It is what it is.\n#### %s"),
    },
    "sql": {
        "as it stands": _last_statement,
        "in a block": _format("Here it is:\n```sql\n%s\n```\n", _last_statement),
        "in a block with Windows line ends": _format("```sql\r\n%s\r\n```\r\n", _last_statement),
        "in an unnamed block": _format("```\n%s```", _last_statement),
        "after reasoning": _format("<think>```sql\nSELECT 0\n```</think>\n```SQL\n%s\n```", _last_statement),
    },
    "code": {
        "as it stands": _plain,
        "in a block": _format("Here it is:\n```python\n%s\n```\nDone.", _program),
        "in a block with Windows line ends": _format("```python\r\n%s\r\n```\r\n", _program),
        "after reasoning": _format("<think>```python\nf = 0\n```</think>\n```py\n%s\n```", _program),
        "the function alone": _restated,
    },
}
"""By scorer: ways to write the gold, all of which have to score 1. Other scorers get the gold as it stands."""

WRONG: dict[str, dict[str, Form]] = {
    "exact": {"something behind it": _format("%s, or not")},
    "math": {
        "a digit more": _neighbour,
        "cut off": _format(r"\boxed{0} No: \boxed{%s"),
        "in reasoning that never ends": _format(r"<think>It may be \boxed{%s}"),
    },
    "sql": {
        "a constant": _format("SELECT 1"),
        "cut off": _format("```sql\n%s", _last_statement),
        "in reasoning that never ends": _format("<think>```sql\n%s\n```", _last_statement),
    },
    "code": {
        "no program": _format("    return None\n"),
        "cut off": _format("```python\n%s", _program),
        "in reasoning that never ends": _format("<think>```python\n%s\n```", _program),
    },
}
"""By scorer: answers none of which may score 1."""


@dataclass(frozen=True)
class GoldCheck:
    """What was found.

    Args:
        tasks: How many tasks were tried.
        right: Form → how many golds scored 1, of how many.
        wrong: Form → how many wrong answers scored 1, of how many.
        faults: (task, form, score) of every gold without 1 and every wrong answer with it; a score of None is one that
            the scorer could not give.
    """

    tasks: int
    right: Mapping[str, tuple[int, int]]
    wrong: Mapping[str, tuple[int, int]]
    faults: list[tuple[str, str, float | None]] = field(default_factory=list)


def check_golds(loaded: LoadedTasks, scorer: Scorer) -> GoldCheck:
    """Score every gold in every form of `RIGHT`, and what `WRONG` makes of it."""
    tables, faults = [], []
    for forms, due in ((RIGHT.get(scorer.name, {"as it stands": _plain}), True), (WRONG.get(scorer.name, {}), False)):
        table = {}
        for name, form in forms.items():
            made = {task.task_id: (task, form(task)) for task in loaded.tasks}
            samples = {key: (task, text) for key, (task, text) in made.items() if text is not None}
            if not samples:
                continue
            scores = {
                key: entry["correct"] for key, entry in score_completions(scorer, samples, progress=False).items()
            }
            table[name] = (sum(score is True for score in scores.values()), len(scores))
            faults += [
                (key, name, None if score is None else float(score))
                for key, score in scores.items()
                if (score is not True) == due
            ]
        tables.append(table)
    return GoldCheck(len(loaded.tasks), *tables, faults)
