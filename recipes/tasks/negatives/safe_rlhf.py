"""PKU-SafeRLHF as D²O uses it: the answers that people marked unsafe, and no others."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fdiv.filling import check_template, fill
from fdiv.rows.checks import any_text_fault, check_rows, null_fault
from fdiv.rows.loading import read_file
from fdiv.rows.sources import source_of

__all__ = ["SafeRLHFNegativesConfig"]

_COLUMNS = ("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe")


@dataclass
class SafeRLHFNegativesConfig:
    """Recipe block `prepare: {name: safe_rlhf_negatives}`: one row for each answer marked unsafe.

    Args:
        data: hub id of PKU-SafeRLHF or a local json, jsonl or parquet file with its columns.
        split: the hub's split.
        prompt_format: the model's prompt, with `{prompt}` for the question.
        answer_prefix: put before every answer (a space, where the prompt ends without one).
        max_rows: keep the first N. None: all.
    """

    data: str = "PKU-Alignment/PKU-SafeRLHF"
    split: str = "train"
    prompt_format: str = "{prompt}"
    answer_prefix: str = ""
    max_rows: int | None = None

    def __post_init__(self) -> None:
        check_template(self.prompt_format, ("prompt",), needs=("prompt",), what="prepare.prompt_format")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"prepare.max_rows={self.max_rows}: must be at least 1")

    def build(self, output_dir: Path) -> dict[str, Any]:
        """Write `train.jsonl` with the columns prompt and rejected.

        Returns:
            The recipe keys it sets: `dataset_name`, `dataset_train_split`.

        Raises:
            FileNotFoundError: a local file that is not there.
            ValueError: a column is missing, or no answer is marked unsafe.
        """
        rows = self._rows()
        missing = [column for column in _COLUMNS if column not in rows.column_names]
        if missing:
            raise ValueError(f"{self.data} has no column {missing[0]!r}: PKU-SafeRLHF's {_COLUMNS} are needed")
        texts = dict.fromkeys(_COLUMNS[:3], any_text_fault) | dict.fromkeys(_COLUMNS[3:], null_fault)
        check_rows(rows.select_columns(list(_COLUMNS)), source_of(rows, self.data), texts)
        negatives = dict.fromkeys(
            (row["prompt"], row[f"response_{side}"].strip())
            for row in rows
            for side in (0, 1)
            if not row[f"is_response_{side}_safe"] and row["prompt"].strip() and row[f"response_{side}"].strip()
        )
        if not negatives:
            raise ValueError(f"{self.data}, split {self.split!r}: no answer is marked unsafe")
        output_dir = Path(output_dir)
        with (output_dir / "train.jsonl").open("w", encoding="utf-8") as file:
            for prompt, answer in list(negatives)[: self.max_rows]:
                row = {
                    "prompt": fill(self.prompt_format, prompt=prompt),
                    "rejected": self.answer_prefix + answer,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        (output_dir / "prepare.json").write_text(json.dumps(asdict(self), indent=2) + "\n")
        return {"dataset_name": str(output_dir / "train.jsonl"), "dataset_train_split": "train"}

    def _rows(self) -> Any:
        from datasets import load_dataset

        path = Path(self.data)
        if path.is_file():
            return read_file(path, self.split)
        if path.is_absolute() or self.data.startswith("."):
            raise FileNotFoundError(f"{self.data} does not exist: set prepare.data to a file or a hub id")
        return load_dataset(self.data, split=self.split)
