"""Rows of distillation: checks, the choice between given and own completions, and the tokens of given ones.

A row has `prompt` and, where given completions are used, `completion`, each a string or a list of {role, content}
messages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fdiv.errors import DataError
from fdiv.inference.encoding import Encoding
from fdiv.rows.checks import answer_fault, check_columns, check_one_format, checked_stream, prompt_fault
from fdiv.rows.checks import check_rows as check_values
from fdiv.rows.sources import Source, source_of
from fdiv.training.data_checks import row_variables

__all__ = ["TEACHER_PROMPT", "batch_tensors", "check_rows", "completion_tokens", "samples_itself"]

TEACHER_PROMPT = "teacher_prompt"
"""The column that the teacher reads in place of `prompt`."""


def check_rows(rows: Any, name: str, given: bool, own: str | None = None) -> Any:
    """Check every row (called `name` in messages); those of a stream as they are read.

    Args:
        given: whether completions are taken from the rows.
        own: what the teacher is, where it is made of the student's weights, so that a `teacher_prompt` is needed.

    Returns:
        `rows`, a stream with its checks.

    Raises:
        DataError: missing or empty data, a missing column, rows that are whole in another format too, a prompt or
            completion that is empty or neither text nor messages, or both kinds.
    """
    columns: tuple[str, ...] = ("prompt", "completion") if given else ("prompt",)
    needed = " and ".join(f"`{column}`" for column in columns)
    remedy = f"distillation needs rows with {needed}, each a string or a list of {{role, content}} messages"
    if given:
        remedy += " (on_policy_share: 1 needs no completion)"
    if rows is None:
        raise DataError(f"{name} is missing: {remedy}")
    source = source_of(rows, name)
    first = next(iter(rows), None)
    if first is None:
        raise DataError(f"{name} is empty: {remedy}. Check the split name and the filters applied to it")
    check_columns(first, Source(name), columns, remedy)
    if own is not None and TEACHER_PROMPT not in first:
        raise DataError(
            f"{name} has no column {TEACHER_PROMPT!r}, and the teacher is {own}: on the same prompt both are one "
            "model, and the loss is 0. Give rows what the teacher reads in place of the prompt (a demonstration, a "
            "hint, a rule), or take another teacher"
        )
    columns += (TEACHER_PROMPT,) if TEACHER_PROMPT in first else ()
    check_one_format(first, source, columns, beside=("question", "answer", "completion", "chosen"))
    checks = {"prompt": prompt_fault, "completion": answer_fault, TEACHER_PROMPT: prompt_fault}
    checks = {column: checks[column] for column in columns}
    if not hasattr(rows, "__len__"):
        return checked_stream(rows, source, checks, remedy, columns)
    check_values(rows.select_columns(list(columns)), source, checks, remedy, one_kind=columns)
    return rows


def samples_itself(prompt: Any, share: float, seed: int, epoch: int) -> bool:
    """Whether the student samples the completion of this row in this epoch: with probability `share`.

    A function of (seed, epoch, prompt) alone, so that it is the same on any number of processes and after a resume.
    """
    if share in (0.0, 1.0):
        return share == 1.0
    key = json.dumps([seed, epoch, prompt], sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") < share * 2.0**64


def completion_tokens(
    tokenizer: Any, row: Mapping[str, Any], encoding: Encoding, end_ids: Sequence[int]
) -> tuple[list[int], list[int]]:
    """(prompt, completion) of a row as token ids, as the model would have had to sample it; it ends with an end token.

    Args:
        encoding: with `context="generation"`: the completion follows the prompt that own ones are sampled from.
        end_ids: the end tokens; what a template writes behind the last of them is left out.
    """
    prompt, (ids,) = encoding.encode_answers(tokenizer, row["prompt"], [row["completion"]], **row_variables(row))
    last = max((place for place, token in enumerate(ids) if token in end_ids), default=len(ids) - 1)
    return prompt, ids[: last + 1]


def batch_tensors(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of (prompt, completion) token ids, padded on the right: ids and attention mask `[B, T]`, and `[B, T − 1]`
    bool, true where the next token is one of the completion."""
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), length), pad)
    mask, answers = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end], mask[row, :end] = torch.tensor([*prompt, *answer]), 1
        answers[row, len(prompt) : end] = True
    return ids, mask, answers[:, 1:]
