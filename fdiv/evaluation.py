"""What an evaluation is told besides the model: `EvalContext`, built by the command line and by `fdiv eval …`; and the
keys it takes over from the training."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fdiv.files import write_bytes
from fdiv.sealed import listed
from fdiv.terminal import is_main_process

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from fdiv.rows.report import RowReport

__all__ = ["EXAMPLES", "EvalContext", "inherit"]

EXAMPLES = 12
"""Answers of one group that are kept for the report."""


def inherit(evaluation: type, stated: Mapping[str, Any], training: Any) -> dict[str, Any]:
    """The settings of an evaluation: as stated, and where it does not say, as in training.

    Args:
        evaluation: its dataclass; a key that it does not have is not taken over. A class attribute `takes_over` names
            further keys of the training that hold for it, too.
        stated: what its block says.
        training: the config; its `evaluation_keys()` are the encoding of its rows. None, or one without: nothing is
            taken over.
    """
    keys = training.evaluation_keys() if hasattr(training, "evaluation_keys") else {}
    named = {
        name: getattr(training, name) for name in getattr(evaluation, "takes_over", ()) if hasattr(training, name)
    }
    keys = {**keys, **named}
    known = {entry.name for entry in fields(evaluation)}
    # A format of plain questions is for evaluations of questions with answers.
    formats = () if "answer_format" in known else ("chat_template", "question_format", "answer_format")
    taken = {name: value for name, value in keys.items() if name in known and name not in formats}
    settings = {**taken, **stated}
    if stated.get("chat_template") == "never" and "system_prompt" not in stated:
        settings.pop("system_prompt", None)
    return settings


@dataclass
class EvalContext:
    """Surroundings of one call of an evaluation's `evaluate(model, tokenizer, datasets, context)`.

    `datasets` maps split names (`train`, `test`, …) to *untokenised* rows. An evaluation returns a flat
    `dict[str, float | None]` (None: not defined here, e.g. no reference) and may write files into `output_dir`.

    Args:
        training_args: The config of the run (`FDPOConfig` holds the divergence, β and `max_exponent`).
        output_dir: Where the evaluation may write files of its own. It exists when `evaluate` is called.
        reference_model: The frozen reference π_ref. None: a PEFT policy is its own reference with the adapter off, and
            at stage `"before"` the policy *is* the reference; otherwise the reference-based numbers are None.
        seed: Seed of everything random in the evaluation. Same seed, same samples, whatever the batch size.
        stage: `"before"` or `"after"` training, `"standalone"` for `fdiv eval …`.
        row_reports: What became of the rows the evaluation reads; it appends a `fdiv.rows.RowReport` for each of its
            data paths, and `result.json` has them.
        extra: Objects a family of evaluations needs besides (a rollout back end, a reward function).
    """

    training_args: TrainingArguments | Any
    output_dir: Path
    reference_model: PreTrainedModel | None = None
    seed: int = 0
    stage: Literal["before", "after", "standalone"] = "standalone"
    extra: dict[str, Any] | None = None
    row_reports: list[RowReport] = field(default_factory=list)

    def report_rows(self, report: RowReport, min_used_fraction: float) -> None:
        """Keep what became of the rows of a data path, and print it where the run has not said so before.

        Raises:
            DataError: (a ValueError) less than `min_used_fraction` of the rows is left.
        """
        if report not in self.row_reports:
            self.row_reports.append(report)
            report.show()
        report.check(min_used_fraction)

    def keep_examples(self, group: str, examples: Sequence[Mapping[str, Any]]) -> None:
        """Keep some of the model's answers in `examples_GROUP.jsonl`: `fdiv report` shows those before and after
        training side by side.

        Args:
            group: What they are, such as the name of a set of rows.
            examples: `prompt` and `completion` of each, and where there are such `truth`, the right answer, and
                `score`; in the same order at every stage. `EXAMPLES` of them are kept, evenly spaced.
        """
        if not is_main_process() or not examples:
            return
        count = min(EXAMPLES, len(examples))
        places = [index * len(examples) // count for index in range(count)]
        lines = [json.dumps({"group": group, "index": i, **examples[i]}, ensure_ascii=False) + "\n" for i in places]
        path = self.output_dir / f"examples_{re.sub(r'[^A-Za-z0-9-]+', '_', group)}.jsonl"
        with listed(path):
            write_bytes(path, "".join(lines).encode())
