"""Rows of one's own: what is to go, and what it is measured against, from any file in any of the trainers' columns.

A file holds one of five formats, told apart by its columns: `question` and `answer`; `prompt` and `completion`, text
or messages; `messages` or `conversations` (the last answer is what is meant, the turns before are its prompt);
`text`. They become rows with the columns of trainers and attacks (`fdiv.eval.unlearning.attacks.rows`): `question` and
`answer`, `prompt` and `completion`, or `text`. Beside them may stand

* `secret`: the words that must not come out, a text or a list of texts;
* `paraphrase`: the same question in other words, a text or a list (also `paraphrases`, `paraphrased_question`,
  `paraphrased_prompt`).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from fdiv.errors import DataError
from fdiv.eval.unlearning.attacks.rows import answered, asked, kind
from fdiv.files import DATA_FORMATS, folded, home_path
from fdiv.rows.checks import answer_fault, check_one_format, check_rows, prompt_fault, text_fault, texts_fault
from fdiv.rows.loading import named_dataset, read_file
from fdiv.rows.sources import Source, mark_source, source_of

__all__ = [
    "Row",
    "Rows",
    "check_apart",
    "held_out_nothing",
    "passages",
    "read_questions",
    "read_rows",
    "repeated_line",
    "with_paraphrases",
    "write_rows",
]

Row = dict[str, Any]
_FILE_FORMATS = {**DATA_FORMATS, ".txt": "text"}
_CONVERSATIONS = ("messages", "conversations")
_SPEAKERS = {"human": "user", "gpt": "assistant"}
"""Names of roles in conversations of `from` and `value`; others stay as they are."""
_PARAPHRASES = ("paraphrases", "paraphrase", "paraphrased_question", "paraphrased_prompt")
_SECRETS = ("secrets", "secret")
_KEPT = ("chat_template_kwargs", "tools")
"""Columns that a chat template reads."""


class Rows(list[Row]):
    """Rows with their origin, for messages."""

    fdiv_source: Source


def read_rows(name: str, what: str) -> Rows:
    """The rows of a file (JSON lines, JSON, parquet, CSV, text), a folder or a dataset of the hub, in one of the
    formats of this module.

    Args:
        name: path, or hub name. what: what messages call the rows ("forget").

    Raises:
        DataError: no such file, a damaged or an empty one, no or two formats, a cell that is empty or of another type.
    """
    read, source = _read(name, what)
    source = _asked_for(home_path(name), source)
    columns = {column for row in read for column, value in row.items() if value is not None}
    reads = _format_of(columns, source, what)
    check_one_format(columns, source, reads)
    if reads[0] in _CONVERSATIONS:
        read = [_turns(row, reads[0], source.row(number)) for number, row in enumerate(read)]
        reads = ("prompt", "completion")
    faults = {"prompt": prompt_fault, "completion": answer_fault}
    one_kind = reads if reads[0] == "prompt" else ()
    check_rows(read, source, {column: faults.get(column, text_fault) for column in reads}, one_kind=one_kind)
    rows = Rows(_kept(row, reads, source.row(number)) for number, row in enumerate(read))
    return mark_source(rows, source)


def read_questions(name: str, what: str) -> Rows:
    """What is asked, without answers: `question` or `prompt` of a file, or the lines of a text.

    Raises:
        DataError: see `read_rows`.
    """
    read, source = _read(name, what)
    column = next((one for one in ("question", "prompt", "text") if any(row.get(one) for row in read)), None)
    if column is None:
        raise DataError(f"{source} has no column `question`, `prompt` or `text` of questions to answer")
    check_rows(read, source, {column: prompt_fault if column == "prompt" else text_fault})
    asked_as = "question" if column == "text" else column
    return mark_source(Rows({asked_as: row[column]} for row in read), source)


def _read(name: str, what: str) -> tuple[list[Row], Source]:
    path = home_path(name)
    if path.suffix in _FILE_FORMATS and not path.is_file():
        raise DataError(f"the {what} rows: no such file: {name}")
    if path.is_file() and path.read_bytes().removeprefix(codecs.BOM_UTF8).strip() in (b"", b"[]"):
        raise DataError(f"the {what} rows: {name} is empty; it must hold at least one row")
    if path.is_file():
        found = read_file(path, formats=_FILE_FORMATS)
    else:
        try:
            found = named_dataset(name)
        except DataError as error:
            raise DataError(str(error).replace("dataset_name: ", f"the {what} rows: ", 1)) from error
        if hasattr(found, "keys"):
            if "train" not in found and len(found) != 1:
                raise DataError(f"the {what} rows: {name} has the splits {', '.join(found)}: name a file of one")
            found = found["train"] if "train" in found else next(iter(found.values()))
    source = source_of(found, f"the {what} rows, {name}")
    rows = [dict(row) for row in found]
    if path.suffix == ".txt":
        rows = [row for row in rows if row["text"].strip()]
    if not rows:
        raise DataError(f"the {what} rows: {name} is empty; it must hold at least one row")
    return rows, source


def _asked_for(path: Path, source: Source) -> Source:
    """The file that a request named, of forget rows that it wrote again (`fdiv.unlearning.request.builder`)."""
    named = _request_of(path).get("forget") if path.name == "forget.jsonl" else None
    try:
        file = home_path(named)
    except (DataError, TypeError):
        return source
    return Source(named, file) if file.is_file() else source


def _request_of(path: Path) -> dict[str, Any]:
    """What the request says that built a file; {} where none did."""
    try:
        found = json.loads((path.parent / "request.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def held_out_nothing(name: str) -> bool:
    """Whether a build was to hold out sampled rows as the neighbours of this file, and had too few of them to do so.

    How many answers of a model can be used is known after a recipe has named the files of its build.
    """
    path = home_path(name)
    return path.name == "neighbours.jsonl" and not path.exists() and bool(_request_of(path).get("sample_retain"))


def _format_of(columns: set[str], source: Source, what: str) -> tuple[str, ...]:
    pairs = (("question", "answer"), ("prompt", "completion"))
    found = next((pair for pair in pairs if set(pair) <= columns), None)
    found = found or next(((one,) for one in (*_CONVERSATIONS, "text") if one in columns), None)
    if found is None:
        raise DataError(
            f"{source}: the {what} rows have the columns {', '.join(sorted(columns)) or 'none'}: question and answer, "
            "prompt and completion, messages, or text are needed"
        )
    return found


def _turns(row: Row, column: str, where: str) -> Row:
    """A conversation as prompt and completion: its last answer, after the turns before it."""
    turns = row.get(column)
    if isinstance(turns, str):  # a cell of a CSV file
        try:
            turns = json.loads(turns)
        except ValueError:
            raise DataError(f"{where}: column {column!r} is text, not a list of messages") from None
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f"{where}: column {column!r} is no list of messages")
    messages = [_message(turn) for turn in turns]
    while messages and messages[-1].get("role") not in ("assistant", "model"):
        messages.pop()  # what is said after the last answer has none
    if len(messages) < 2:
        raise DataError(f"{where}: column {column!r} holds no answer of the assistant after something to answer")
    others = {name: value for name, value in row.items() if name != column}
    return {**others, "prompt": messages[:-1], "completion": messages[-1:]}


def _message(turn: Mapping[str, Any]) -> Row:
    if turn.get("from") is not None and turn.get("role") is None:
        return {"role": _SPEAKERS.get(turn["from"], turn["from"]), "content": turn.get("value")}
    return {name: value for name, value in turn.items() if value is not None or name == "content"}


def _kept(row: Row, reads: Sequence[str], where: str) -> Row:
    """The columns that are read, with `secret` and `paraphrase` as lists of texts where there are any."""
    kept = {column: row[column] for column in reads}
    kept |= {column: row[column] for column in _KEPT if row.get(column) is not None}
    for column, names in (("secret", _SECRETS), ("paraphrase", _PARAPHRASES)):
        found = next((name for name in names if row.get(name) not in (None, [], "")), None)
        if found is None:
            continue
        texts = row[found] if isinstance(row[found], list) else [row[found]]
        fault = texts_fault(texts)
        if fault:
            raise DataError(f"{where}: column {found!r} {fault}")
        signs = [text for text in texts if column == "secret" and not re.search(r"[^\W_]", text)]
        if signs:
            raise DataError(f"{where}: column {found!r} holds {signs[0]!r}: no letter or digit to find")
        kept[column] = texts
    return kept


def with_paraphrases(rows: Rows, name: str) -> Rows:
    """The rows with the paraphrases of another file, which has a row for each (in their order), or names it in a
    column `row` (from 0).

    The paraphrase stands in one of the columns of this module, or in `question`, `prompt` or `text`.

    Raises:
        DataError: another number of rows without a column `row`, a number that no row has, a cell that is no text.
    """
    read, source = _read(name, "paraphrased")
    columns = (*_PARAPHRASES, "question", "prompt", "text")
    column = next((one for one in columns if any(row.get(one) for row in read)), None)
    if column is None:
        raise DataError(f"{source} has no column of paraphrases: {', '.join(columns[1:])}")
    numbered = any(row.get("row") is not None for row in read)
    if not numbered and len(read) != len(rows):
        raise DataError(
            f"{source} has {len(read)} rows, the forget rows {len(rows)}: give a paraphrase for each in their order, "
            "or a column `row` with the number of the forget row, from 0"
        )
    added: dict[int, list[str]] = {}
    for number, row in enumerate(read):
        target = row.get("row") if numbered else number
        if not isinstance(target, int) or not 0 <= target < len(rows):
            raise DataError(f"{source.row(number)}: column 'row' is {target!r}: a number from 0 to {len(rows) - 1}")
        texts = row.get(column)
        texts = texts if isinstance(texts, list) else [texts]
        fault = texts_fault(texts)
        if fault:
            raise DataError(f"{source.row(number)}: column {column!r} {fault}")
        added.setdefault(target, []).extend(texts)
    found = Rows(
        {**row, "paraphrase": [*row.get("paraphrase", ()), *added[number]]} if number in added else row
        for number, row in enumerate(rows)
    )
    return mark_source(found, rows.fdiv_source)


def _key(row: Row) -> tuple[str, str]:
    return folded(asked(row)), folded(answered(row))


def check_apart(forget: Rows, others: Sequence[Row], what: str) -> None:
    """Refuse forget rows that stand among other rows, whatever their formats; Unicode form, case and white space are
    folded. A forget text also counts as there where it is a part of another text.

    Raises:
        DataError: with the number of such rows, and the first.
    """
    keys, texts = {_key(row) for row in others}, [folded(row["text"]) for row in others if kind(row) == "text"]

    def stands(row: Row) -> bool:
        return _key(row) in keys or (kind(row) == "text" and any(folded(row["text"]) in text for text in texts))

    both = [number for number, row in enumerate(forget) if stands(row)]
    if both:
        raise DataError(
            f"{len(both)} of {len(forget)} forget rows also stand in the {what} rows (first: "
            f"{forget.fdiv_source.row(both[0])}): forgetting and keeping the same row is contradictory; take it "
            "out of one of the two"
        )


def repeated_line(rows: Rows, what: str) -> str | None:
    """A line on rows that stand in a file more than once (folded as in `check_apart`); None where none does."""
    first: dict[tuple[str, str], int] = {}
    again = [number for number, row in enumerate(rows) if first.setdefault(_key(row), number) != number]
    if not again:
        return None
    source = source_of(rows, f"the {what} rows")
    return (
        f"{len(again)} of {len(rows)} {what} rows stood there before (first: {source.row(again[0])}, as "
        f"{source.row(first[_key(rows[again[0]])])}): such a row counts as often as it stands there"
    )


def passages(rows: Sequence[Row], words: int = 100) -> list[Row]:
    """Rows with running text cut into passages of at most `words` words, each a row of its own with `passage`; `row`
    numbers the row that it comes from."""
    found = []
    for number, row in enumerate(rows):
        if kind(row) != "text":
            found.append({**row, "row": number})
            continue
        text = row["text"].split()
        count = max(1, -(-len(text) // words))
        cuts = [len(text) * part // count for part in range(count + 1)]
        parts = [" ".join(text[start:end]) for start, end in pairwise(cuts)]
        found += [{**row, "text": part, "row": number, "passage": True} for part in parts if part]
    return found


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Rows as JSON lines."""
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
