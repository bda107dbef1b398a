"""A teacher and a student for distillation, built offline: short reviews by two models of different size."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fdiv.models.tiny import train_tiny_model
from fdiv.recipes.tasks.tiny.texts import review, small_model, word_tokenizer

__all__ = ["TinyDistillationConfig"]


@dataclass
class TinyDistillationConfig:
    """Recipe block `prepare: {name: tiny_distillation}`: reviews, a teacher that writes them, a smaller student.

    The student has seen a tenth of the teacher's steps and has a quarter of its width, so no student is the teacher:
    each divergence has an optimum of its own.

    Args:
        seed: of corpus and weights. teacher_steps: optimizer steps of the teacher on batches of 128 fresh reviews.
        rows: reviews to train on; a quarter as many are held out.
    """

    seed: int = 0
    teacher_steps: int = 300
    rows: int = 256

    def __post_init__(self) -> None:
        for name, least in (("teacher_steps", 20), ("rows", 4)):
            if getattr(self, name) < least:
                raise ValueError(f"prepare.{name} must be at least {least}, got {getattr(self, name)}")

    def build(self, output_dir: Path) -> dict[str, Any]:
        """Write `teacher/`, `student/` and `data/`: `train.jsonl` and `test.jsonl`, a prompt being three words.

        Returns:
            The recipe keys it sets: `model_name_or_path`, `teacher_model_name_or_path`, `dataset_name` and its splits.
        """
        output_dir = Path(output_dir)
        draw = random.Random(self.seed)
        tokenizer = word_tokenizer(review)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for name, width, steps in (("teacher", 64, self.teacher_steps), ("student", 16, self.teacher_steps // 10)):
                model = small_model(tokenizer, hidden_size=width)
                train_tiny_model(model, tokenizer, lambda: review(draw), steps)
                model.save_pretrained(output_dir / name)
                tokenizer.save_pretrained(output_dir / name)
        (output_dir / "data").mkdir(parents=True, exist_ok=True)
        for split, count in (("train", self.rows), ("test", max(1, self.rows // 4))):
            lines = [json.dumps(_row(review(draw)[1])) for _ in range(count)]
            (output_dir / "data" / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return {
            "model_name_or_path": str(output_dir / "student"),
            "teacher_model_name_or_path": str(output_dir / "teacher"),
            "dataset_name": str(output_dir / "data"),
            "dataset_train_split": "train",
            "dataset_test_split": "test",
        }


def _row(text: str) -> dict[str, str]:
    words = text.split()
    return {"prompt": " ".join(words[:3]), "completion": " " + " ".join(words[3:])}
