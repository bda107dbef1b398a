"""Preference pairs from TOFU's perturbed rows: the paraphrased answer is preferred to each perturbed (wrong) answer.

TOFU (Maini et al., arXiv:2401.06121) ships, for every question of `forget*_perturbed` and `retain_perturbed`, a
paraphrase of the true answer and several perturbed ones: the same sentence with wrong facts. A model trained on the
original answers has memorised those word by word, so original-against-perturbed is solved before the first step; the
paraphrase was never seen in training, so ranking it above the perturbed answers asks for the fact itself. The split is
by question: no question of the test set has a pair in the training set.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fdiv.files import read_json_lines
from fdiv.rows.checks import check_rows, text_fault, texts_fault
from fdiv.rows.sources import Source

PROMPT = "{bos}Question: {question}\nAnswer:"
"""The prompt that plain TOFU models, without a chat template, are trained on; the answer follows after a space."""

_COLUMNS = ("question", "paraphrased_answer", "perturbed_answer")


@dataclass
class TofuPreferencesConfig:
    """Recipe block `prepare: {name: tofu_preferences}`: write train and test preference pairs of TOFU rows.

    Args:
        data: directory with the TOFU files, one JSON object a line (`forget10_perturbed.json` …).
        files: the perturbed files to read from it, without `.json`.
        test_fraction: share of the questions whose pairs go to the test split, in (0, 1).
        validation_fraction: share that goes to the split `validation`, for choosing settings without the test split
            (`--dataset_test_split validation`); 0 makes none.
        bos: text put before every prompt: the token the model's training rows began with; "" for a tokenizer that adds
            its own.
        seed: of the split and of the order of the rows.
    """

    data: str
    files: list[str] = field(default_factory=lambda: ["forget10_perturbed", "retain_perturbed"])
    test_fraction: float = 0.3
    validation_fraction: float = 0.1
    bos: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError(
                "prepare.files is empty: name at least one perturbed TOFU file, such as forget10_perturbed"
            )
        if not (self.test_fraction > 0 and self.validation_fraction >= 0):
            raise ValueError(
                f"prepare.test_fraction={self.test_fraction} must be positive and "
                f"prepare.validation_fraction={self.validation_fraction} not negative"
            )
        if not self.test_fraction + self.validation_fraction < 1:
            raise ValueError(
                f"prepare.test_fraction={self.test_fraction} and validation_fraction={self.validation_fraction} leave "
                "nothing to train on: their sum must stay below 1"
            )

    def build(self, output_dir: Path) -> dict[str, Any]:
        """Write `data/{train,validation,test}.jsonl` with the columns prompt, chosen, rejected.

        Returns:
            The recipe keys it sets: `dataset_name`, `dataset_train_split`, `dataset_test_split`.

        Raises:
            FileNotFoundError: the directory or one of the files is missing.
            ValueError: a row lacks one of the columns, or a split would be empty.
        """
        questions: dict[str, list[dict[str, str]]] = {}
        for name in self.files:
            for row in _read_rows(Path(self.data) / f"{name}.json"):
                questions.setdefault(row["question"].strip(), []).extend(self._pairs(row))
        names = sorted(questions)
        random.Random(self.seed).shuffle(names)
        n_test = round(self.test_fraction * len(names))
        n_held = n_test + round(self.validation_fraction * len(names))
        splits = {"test": names[:n_test], "validation": names[n_test:n_held], "train": names[n_held:]}
        if not self.validation_fraction:
            del splits["validation"]
        for split, members in splits.items():
            if not members:
                raise ValueError(
                    f"the {split} split of {len(names)} questions is empty: change its share or add files"
                )
        data_dir = Path(output_dir) / "data"
        data_dir.mkdir(parents=True, exist_ok=True)
        for split, members in splits.items():
            pairs = [pair for question in members for pair in questions[question]]
            random.Random(self.seed).shuffle(pairs)
            with (data_dir / f"{split}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        return {"dataset_name": str(data_dir), "dataset_train_split": "train", "dataset_test_split": "test"}

    def _pairs(self, row: dict[str, Any]) -> list[dict[str, str]]:
        """One pair per perturbed answer of the row; one equal to the paraphrase is no preference and left out."""
        prompt = PROMPT.format(bos=self.bos, question=row["question"])
        chosen = " " + row["paraphrased_answer"]
        return [
            {"prompt": prompt, "chosen": chosen, "rejected": " " + answer}
            for answer in row["perturbed_answer"]
            if answer.strip() != row["paraphrased_answer"].strip()
        ]


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one perturbed file, with their columns checked."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: set prepare.data to the directory that holds TOFU's *_perturbed.json files"
        )
    rows = read_json_lines(path)
    if not rows:
        raise ValueError(f"{path} is empty")
    checks = dict.fromkeys(_COLUMNS, text_fault) | {"perturbed_answer": texts_fault}
    check_rows(rows, Source(str(path), path), checks, f"a perturbed TOFU file with {', '.join(_COLUMNS)} is needed")
    return rows


__all__ = ["PROMPT", "TofuPreferencesConfig"]
