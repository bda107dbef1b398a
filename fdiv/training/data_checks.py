"""Preference data: the checks that give a clear error early, and the tokenisation of the f-DPO trainer for others.

Rows are TRL's preference type: `chosen`, `rejected` and (optionally) `prompt`, each a string or a list of
`{role, content}` messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from fdiv.errors import DataError
from fdiv.models.loading import check_pad_token

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_pad_token", "check_preference_dataset", "tokenize_preferences"]


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    messages = isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)
    return "messages" if messages else None


def check_preference_dataset(dataset: Dataset | IterableDataset | None, name: str) -> None:
    """Check that `dataset` (called `name` in the message) holds preference rows; of a stream, the first alone.

    Raises:
        DataError: (a ValueError) it is missing or empty, a column is missing, or a value is neither text nor messages.
    """
    remedy = (
        "f-DPO needs rows with `chosen` and `rejected`, and optionally `prompt`, each a string or a list of "
        "{role, content} messages"
    )
    if dataset is None:
        raise DataError(f"{name} is missing: {remedy}")
    first = next(iter(dataset), None)
    if first is None:
        raise DataError(f"{name} is empty: {remedy}. Check the split name and the filters applied to it")
    missing = [column for column in ("chosen", "rejected") if column not in first]
    if missing:
        raise DataError(
            f"{name} has no column {' and no column '.join(map(repr, missing))}; it has {sorted(first)}: {remedy}. "
            "Rename the columns (`dataset.rename_columns`) before training"
        )
    columns = [column for column in ("prompt", "chosen", "rejected") if column in first]
    whole = hasattr(dataset, "__len__")
    rows = dataset.select_columns(columns) if whole and hasattr(dataset, "select_columns") else [first]
    expected = None
    for number, row in enumerate(rows):
        kinds = {column: _kind(row[column]) for column in columns}
        for column, kind in kinds.items():
            if kind is None:
                raise DataError(f"{name}, row {number}: column {column!r} is {row[column]!r:.80}: {remedy}")
        if len(set(kinds.values())) > 1:
            raise DataError(f"{name}, row {number}: mixes strings and messages ({kinds}): use one of the two")
        expected = expected or kinds
        if kinds != expected:
            raise DataError(
                f"{name}, row {number}: holds {kinds['chosen']}, row 0 {expected['chosen']}: use one of the two"
            )


def tokenize_preferences(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None, name: str = "eval"
) -> Dataset:
    """Add `prompt_ids`, `chosen_ids`, `rejected_ids`, exactly as `DPOTrainer` tokenises its own data.

    An eos token ends string completions; conversational rows go through the chat template. Rows whose prompt alone
    fills `max_length` are dropped.

    Raises:
        DataError: (a ValueError) see `check_preference_dataset`; or nothing is left after the drop.
    """
    from trl import DPOTrainer

    check_preference_dataset(dataset, f"the {name} dataset")
    settings = SimpleNamespace(max_length=max_length, truncation_mode="keep_start", dataset_num_proc=None)
    # The method only reads `self._tokenizer`; borrowing it keeps one tokenisation for training and evaluation.
    tokenized = DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), dataset, tokenizer, settings, name)
    if len(tokenized) == 0:
        raise DataError(f"every prompt of the {name} dataset fills max_length={max_length} alone: raise max_length")
    return tokenized
