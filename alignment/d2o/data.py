"""Rows of human-labelled negatives for D²O: checks, tokenisation (TRL's own) and the padded batch.

A row has `prompt` and `rejected`, each a string or a list of `{role, content}` messages, and optionally `anchors`, a
list of answers to use instead of sampled ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fdiv.errors import DataError
from fdiv.training.data_checks import tokenize_preferences

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from fdiv.alignment.d2o.anchors import Anchor

__all__ = ["check_negatives", "collate_groups", "prepare_negatives", "tokenize_negatives"]


def prepare_negatives(
    rows: Any, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, anchors: int, name: str
) -> Dataset:
    """`check_negatives`, then `tokenize_negatives`; rows that went through it before are returned as they are."""
    if "prompt_ids" in (getattr(rows, "column_names", None) or ()):
        return rows
    check_negatives(rows, name, anchors)
    return tokenize_negatives(rows, tokenizer, max_length=max_length, anchors=anchors, name=name)


def check_negatives(dataset: Any, name: str, anchors: int) -> None:
    """Check that `dataset` (called `name` in messages) holds rows for D²O; looks at every row.

    Args:
        dataset: what the trainer was given.
        name: for messages.
        anchors: K, which an `anchors` column must provide for.

    Raises:
        DataError: missing, empty or streamed data, a missing column, an empty answer, too few given anchors.
    """
    from datasets import Dataset

    remedy = "D2O needs rows with `prompt` and `rejected`, each a string or a list of {role, content} messages"
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"{name} is a {type(dataset).__name__}: {remedy}, as a datasets.Dataset (not a stream: anchors belong to "
            "all prompts)"
        )
    missing = [column for column in ("prompt", "rejected") if column not in dataset.column_names]
    if missing:
        raise DataError(f"{name} has no column {missing[0]!r}; it has {sorted(dataset.column_names)}: {remedy}")
    if len(dataset) == 0:
        raise DataError(f"{name} is empty: {remedy}. Check the split name and the filters applied to it")
    for number, row in enumerate(dataset):
        for column in ("prompt", "rejected"):
            if not _text(row[column]).strip():
                raise DataError(f"{name}, row {number}: {column!r} is empty ({row[column]!r:.80}): leave the row out")
        given = row.get("anchors")
        if given is None:
            continue
        if len(given) < anchors:
            raise DataError(
                f"{name}, row {number}: `anchors` holds {len(given)} answers and num_generations={anchors} asks for "
                "more: lower num_generations or add answers"
            )
        if not all(_text(answer).strip() for answer in given):
            raise DataError(f"{name}, row {number}: an answer in `anchors` is empty: leave it out")


def _text(value: Any) -> str:
    """The plain text of a string or of messages; empty for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(message, Mapping) for message in value):
        return " ".join(str(message.get("content", "")) for message in value)
    return ""


def tokenize_negatives(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, anchors: int, name: str
) -> Dataset:
    """Add `prompt_ids`, `rejected_ids` and, for rows with `anchors`, `anchor_ids`, tokenised as by TRL's DPO trainer.

    Sequences are cut to `max_length` tokens at their end; rows whose prompt alone fills it are dropped.

    Raises:
        DataError: nothing is left after the drop.
    """
    columns = dataset.column_names
    given = "anchors" in columns and anchors > 0
    answers = [[row["rejected"], *(row["anchors"][:anchors] if given else ())] for row in dataset]
    pairs = [
        {"prompt": row["prompt"], "chosen": answer, "rejected": answer, "row": number}
        for number, row in enumerate(dataset.select_columns("prompt"))
        for answer in answers[number]
    ]
    tokenized = tokenize_preferences(type(dataset).from_list(pairs), tokenizer, max_length=max_length, name=name)
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for pair in tokenized:
        groups.setdefault(pair["row"], []).append(pair)
    kept = [number for number, group in groups.items() if len(group) == len(answers[number])]
    prompt_ids, rejected_ids, anchor_ids = [], [], []
    for number in kept:
        prompt, completions = _common_prompt(groups[number], max_length)
        prompt_ids.append(prompt)
        rejected_ids.append(completions[0])
        anchor_ids.append(completions[1:])
    result = dataset.select(kept).add_column("prompt_ids", prompt_ids).add_column("rejected_ids", rejected_ids)
    return result.add_column("anchor_ids", anchor_ids) if given else result


def _common_prompt(group: Sequence[Mapping[str, Any]], max_length: int | None) -> tuple[list[int], list[list[int]]]:
    """The prompt tokens all answers share, and what follows them, as TRL splits a pair."""
    start = min(len(row["prompt_ids"]) for row in group)
    full = [(row["prompt_ids"] + row["rejected_ids"])[:max_length] for row in group]
    return full[0][:start], [ids[start:] for ids in full]


def collate_groups(
    rows: Sequence[Mapping[str, Any]],
    groups: Sequence[Sequence[Anchor]],
    pad_token_id: int,
    eos_token_ids: Sequence[int],
) -> dict[str, Tensor]:
    """One padded batch of B groups of K anchors and, last in each group, the rejected answer.

    Args:
        rows: with `prompt_ids` and `rejected_ids`.
        groups: K anchors for each row.
        pad_token_id: fills on the right; no mask depends on its value.
        eos_token_ids: an anchor that ends with none of them was cut.

    Returns:
        `input_ids`, `attention_mask`, `completion_mask` `[B, K+1, T]`; `anchor_log_prob` (NaN: not known),
        `harmfulness` (NaN: none) and `anchor_cut` `[B, K]`, float32, float32 and bool.
    """
    sequences = [
        [(list(row["prompt_ids"]), ids) for ids in (*(a.completion_ids for a in group), list(row["rejected_ids"]))]
        for row, group in zip(rows, groups, strict=True)
    ]
    width = max(len(prompt) + len(completion) for group in sequences for prompt, completion in group)
    shape = (len(rows), len(sequences[0]), width)
    batch = {"input_ids": torch.full(shape, pad_token_id)}
    batch |= {name: torch.zeros(shape, dtype=torch.long) for name in ("attention_mask", "completion_mask")}
    for i, group in enumerate(sequences):
        for j, (prompt, completion) in enumerate(group):
            end = len(prompt) + len(completion)
            batch["input_ids"][i, j, :end] = torch.tensor([*prompt, *completion])
            batch["attention_mask"][i, j, :end] = 1
            batch["completion_mask"][i, j, len(prompt) : end] = 1
    ends = set(eos_token_ids)
    values = {
        "anchor_log_prob": [[_number(a.log_prob) for a in group] for group in groups],
        "harmfulness": [[_number(a.harmfulness) for a in group] for group in groups],
    }
    size = (len(rows), shape[1] - 1)
    batch |= {name: torch.tensor(value, dtype=torch.float32).view(size) for name, value in values.items()}
    cut = [[a.completion_ids[-1] not in ends for a in group] for group in groups]
    return batch | {"anchor_cut": torch.tensor(cut, dtype=torch.bool).view(size)}


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
