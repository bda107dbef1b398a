"""`prepare: {name: tofu_distillation}`: a student of some layers, and TOFU questions that the teacher never saw."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdiv.recipes.tasks.thinned import write_thinned
from fdiv.rows.checks import check_rows, text_fault
from fdiv.rows.sources import source_of

__all__ = ["TofuDistillationConfig"]

_AUTHOR = 20  # rows of each author, one after the other


@dataclass
class TofuDistillationConfig:
    """Recipe block `prepare: {name: tofu_distillation}`.

    The student has the teacher's embeddings, head and width, and `layers` of its layers. Rows are questions and
    answers as messages. Those that the small TOFU models were trained on are left out: of these a teacher is as good
    as certain, and all divergences agree on what is best. No author of validation or test rows is trained on.

    Args:
        teacher: path or hub name, with a chat template.
        data: local folder with TOFU's files. rows: the file to read. without: the file with the rows to leave out.
        layers: of the student.
        validation_authors, test_authors: how many authors are held out for each; the others are trained on.
        seed: of the choice of authors and the order of the rows.
    """

    teacher: str = ""
    data: str = ""
    rows: str = "retain90"
    without: str = "retain_perturbed"
    layers: int = 1
    validation_authors: int = 10
    test_authors: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("teacher", "data", "rows"):
            if not getattr(self, name):
                raise ValueError(f"prepare.{name} is not set")
        for name in ("layers", "validation_authors", "test_authors"):
            if getattr(self, name) < 1:
                raise ValueError(f"prepare.{name}={getattr(self, name)}: must be at least 1")

    def build(self, output_dir: Path) -> dict[str, Any]:
        """Write `student/` and `data/` with `train.jsonl`, `validation.jsonl` and `test.jsonl`.

        Returns:
            The recipe keys it sets: `model_name_or_path`, `teacher_model_name_or_path`, `dataset_name` and its splits.

        Raises:
            DataError: a row without a question or an answer.
            FileNotFoundError: the folder lacks one of the files.
            ValueError: too few authors, or the teacher has fewer layers than the student.
        """
        output_dir = Path(output_dir)
        authors = self._authors()
        held = self.validation_authors + self.test_authors
        if held >= len(authors):
            raise ValueError(
                f"prepare.validation_authors={self.validation_authors} and test_authors={self.test_authors} leave "
                f"nothing to train on: there are {len(authors)} authors"
            )
        mixed = random.Random(self.seed)
        mixed.shuffle(authors)
        splits = {
            "test": authors[: self.test_authors],
            "validation": authors[self.test_authors : held],
            "train": authors[held:],
        }
        (output_dir / "data").mkdir(parents=True, exist_ok=True)
        for split, members in splits.items():
            rows = [row for author in members for row in author]
            mixed.shuffle(rows)
            lines = "".join(json.dumps(_messages(row), ensure_ascii=False) + "\n" for row in rows)
            (output_dir / "data" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        write_thinned(self.teacher, self.layers, output_dir / "student")
        return {
            "model_name_or_path": str(output_dir / "student"),
            "teacher_model_name_or_path": self.teacher,
            "dataset_name": str(output_dir / "data"),
            "dataset_train_split": "train",
            "dataset_test_split": "test",
        }

    def _authors(self) -> list[list[dict[str, str]]]:
        """The rows of each author that has any left."""
        from fdiv.eval.benchmark.sources import load_rows

        seen = {row["question"] for row in load_rows(self.data, self.without)} if self.without else set()
        rows = load_rows(self.data, self.rows)
        checks = {"question": text_fault, "answer": text_fault}
        check_rows(rows, source_of(rows, self.rows), checks, "a TOFU file with question, answer is needed")
        blocks = [rows[start : start + _AUTHOR] for start in range(0, len(rows), _AUTHOR)]
        left = [[row for row in block if row["question"] not in seen] for block in blocks]
        return [block for block in left if block]


def _messages(row: dict[str, str]) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": row["question"]}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }
