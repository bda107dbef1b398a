"""Answers of the model that evaluations kept, before and after training: the report shows them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import NoneType

from fdiv.evaluation import EXAMPLES
from fdiv.files import numbered_json_lines
from fdiv.report.records import RERUN_LISTED, RunRecord
from fdiv.report.shapes import check_shape
from fdiv.sealed import check_listed

__all__ = ["Answer", "Question", "read_examples"]

_TEXT = (str, NoneType)
_SHAPE = {
    "group": (str,), "index": (int,), "prompt": (str,), "completion": _TEXT, "truth?": _TEXT,
    "score?": (int, float, bool, NoneType),
}  # fmt: skip


@dataclass
class Answer:
    """What one model says.

    Args:
        heading: Of which model, and when.
        text: The answer.
        score: What the evaluation gave it, where it says so.
    """

    heading: str
    text: str
    score: float | bool | None = None


@dataclass
class Question:
    """A prompt with the answers of every stage and run."""

    prompt: str
    truth: str | None
    answers: list[Answer] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        """Whether two answers differ."""
        return len({answer.text for answer in self.answers}) > 1


def read_examples(runs: Sequence[RunRecord]) -> dict[str, list[Question]]:
    """Group → questions, changed ones first, each with the answer before training and after it.

    The start of runs that have one is shown once, that of the first.

    Raises:
        DataError: a file of examples is damaged.
    """
    found: dict[str, dict[tuple[int, str], Question]] = {}
    for stage in ("before", "after"):
        for number, run in enumerate(runs if stage == "after" else runs[:1]):
            heading = stage if stage == "before" or len(runs) == 1 else f"after: {run.setting or run.name}"
            for path in sorted((run.path / "eval" / stage).glob("examples_*.jsonl")) if run.path else ():
                _read(path, heading, found, first=stage == "before" or number == 0)
    groups = {}
    for group, questions in found.items():
        both = [question for question in questions.values() if len(question.answers) > 1] or list(questions.values())
        groups[group] = sorted(both, key=lambda question: not question.changed)
    return groups


def _read(path: Path, heading: str, found: dict[str, dict[tuple[int, str], Question]], first: bool) -> None:
    """Add the answers of a file; questions that only a later run has are left out."""
    check_listed(path, RERUN_LISTED)
    for number, line in islice(numbered_json_lines(path), 2 * EXAMPLES):
        check_shape(line, _SHAPE, path, RERUN_LISTED, f"line {number}")
        questions = found.setdefault(line["group"], {}) if first else found.get(line["group"], {})
        key = (line["index"], line["prompt"])
        if first:
            questions.setdefault(key, Question(line["prompt"], line.get("truth")))
        question = questions.get(key)
        if question is not None:
            question.answers.append(Answer(heading, line["completion"] or "", line.get("score")))
