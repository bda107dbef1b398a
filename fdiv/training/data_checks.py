"""Preference data: the checks that give a clear error early, and the tokenisation of the f-DPO trainer for others.

Rows are TRL's preference type: `chosen`, `rejected` and (optionally) `prompt`, each a string or a list of
`{role, content}` messages.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from fdiv.errors import DataError
from fdiv.inference.encoding import Encoding
from fdiv.models.loading import check_pad_token
from fdiv.rows.checks import (
    Check,
    answer_fault,
    check_columns,
    check_one_format,
    check_rows,
    checked_stream,
    null_fault,
    prompt_fault,
)
from fdiv.rows.report import RowReport
from fdiv.rows.sources import Source, source_of

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "check_pad_token",
    "check_preference_dataset",
    "check_prompts",
    "encode_preferences",
    "encoding_of",
    "gold_checks",
    "named_rows",
    "preference_report",
    "report_name",
    "row_variables",
    "tokenize_preferences",
    "with_checked",
]

DEFAULT_ENCODING = Encoding()


_REMEDY = (
    "{method} needs rows with `chosen` and `rejected`, and optionally `prompt`, each a string or a list of {{role, "
    "content}} messages"
)


def check_preference_dataset(dataset: Dataset | IterableDataset | None, name: str, method: str = "f-DPO") -> Any:
    """Check every row of preferences; those of a stream as they are read.

    Args:
        dataset: the rows. name: what messages call them where their file is not known. method: what needs them.

    Returns:
        `dataset`, a stream with its checks.

    Raises:
        DataError: (a ValueError) they are missing or empty, a column is missing, the rows are whole in another format
            too, or a value is neither text nor messages.
    """
    remedy = _REMEDY.format(method=method)
    if dataset is None:
        raise DataError(f"{name} is missing: {remedy}")
    source = source_of(dataset, name)
    first = next(iter(dataset), None)
    if first is None:
        raise DataError(f"{name} is empty: {remedy}. Check the split name and the filters applied to it")
    check_columns(first, Source(name), ("chosen", "rejected"), f"{remedy}. Rename the columns before training")
    columns = [column for column in ("prompt", "chosen", "rejected") if column in first]
    check_one_format(first, source, columns, beside=("question", "answer"))
    checks = dict.fromkeys(columns, partial(answer_fault, blank=True)) | (
        {"prompt": partial(prompt_fault, blank=True)} if "prompt" in columns else {}
    )
    if not hasattr(dataset, "__len__"):
        return checked_stream(dataset, source, checks, remedy, columns)
    check_rows(dataset.select_columns(columns), source, checks, remedy, one_kind=columns)
    return dataset


def preference_report(
    read: int, used: Dataset, max_length: int | None, name: str, left_out: int = 0, keep_end: bool = False
) -> RowReport:
    """What became of preference rows that `DPOTrainer` has tokenised.

    Args:
        read: rows of the data. used: those left, with `prompt_ids`, `chosen_ids`, `rejected_ids`.
        max_length: bound on a row. name: of the report. left_out: rows left out on request.
        keep_end: the beginning of a longer row is cut, not its end.
    """
    cut = longest = same = empty = 0
    for row in used.select_columns(["prompt_ids", "chosen_ids", "rejected_ids", "chosen", "rejected"]):
        kept = slice(None)
        if max_length is not None:
            kept = slice(-max_length, None) if keep_end else slice(max_length - len(row["prompt_ids"]))
        tokens = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        longest, cut = max(longest, tokens), cut + (max_length is not None and tokens > max_length)
        identical = row["chosen_ids"][kept] == row["rejected_ids"][kept]
        same += identical
        empty += not identical and any(_says_nothing(row, half) for half in ("chosen", "rejected"))
    dropped = read - left_out - len(used)
    return RowReport(
        name, read, left_out, {f"prompt fills max_length={max_length}": dropped}, max_length, cut, longest or None,
        {"identical after truncation": same, "without a chosen or a rejected answer": empty}, "pairs",
        "beginning" if keep_end else "end",
    )  # fmt: skip


def check_prompts(
    rows: Any, name: str, method: str, *, blank: bool = False, more: Mapping[str, Check] | None = None
) -> Any:
    """Check every row of prompts to sample from; those of a stream as they are read.

    Args:
        rows: with a column `prompt`. name: what messages call them where their file is not known.
        method: what needs them. blank: whether a prompt may be empty. more: checks of further columns.

    Returns:
        `rows`, a stream with its checks.

    Raises:
        DataError: (a ValueError) no column `prompt`, no rows, rows that are whole in another format too, a prompt that
            is empty or neither text nor messages that end with something to answer, or what `more` finds.
    """
    remedy = f"{method} needs rows with `prompt`, a string or a list of {{role, content}} messages, one of the two"
    source, checks = source_of(rows, name), {"prompt": partial(prompt_fault, blank=blank), **(more or {})}
    columns = getattr(rows, "column_names", None)
    if columns is not None:
        check_columns(columns, Source(name), tuple(checks), remedy)
        check_one_format(columns, source, ("prompt",), beside=("question", "answer", "completion", "chosen"))
    if not hasattr(rows, "__len__"):
        return checked_stream(rows, source, checks, remedy, ("prompt",))
    if len(rows) == 0:
        raise DataError(f"{name} is empty: {remedy}. Check the split name and the filters applied to it")
    check_rows(rows.select_columns(list(checks)), source, checks, remedy, one_kind=("prompt",))
    return rows


def with_checked(datasets: Mapping[str, Any], eval_dataset: Any) -> tuple[Any, Any]:
    """(train_dataset, eval_dataset) of checked datasets by their names, the second in the form that was given."""
    if isinstance(eval_dataset, Mapping):
        evals: Any = {key: datasets[f"eval_dataset[{key!r}]"] for key in eval_dataset}
    else:
        evals = datasets.get("eval_dataset")
    return datasets.get("train_dataset"), evals


def named_rows(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """The datasets of a trainer by the names that messages use; those that are None are left out."""
    evals = eval_dataset if isinstance(eval_dataset, Mapping) else {None: eval_dataset}
    named = {"eval_dataset" if key is None else f"eval_dataset[{key!r}]": rows for key, rows in evals.items()}
    return {name: rows for name, rows in {"train_dataset": train_dataset, **named}.items() if rows is not None}


def report_name(name: str, unit: str = "rows") -> str:
    """What the report of a dataset of a trainer is called: `training rows`."""
    kind = {"train_dataset": "training", "eval_dataset": "evaluation"}.get(name)
    return f"{unit} of {name}" if kind is None else f"{kind} {unit}"


def gold_checks(reward: Any) -> dict[str, Check]:
    """Checks of the columns that a reward compares with; nothing for a reward that does not say which they are.

    A reward says so in `gold_columns`; a plain function by its parameters without a default, of which only the
    presence is checked.
    """
    named = getattr(reward, "gold_columns", None)
    if named is not None:
        return dict.fromkeys(named, _missing_gold)
    if not inspect.isfunction(reward):
        return {}
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(reward).parameters.values()
    needed = [p.name for p in parameters if p.kind in kinds and p.default is p.empty and p.name not in _GIVEN]
    return {name: lambda value: None for name in needed}


# What TRL passes to a reward function besides the columns of the data.
_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")


def _missing_gold(value: Any) -> str | None:
    return "is empty" if isinstance(value, str) and not value.strip() else null_fault(value)


def _says_nothing(row: Mapping[str, Any], half: str) -> bool:
    """Whether an answer is no more than its end."""
    if isinstance(row[half], str):
        return len(row[f"{half}_ids"]) <= 1
    content = row[half][-1].get("content")
    return isinstance(content, str) and not content.strip()


def tokenize_preferences(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    encoding: Encoding = DEFAULT_ENCODING,
    max_length: int | None = None,
    name: str = "eval",
    method: str = "f-DPO",
) -> Dataset:
    """Add `prompt_ids`, `chosen_ids`, `rejected_ids`, as the f-DPO trainer tokenises its own data.

    Rows whose prompt alone fills `max_length` are dropped.

    Raises:
        DataError: (a ValueError) see `check_preference_dataset`; or nothing is left after the drop.
    """
    check_preference_dataset(dataset, f"the {name} dataset", method)
    tokenized = encode_preferences(dataset, tokenizer, encoding, max_length=max_length, name=name)
    if len(tokenized) == 0:
        raise DataError(f"every prompt of the {name} dataset fills max_length={max_length} alone: raise max_length")
    return tokenized


def encode_preferences(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    *,
    max_length: int | None,
    name: str,
    num_proc: int | None = None,
    kept: list[int] | None = None,
) -> Any:
    """A dataset, or a stream, with `prompt_ids`, `chosen_ids`, `rejected_ids`: both answers follow one prompt.

    Columns `chat_template_kwargs` and `tools` of a row are passed to the chat template. Rows whose prompt fills
    `max_length` are dropped; of a dataset the numbers of the others are appended to `kept`.
    """
    from trl.data_utils import extract_prompt

    whole = hasattr(dataset, "__len__")  # a stream has no progress bar and no processes
    shown = {"num_proc": num_proc, "desc": f"Tokenizing {name} dataset"} if whole else {}
    if "prompt" not in next(iter(dataset)):
        dataset = dataset.map(extract_prompt, **shown)
    dataset = dataset.map(_encode_pair, fn_kwargs={"tokenizer": tokenizer, "encoding": encoding}, **shown)
    if kept is not None and whole:
        kept += [n for n, ids in enumerate(dataset["prompt_ids"]) if max_length is None or len(ids) < max_length]
    if max_length is None:
        return dataset
    shown = {**shown, "desc": f"Dropping prompts of the {name} dataset that fill max_length"} if whole else {}
    return dataset.filter(lambda row: len(row["prompt_ids"]) < max_length, **shown)


def _encode_pair(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> dict[str, list[int]]:
    answers = [row["chosen"], row["rejected"]]
    prompt_ids, (chosen, rejected) = encoding.encode_answers(tokenizer, row["prompt"], answers, **row_variables(row))
    return {"prompt_ids": prompt_ids, "chosen_ids": chosen, "rejected_ids": rejected}


def row_variables(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row itself gives the chat template: its `tools` and `chat_template_kwargs`."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return dict(row.get("chat_template_kwargs") or {}) | ({"tools": tools} if tools else {})


def encoding_of(args: Any) -> Encoding:
    """The encoding of a training config; the default for one that has none."""
    return args.encoding() if hasattr(args, "encoding") else DEFAULT_ENCODING
