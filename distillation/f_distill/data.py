"""Rows of distillation: checks, the choice between given and own completions, and the tokens of given ones.

A row has `prompt` and, where given completions are used, `completion`, each a string or a list of {role, content}
messages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fdiv.errors import DataError

__all__ = ["check_rows", "completion_tokens", "samples_itself"]


def check_rows(dataset: Any, name: str, given: bool) -> None:
    """Check that `dataset` (called `name` in messages) holds rows for distillation; of a stream, the first alone.

    Args:
        given: whether completions are taken from the rows.

    Raises:
        DataError: missing or empty data, a missing column, a prompt or completion that is empty or neither text nor
            messages, or one row with both.
    """
    columns = ("prompt", "completion") if given else ("prompt",)
    remedy = (
        f"distillation needs rows with {' and '.join(columns)}, each a string or a list of {{role, content}} messages"
    )
    if given:
        remedy += " (on_policy_share: 1 needs no completion)"
    if dataset is None:
        raise DataError(f"{name} is missing: {remedy}")
    first = next(iter(dataset), None)
    if first is None:
        raise DataError(f"{name} is empty: {remedy}. Check the split name and the filters applied to it")
    for column in columns:
        if column not in first:
            raise DataError(f"{name} has no column {column!r}; it has {sorted(first)}: {remedy}")
    whole = hasattr(dataset, "__len__") and hasattr(dataset, "select_columns")
    expected = None
    for number, row in enumerate(dataset.select_columns(list(columns)) if whole else [first]):
        kinds = {column: _kind(row[column]) for column in columns}
        for column, kind in kinds.items():
            if kind is None:
                raise DataError(f"{name}, row {number}: {column!r} is {row[column]!r:.80}: {remedy}")
        expected = expected or kinds["prompt"]
        if set(kinds.values()) != {expected}:
            raise DataError(f"{name}, row {number}: mixes strings and messages ({kinds}, row 0 {expected}): use one")


def _kind(value: Any) -> str | None:
    """`text` or `messages`; None for anything else, and for an empty one."""
    if isinstance(value, str):
        return "text" if value else None
    if not isinstance(value, list) or not value:
        return None
    good = all(isinstance(message, Mapping) and "role" in message and message.get("content") for message in value)
    return "messages" if good else None


def samples_itself(prompt: Any, share: float, seed: int, epoch: int) -> bool:
    """Whether the student samples the completion of this row in this epoch: with probability `share`.

    A function of (seed, epoch, prompt) alone, so that it is the same on any number of processes and after a resume.
    """
    if share in (0.0, 1.0):
        return share == 1.0
    key = json.dumps([seed, epoch, prompt], sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") < share * 2.0**64


def completion_tokens(
    tokenizer: Any, prompt: Any, completion: Any, prompt_ids: Sequence[int], end_ids: Sequence[int], **template: Any
) -> list[int]:
    """The tokens of a given completion after `prompt_ids`, as the model would have had to sample them.

    A text is tokenised together with its prompt where the prompt's tokens come out the same, else alone, and ends with
    an end token. Messages go through the chat template, and stop behind the last end token.

    Args:
        end_ids: the end tokens. template: arguments of `apply_chat_template`.

    Raises:
        DataError: the chat template writes the prompt otherwise when an answer follows, or there are no tokens.
    """
    start = len(prompt_ids)
    if isinstance(prompt, str):
        whole = tokenizer(text=prompt + completion)["input_ids"]
        joined = whole[:start] == list(prompt_ids)
        ids = whole[start:] if joined else tokenizer(text=completion, add_special_tokens=False)["input_ids"]
        ids = list(ids)
        return ids if ids and ids[-1] in end_ids else [*ids, end_ids[0]]
    whole = tokenizer.apply_chat_template([*prompt, *completion], tokenize=True, return_dict=True, **template)[
        "input_ids"
    ]
    if whole[:start] != list(prompt_ids) or len(whole) == start:
        raise DataError(
            f"the chat template writes the prompt {str(prompt)[:60]!r} otherwise when an answer follows, so the "
            "answer's tokens are not known: set chat_template_kwargs, or give prompts and completions as text"
        )
    ids = list(whole[start:])
    last = max((place for place, token in enumerate(ids) if token in end_ids), default=len(ids) - 1)
    return ids[: last + 1]
