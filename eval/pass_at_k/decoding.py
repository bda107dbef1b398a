"""Contrastive decoding in Pass@k: its options, and the stripped prompt of each task."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fdiv.errors import DataError
from fdiv.eval.pass_at_k.data import EvalTask
from fdiv.filling import check_template, fill
from fdiv.inference.contrastive import COLLISION, Contrast
from fdiv.named import own_object, shown
from fdiv.training.config import RowOptions, option

__all__ = ["DecodeOptions", "stripped_tasks", "without_examples"]

_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_MUST_BE = "a function (prompt, **columns) → the stripped prompt, of the same kind"
_CONTRAST_KEYS = ("stripped_prompt", "contrast_gate", "contrast_threshold", "contrast_eta", "contrast_cutoff")


@dataclass
class DecodeOptions(RowOptions):
    """`decode: contrastive`: standard against stripped prompt, after USCD (arXiv:2409.05923); see
    `fdiv.inference.contrastive.Contrast`."""

    decode: Literal["standard", "contrastive"] = option(
        "standard",
        "`contrastive` takes off what the model says to a stripped prompt (USCD): twice the rows, transformers only",
        choices=("standard", "contrastive"),
        keyword=True,
    )
    stripped_prompt: str | None = option(
        None,
        "The stripped prompt: a template with {question} and the task's columns, or module:function of (prompt, "
        "**columns), such as fdiv.eval.pass_at_k.decoding:without_examples",
        keyword=True,
    )
    contrast_gate: dict[str, Any] | str = option(
        COLLISION,
        "Which tokens are contrasted: `collision`, where the sum of p² is below the threshold (the model is unsure), "
        "or a divergence such as jensen_shannon, where that of the two prompts is at least the threshold",
        keyword=True,
    )
    contrast_threshold: float | None = option(
        None, "Threshold of the gate; not set: 0.4 for `collision`, else it must be given", least=0, keyword=True
    )
    contrast_eta: float = option(
        0.7, "η, how much of the stripped prompt's probabilities is taken off", least=0, below=1, keyword=True
    )
    contrast_cutoff: float = option(
        1 / 3, "c: contrasted tokens have a probability of at least c/vocabulary", least=0, keyword=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decode == "standard":
            for entry in dataclasses.fields(self):
                if entry.name in _CONTRAST_KEYS and getattr(self, entry.name) != entry.default:
                    raise DataError(f"{entry.name}={getattr(self, entry.name)!r} goes with decode: contrastive")
            return
        if self.stripped_prompt is None:
            raise DataError(
                "decode=contrastive needs stripped_prompt: a template such as '{question}', or module:function, for "
                "example fdiv.eval.pass_at_k.decoding:without_examples"
            )
        if self.contrast_threshold is None and self.contrast_gate != COLLISION:
            raise DataError(
                f"contrast_gate={self.contrast_gate!r} needs contrast_threshold: tokens are contrasted where the "
                "divergence of the two prompts' distributions is at least that many nats"
            )
        self.contrast()
        _stripper(self.stripped_prompt)

    def contrast(self) -> Contrast | None:
        """How scores are contrasted; None for standard decoding.

        Raises:
            ValueError: a gate that is no divergence.
        """
        if self.decode == "standard":
            return None
        threshold = 0.4 if self.contrast_threshold is None else self.contrast_threshold
        return Contrast(self.contrast_gate, threshold, self.contrast_eta, self.contrast_cutoff)

    def decode_stamp(self) -> dict[str, Any]:
        """What completions depend on here, for stamps and fingerprints; empty for standard decoding."""
        how = self.contrast()
        if how is None:
            return {}
        return {
            "decode": self.decode,
            "stripped_prompt": self.stripped_prompt,
            **{f"contrast_{name}": value for name, value in dataclasses.asdict(how).items()},
        }


def stripped_tasks(tasks: Sequence[EvalTask], stripped_prompt: str) -> tuple[list[EvalTask], int]:
    """The tasks with stripped prompts, and how many of these are the prompt itself, where nothing is contrasted.

    Args:
        tasks: of a benchmark. stripped_prompt: a template or `module:function`, see `DecodeOptions`.

    Raises:
        DataError: a template with a field that a task has not, a function that raises or returns no prompt, an empty
            stripped prompt, or none that differs from its prompt.
    """
    function = _stripper(stripped_prompt)
    stripped = []
    for task in tasks:
        prompt = _filled(stripped_prompt, task) if function is None else _called(function, stripped_prompt, task)
        stripped.append(dataclasses.replace(task, prompt=prompt))
    same = sum(ours.prompt == theirs.prompt for ours, theirs in zip(tasks, stripped, strict=True))
    if same == len(tasks):
        raise DataError(
            f"stripped_prompt={stripped_prompt!r} leaves every prompt unchanged: there is nothing to contrast; "
            "name a template or a function that leaves something out"
        )
    return stripped, same


def _stripper(stripped_prompt: str) -> Any | None:
    """The function that `module:function` names; None for a template."""
    if not _PATH.fullmatch(stripped_prompt):
        return None
    return own_object(stripped_prompt, "stripped_prompt", _MUST_BE, callable, error=DataError)


def _filled(template: str, task: EvalTask) -> str | list[dict[str, str]]:
    """The template with the task's question and columns; of a conversation it replaces the last turn."""
    question = task.prompt if isinstance(task.prompt, str) else task.prompt[-1]["content"]
    values = {name: str(value) for name, value in task.columns.items()} | {"question": question}
    try:
        check_template(template, tuple(values), what="stripped_prompt")
    except DataError as error:
        raise DataError(f"task {task.task_id!r}: {error}") from None
    text = fill(template, **values)
    if not text.strip():
        raise DataError(f"task {task.task_id!r}: stripped_prompt gives an empty text")
    return text if isinstance(task.prompt, str) else [*task.prompt[:-1], {**task.prompt[-1], "content": text}]


def _called(function: Any, name: str, task: EvalTask) -> str | list[dict[str, str]]:
    try:
        made = function(task.prompt, **task.columns)
    except Exception as error:  # a function of the user's own may raise anything
        raise DataError(f"task {task.task_id!r}: {name} raised {type(error).__name__}: {error}") from error
    turns = (
        isinstance(made, list) and bool(made) and all(isinstance(turn, dict) and "content" in turn for turn in made)
    )
    if not (isinstance(made, str) and made.strip()) and not turns:
        raise DataError(f"task {task.task_id!r}: {name} returned {shown(made)}: it must be {_MUST_BE}")
    if isinstance(made, str) != isinstance(task.prompt, str):
        raise DataError(
            f"task {task.task_id!r}: {name} made another kind of prompt: text of text, messages of messages"
        )
    return made


def without_examples(prompt: Any, **_: Any) -> Any:
    """The prompt without its doctest examples: every `>>>` line and what follows it up to a blank line, the next text
    or the closing quotes of the docstring. USCD's stripped prompt for code that comes with input-output examples.

    Args:
        prompt: text, or messages, of which all are stripped.
    """
    if not isinstance(prompt, str):
        return [{**turn, "content": without_examples(turn["content"])} for turn in prompt]
    kept: list[str] = []
    inside = False
    for line in prompt.splitlines(keepends=True):
        text = line.strip()
        if text.startswith(">>>"):
            inside = True
        elif not text or text.startswith(('"""', "'''")):
            inside = False
        if not inside:
            kept.append(line)
        elif text.endswith(('"""', "'''")):  # the docstring closes behind its last example
            kept.append(line[: len(line) - len(line.lstrip())] + text[-3:] + line[len(line.rstrip()) :])
            inside = False
    return "".join(kept)
