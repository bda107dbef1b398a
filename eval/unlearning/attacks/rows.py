"""Rows under any of the trainers' columns, as attacks read and change them: what is asked, what is answered.

| Columns | Asked | Encoded by |
|---|---|---|
| `prompt`, `completion`, both text | the prompt | as it stands |
| `prompt`, `completion`, both messages | the last turn of the prompt | the chat template |
| `messages` | the turn before the last | the chat template |
| `question`, `answer` | the question | the prompt format |
| `text` | nothing; `prompt_rows` makes prompts of them | as running text |

Two columns of attacks go beside them: `examples`, a list of (question, answer) asked and answered before, and `given`,
the beginning of the answer, which then belongs to the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fdiv.errors import DataError
from fdiv.inference.encoding import EncodedText, shared_length
from fdiv.inference.prompting import PromptFormat
from fdiv.training.data_checks import row_variables

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DEFAULT_FORMAT",
    "answered",
    "asked",
    "encode",
    "kind",
    "left_to_say",
    "prompt_rows",
    "row_generator",
    "with_asked",
]

Row = Mapping[str, Any]
DEFAULT_FORMAT = PromptFormat()


def kind(row: Row) -> str:
    """`prompt`, `messages`, `question` or `text`: how the row is read (a row of `messages` alone has its own column).

    Raises:
        DataError: none of the columns of the table above.
    """
    present = {column for column, value in row.items() if value is not None}
    if {"prompt", "completion"} <= present:
        return "prompt" if isinstance(row["prompt"], str) else "messages"
    if {"question", "answer"} <= present:
        return "question"
    if "messages" in present:
        return "messages"
    if "text" in present:
        return "text"
    raise DataError(
        f"a row has the columns {', '.join(sorted(present)) or 'none'}: prompt and completion, question and answer, "
        "messages or text are needed"
    )


def _turns(row: Row) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Prompt and answer of a row of messages."""
    if "prompt" in row and row["prompt"] is not None:
        return list(row["prompt"]), list(row["completion"])
    turns = list(row["messages"])
    if len(turns) < 2 or turns[-1].get("role") != "assistant":
        raise DataError(
            f"messages {str(turns)[:60]!r} do not end with an answer: the last turn must be the assistant's"
        )
    return turns[:-1], turns[-1:]


def asked(row: Row) -> str:
    """What the row asks, as text; empty for a row of running text."""
    what = kind(row)
    if what == "messages":
        return _turns(row)[0][-1]["content"]
    return {"prompt": row.get("prompt"), "question": row.get("question"), "text": ""}[what]


def answered(row: Row) -> str:
    """The true answer, as text; of running text all of it."""
    what = kind(row)
    if what == "messages":
        return _turns(row)[1][-1]["content"]
    return {"prompt": row.get("completion"), "question": row.get("answer"), "text": row.get("text")}[what]


def left_to_say(answer: str, given: str | None) -> str:
    """The true answer without what is `given` of it; whole where that is no beginning of it."""
    return answer[len(given) :] if given and answer.startswith(given) else answer


def with_asked(row: Row, text: str) -> dict[str, Any]:
    """The row with `text` in place of what it asks.

    Raises:
        DataError: a row of running text, which asks nothing: see `prompt_rows`.
    """
    what = kind(row)
    if what == "prompt":
        return {**row, "prompt": text}
    if what == "question":
        return {**row, "question": text}
    if what == "text":
        raise DataError("a row of running text has no prompt: make prompts of such rows with prompt_rows(rows)")
    prompt, answer = _turns(row)
    turns = [*prompt[:-1], {**prompt[-1], "content": text}]
    if row.get("prompt") is not None:
        return {**row, "prompt": turns}
    return {**row, "messages": [*turns, *answer]}


def prompt_rows(rows: Sequence[Row], share: float = 0.5) -> list[dict[str, Any]]:
    """The rows, those of running text cut into a prompt (the first `share` of their words) and its continuation.

    A text of one word keeps it as its continuation, after an empty prompt. Other rows stay as they are.
    """
    found = []
    for row in rows:
        if kind(row) != "text":
            found.append(dict(row))
            continue
        words = row["text"].split(" ")
        cut = min(max(1, round(share * len(words))), len(words) - 1)
        head, rest = " ".join(words[:cut]), " ".join(words[cut:])
        others = {column: value for column, value in row.items() if column != "text"}
        found.append({**others, "prompt": head, "completion": f" {rest}" if head else rest})
    return found


def row_generator(seed: int, index: int, what: str) -> np.random.Generator:
    """Random numbers that depend on the seed, the row's number and what they are for, and on nothing else."""
    return np.random.default_rng([seed, index, *what.encode()])


def encode(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptFormat = DEFAULT_FORMAT,
    answer: str | None = None,
    max_length: int | None = None,
) -> EncodedText:
    """The row as token ids, as the trainers encode rows of its columns; the labels are its answer.

    Args:
        row: of any kind, with or without `examples` and `given`.
        tokenizer: of the model.
        prompt: the format of questions, and the encoding of all kinds.
        answer: in place of the row's own; where `given` is no beginning of it, the labels begin where the two part.
        max_length: tokens kept, from the beginning; None: all.

    Raises:
        DataError: see `kind` and `fdiv.inference.encoding.Encoding.encode`.
    """
    encoded = _encoded(row, tokenizer, prompt, answer)
    if row.get("given"):
        # The labels begin where the whole parts from its beginning, which ends in its own end token.
        start = shared_length([encoded.input_ids, _encoded(row, tokenizer, prompt, row["given"]).input_ids])
        encoded = EncodedText(encoded.input_ids, max(encoded.prompt_length, start))
    return encoded if max_length is None else EncodedText(encoded.input_ids[:max_length], encoded.prompt_length)


def _encoded(row: Row, tokenizer: Any, prompt: PromptFormat, answer: str | None) -> EncodedText:
    """The row with its examples before it; `given` is not looked at."""
    what, variables = kind(row), row_variables(row)
    answer = answered(row) if answer is None else answer
    examples = [tuple(pair) for pair in row.get("examples") or ()]
    if what == "text":
        return PromptFormat.encode_continuation(tokenizer, "", answer, max_length=len(answer) + 8)
    if what == "question":
        return prompt.encode(tokenizer, row["question"], answer, examples, **variables)
    if what == "prompt":
        shots = "".join(question + text + prompt.example_separator for question, text in examples)
        return prompt.encoding.encode(tokenizer, shots + row["prompt"], answer, **variables)
    turns, own = _turns(row)
    shots = [
        turn
        for question, text in examples
        for turn in ({"role": "user", "content": question}, {"role": "assistant", "content": text})
    ]
    head = turns[:1] if turns[0].get("role") == "system" else []
    given = [{"role": own[-1].get("role", "assistant"), "content": answer}]
    return prompt.encoding.encode(tokenizer, [*head, *shots, *turns[len(head) :]], given, **variables)
