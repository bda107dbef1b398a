"""Rows of human-labelled negatives for D²O: checks, tokenisation and the padded batch.

A row has `prompt` and `rejected`, each a string or a list of `{role, content}` messages, and optionally `anchors`, a
list of answers to use instead of sampled ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fdiv.errors import DataError
from fdiv.inference.encoding import Encoding
from fdiv.rows.checks import Check, answer_fault, check_columns, check_one_format, check_rows, prompt_fault, shown
from fdiv.rows.report import RowReport
from fdiv.rows.sources import Source, source_of
from fdiv.training.data_checks import report_name, row_variables

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from fdiv.alignment.d2o.anchors import Anchor

__all__ = ["check_negatives", "collate_groups", "prepare_negatives", "tokenize_negatives"]

GENERATION = Encoding(context="generation")


def prepare_negatives(
    rows: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    anchors: int,
    name: str,
    report: Callable[[RowReport], None] = RowReport.show,
    encoding: Encoding = GENERATION,
    kept: list[int] | None = None,
) -> Dataset:
    """`check_negatives`, then `tokenize_negatives`; rows that went through it before are returned as they are."""
    if "prompt_ids" in (getattr(rows, "column_names", None) or ()):
        return rows
    check_negatives(rows, name, anchors)
    return tokenize_negatives(
        rows,
        tokenizer,
        max_length=max_length,
        anchors=anchors,
        name=name,
        report=report,
        encoding=encoding,
        kept=kept,
    )


def check_negatives(dataset: Any, name: str, anchors: int) -> None:
    """Check that `dataset` holds rows for D²O; looks at every row.

    Args:
        dataset: what the trainer was given.
        name: for messages, where the file of the rows is not known.
        anchors: K, which an `anchors` column must provide for.

    Raises:
        DataError: missing, empty or streamed data, a missing column, rows that are whole in another format too, a
            prompt or an answer that is empty or neither text nor messages, too few given anchors.
    """
    from datasets import Dataset

    remedy = "D2O needs rows with `prompt` and `rejected`, each a string or a list of {role, content} messages"
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"{name} is a {type(dataset).__name__}: {remedy}, as a datasets.Dataset (not a stream: anchors belong to "
            "all prompts)"
        )
    needed = ("prompt", "rejected")
    check_columns(dataset.column_names, Source(name), needed, remedy)
    if len(dataset) == 0:
        raise DataError(f"{name} is empty: {remedy}. Check the split name and the filters applied to it")
    source = source_of(dataset, name)
    check_one_format(dataset.column_names, source, needed, beside=("question", "answer", "chosen", "completion"))
    checks: dict[str, Check] = {"prompt": prompt_fault, "rejected": answer_fault}
    optional: tuple[str, ...] = ()
    if "anchors" in dataset.column_names:
        checks["anchors"], optional = partial(_anchors_fault, count=anchors), ("anchors",)
    check_rows(dataset.select_columns(list(checks)), source, checks, remedy, one_kind=needed, optional=optional)


def _anchors_fault(value: Any, count: int) -> str | None:
    """At least `count` answers are due."""
    if not isinstance(value, list):
        return f"is {shown(value)}, not a list of answers"
    if len(value) < count:
        return (
            f"holds {len(value)} answers and num_generations={count} asks for more: lower num_generations or add "
            "answers"
        )
    faults = ((number, answer_fault(answer)) for number, answer in enumerate(value))
    return next((f"has an answer {number} that {fault}" for number, fault in faults if fault), None)


def tokenize_negatives(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    anchors: int,
    name: str,
    report: Callable[[RowReport], None] = RowReport.show,
    encoding: Encoding = GENERATION,
    kept: list[int] | None = None,
) -> Dataset:
    """Add `prompt_ids`, `rejected_ids` and, for rows with `anchors`, `anchor_ids`.

    The prompt is the one that anchors are sampled from, the generation prompt, and all answers follow it. They are cut
    where prompt and answer exceed `max_length` tokens; rows whose prompt alone fills it are dropped. What became of
    the rows is passed to `report`; the numbers of those that are left are appended to `kept`.

    Raises:
        DataError: nothing is left after the drop.
    """
    given = "anchors" in dataset.column_names and anchors > 0
    kept = [] if kept is None else kept
    columns: dict[str, list[Any]] = {"prompt_ids": [], "rejected_ids": [], "anchor_ids": []}
    cut = longest = 0
    for number, row in enumerate(dataset):
        answers = [row["rejected"], *(row["anchors"][:anchors] if given else ())]
        prompt_ids, ids = encoding.encode_answers(tokenizer, row["prompt"], answers, **row_variables(row))
        if max_length is not None and len(prompt_ids) >= max_length:
            continue
        room = None if max_length is None else max_length - len(prompt_ids)
        tokens = len(prompt_ids) + max(map(len, ids))
        longest, cut = max(longest, tokens), cut + (max_length is not None and tokens > max_length)
        kept.append(number)
        columns["prompt_ids"].append(prompt_ids)
        columns["rejected_ids"].append(ids[0][:room])
        columns["anchor_ids"].append([answer[:room] for answer in ids[1:]])
    if not kept:
        raise DataError(f"every prompt of the {name} dataset fills max_length={max_length} alone: raise max_length")
    dropped = {f"prompt fills max_length={max_length}": len(dataset) - len(kept)}
    report(
        RowReport(report_name(name), len(dataset), dropped=dropped, max_length=max_length, cut=cut, longest=longest)
    )
    result = dataset.select(kept)
    for column in ("prompt_ids", "rejected_ids", *(("anchor_ids",) if given else ())):
        result = result.add_column(column, columns[column])
    return result


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
