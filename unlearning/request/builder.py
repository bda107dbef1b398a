"""`prepare: {name: own_rows}`: the rows of a request as files with one set of columns, checked against each other.

Retain rows that are missing may be the model's own answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fdiv.errors import DataError
from fdiv.eval.benchmark.settings import PromptSettings
from fdiv.eval.unlearning.attacks.rows import answered, asked
from fdiv.eval.unlearning.data import Row, Rows, check_apart, read_rows, with_paraphrases, write_rows
from fdiv.files import folded
from fdiv.rows.sources import source_of

__all__ = ["SETS", "OwnRowsConfig", "held_out"]

SETS = ("forget", "retain", "neighbours", "holdout", "general")
"""The files that a build may hold, each `NAME.jsonl`."""

_LEAST_RETAIN, _SHARE, _MOST = 10, 0.2, 50


def held_out(count: int) -> int:
    """How many of `count` retain rows are measured and not trained on, where no neighbours are given: a fifth, at most
    50; none of fewer than ten."""
    return 0 if count < _LEAST_RETAIN else min(_MOST, max(1, round(_SHARE * count)))


@dataclass
class OwnRowsConfig(PromptSettings):
    """Recipe block `prepare: {name: own_rows}`.

    Args:
        forget, retain, neighbours, holdout, general, paraphrases: files, see `fdiv.eval.unlearning.data`.
        sample_retain: how many answers of the model to neighbouring questions become retain rows.
        questions: file of such questions; None: the model is asked for some, and some are of general knowledge.
        model, adapter: what answers them. max_new_tokens: bound on an answer. seed: of questions and answers.
        chat_template, question_format, answer_format, system_prompt, date_string, chat_template_kwargs, end_token: how
            questions are asked (`fdiv.inference.prompting.PromptFormat`); as the recipe trains, where not stated.
    """

    forget: str = ""
    retain: str | None = None
    neighbours: str | None = None
    holdout: str | None = None
    general: str | None = None
    paraphrases: str | None = None
    sample_retain: int = 0
    questions: str | None = None
    model: str | None = None
    adapter: str | None = None
    max_new_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.forget:
            raise ValueError("prepare.forget is not set: name the file of the rows to forget")
        if self.sample_retain < 0:
            raise ValueError(f"prepare.sample_retain={self.sample_retain}: must be at least 0")
        if self.sample_retain and self.model is None:
            raise ValueError("prepare.sample_retain needs prepare.model, which answers the questions")

    def build(self, output_dir: Path) -> dict[str, Any]:
        """Write the files of `SETS` that there are rows for, and `request.json`.

        Returns:
            The recipe keys it sets: `dataset_name` and, with retain rows, `retain_dataset_name`.

        Raises:
            DataError: rows that cannot be used, or a forget row among the others.
        """
        output_dir = Path(output_dir)
        sets = self.read()
        if self.sample_retain:
            from fdiv.unlearning.request.sampling import sampled_rows

            sets["retain"] = [*sets["retain"], *sampled_rows(self, sets["forget"])]
            sets = _held_apart(sets)
        for name in SETS:
            if sets[name]:
                write_rows(output_dir / f"{name}.jsonl", sets[name])
        (output_dir / "request.json").write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        keys = {"dataset_name": str(output_dir / "forget.jsonl")}
        if sets["retain"]:
            keys["retain_dataset_name"] = str(output_dir / "retain.jsonl")
        return keys

    def read(self) -> dict[str, Rows | list[Row]]:
        """Every set as it will be written, but for sampled rows; without neighbours a part of the retain rows.

        Raises:
            DataError: see `build`.
        """
        forget = read_rows(self.forget, "forget")
        if self.paraphrases is not None:
            forget = with_paraphrases(forget, self.paraphrases)
        sets: dict[str, Rows | list[Row]] = {"forget": forget}
        for name in SETS[1:]:
            file = getattr(self, name)
            sets[name] = [] if file is None else read_rows(file, name)
            if name != "general":
                check_apart(forget, sets[name], name)
        for name in ("neighbours", "holdout"):
            _check_not_trained_on(sets[name], sets["retain"], name)
        return sets if self.sample_retain else _held_apart(sets)


_UNTRAINED = {
    "neighbours": "neighbours are measured and not trained on",
    "holdout": "holdout rows are rows that the model has never seen",
}


def _check_not_trained_on(rows: Rows | list[Row], retain: Rows | list[Row], name: str) -> None:
    """Refuse rows that are retain rows too: they would be measured after they were trained on."""
    trained = {_key(row) for row in retain}
    both = [number for number, row in enumerate(rows) if _key(row) in trained]
    if both:
        where = source_of(rows, f"the {name} rows").row(both[0])
        raise DataError(
            f"{len(both)} of {len(rows)} {name} rows also stand in the retain rows (first: {where}): "
            f"{_UNTRAINED[name]}; take them out of one of the two"
        )


def _key(row: Row) -> tuple[str, str]:
    return folded(asked(row)), folded(answered(row))


def _held_apart(sets: dict[str, Any]) -> dict[str, Any]:
    """The sets, a part of the retain rows as neighbours where there are none."""
    rows: Sequence[Row] = sets["retain"]
    count = held_out(len(rows))
    if sets["neighbours"] or not count:
        return sets
    apart = {round((place + 0.5) * len(rows) / count - 0.5) for place in range(count)}
    kept = [row for number, row in enumerate(rows) if number not in apart]
    return {**sets, "retain": kept, "neighbours": [rows[number] for number in sorted(apart)]}
