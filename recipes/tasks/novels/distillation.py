"""`prepare: {name: thinned_student}`: a student of some of its teacher's layers, and passages of novels."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fdiv.recipes.tasks.novels.passages import cut_passages, read_novels
from fdiv.recipes.tasks.thinned import write_thinned

__all__ = ["ThinnedStudentConfig"]


@dataclass
class ThinnedStudentConfig:
    """Recipe block `prepare: {name: thinned_student}`.

    The student has the teacher's embeddings, head and width, and `layers` of its layers, evenly spread with the first
    and the last among them. Rows are passages of novels, their first words the prompt.

    Args:
        teacher: path, hub name or packaged model. layers: of the student.
        data: folder or tar archive with one `TITLE.txt` per novel. train_novels, test_novels: titles.
        passages: of each novel. passage_words: of a passage, up to half as many more. prompt_words: of its prompt.
    """

    teacher: str = ""
    layers: int = 10
    data: str = ""
    train_novels: list[str] = field(default_factory=list)
    test_novels: list[str] = field(default_factory=list)
    passages: int = 200
    passage_words: int = 90
    prompt_words: int = 10

    def __post_init__(self) -> None:
        for name in ("teacher", "data", "train_novels", "test_novels"):
            if not getattr(self, name):
                raise ValueError(f"prepare.{name} is not set")
        both = sorted(set(self.train_novels) & set(self.test_novels))
        if both:
            raise ValueError(f"{both[0]} stands in prepare.train_novels and in prepare.test_novels: drop one")
        for name in ("layers", "passages", "prompt_words"):
            if getattr(self, name) < 1:
                raise ValueError(f"prepare.{name}={getattr(self, name)}: must be at least 1")
        if self.prompt_words >= self.passage_words:
            raise ValueError(f"prepare.prompt_words={self.prompt_words}: must be below passage_words")

    def build(self, output_dir: Path) -> dict[str, Any]:
        """Write `student/` and `data/` with `train.jsonl` and `test.jsonl`.

        Returns:
            The recipe keys it sets: `model_name_or_path`, `teacher_model_name_or_path`, `dataset_name` and its splits.

        Raises:
            FileNotFoundError: a novel is missing.
            ValueError: a novel is too short, or the teacher has fewer layers than the student.
        """
        output_dir = Path(output_dir)
        for split, titles in (("train", self.train_novels), ("test", self.test_novels)):
            novels = read_novels(self.data, titles)
            rows = [
                dict(zip(("prompt", "completion"), passage.split(self.prompt_words), strict=True))
                for title in titles
                for passage in cut_passages(title, novels[title], self.passages, self.passage_words)
            ]
            (output_dir / "data").mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (output_dir / "data" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        write_thinned(self.teacher, self.layers, output_dir / "student")
        return {
            "model_name_or_path": str(output_dir / "student"),
            "teacher_model_name_or_path": self.teacher,
            "dataset_name": str(output_dir / "data"),
            "dataset_train_split": "train",
            "dataset_test_split": "test",
        }
