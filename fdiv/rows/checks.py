"""Every row is checked, wherever it comes from; the error names the file, the line and the column.

A check of a value gives what is wrong with it as the end of a sentence ("is null", "is 3, not text"), or None. Rows
hold text or messages; one data set holds one of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fdiv.errors import DataError
from fdiv.rows.sources import Source

__all__ = [
    "ROLES",
    "Check",
    "answer_fault",
    "any_text_fault",
    "check_columns",
    "check_one_format",
    "check_rows",
    "checked_stream",
    "kind_of",
    "null_fault",
    "prompt_fault",
    "shown",
    "text_fault",
    "texts_fault",
]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "model")
"""Roles of messages. Chat templates leave out or mistake others ("human", "gpt"), most of them without a word."""

Check = Callable[[Any], str | None]

# Columns that hold a whole row each on their own: beside the columns of another format they leave unclear which is
# meant. A method that reads one of these formats refuses rows that are whole in another, too.
_FORMATS = (("text",), ("messages",), ("prompt", "completion"), ("question", "answer"), ("chosen", "rejected"))


def shown(value: Any) -> str:
    """A value for a message, cut to a length that fits a line."""
    return "null" if value is None else f"{value!r:.60}"


def null_fault(value: Any) -> str | None:
    """Nothing but a missing value is wrong."""
    return "is null" if value is None else None


def text_fault(value: Any) -> str | None:
    """Text that is not blank is due."""
    return _text_fault(value, blank=False)


def any_text_fault(value: Any) -> str | None:
    """Text is due, which may be blank."""
    return _text_fault(value, blank=True)


def prompt_fault(value: Any, blank: bool = False) -> str | None:
    """Text, or messages that a model can answer: the last is no answer itself."""
    fault = _fault(value, blank=blank)
    if fault is None and isinstance(value, list) and value[-1]["role"] in ("assistant", "model"):
        return f"ends with a message of the {value[-1]['role']}: a prompt ends with what is to be answered"
    return fault


def answer_fault(value: Any, blank: bool = False) -> str | None:
    """Text, or messages of which the last is the assistant's."""
    fault = _fault(value, blank=blank)
    if fault is None and isinstance(value, list) and value[-1]["role"] not in ("assistant", "model"):
        return f"ends with a message of the {value[-1]['role']}: an answer ends with the assistant's"
    return fault


def texts_fault(value: Any) -> str | None:
    """A list of texts that are not blank is due."""
    if not isinstance(value, list):
        return f"is {shown(value)}, not a list of texts"
    if not value:
        return "is an empty list"
    faults = ((number, text_fault(one)) for number, one in enumerate(value))
    return next((f"has an entry {number} that {fault}" for number, fault in faults if fault), None)


def kind_of(value: Any) -> str:
    """`text` or `messages`."""
    return "text" if isinstance(value, str) else "messages"


def _text_fault(value: Any, *, blank: bool, due: str = "text") -> str | None:
    if value is None:
        return "is null"
    if not isinstance(value, str):
        return f"is {shown(value)}, not {due}"
    return None if blank or value.strip() else f"is empty ({shown(value)})"


def _fault(value: Any, *, blank: bool) -> str | None:
    if not isinstance(value, list):
        return _text_fault(value, blank=blank, due="text or a list of {role, content} messages")
    if not value:
        return "is an empty list of messages"
    faults = ((number, _message_fault(message)) for number, message in enumerate(value))
    first = next((f"has a message {number} that {fault}" for number, fault in faults if fault), None)
    if first is None and not blank and not any(_says_something(message) for message in value):
        return f"is empty ({shown(value)})"
    return first


def _message_fault(message: Any) -> str | None:
    if not isinstance(message, Mapping):
        return f"is {shown(message)}, not an object with role and content"
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        return f"has the role {shown(role)}; roles are {', '.join(ROLES)}"
    if content is None:
        return None if message.get("tool_calls") else "has no content"
    parts = isinstance(content, list) and all(isinstance(part, Mapping) and "type" in part for part in content)
    return None if isinstance(content, str) or parts else f"has the content {shown(content)}, not text"


def _says_something(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content or message.get("tool_calls"))


def check_columns(present: Iterable[str], source: Source, needed: Sequence[str], remedy: str) -> None:
    """Refuse rows without the needed columns.

    Raises:
        DataError: a column is missing; names those that are there.
    """
    present = list(present)
    missing = [column for column in needed if column not in present]
    if missing:
        raise DataError(
            f"{source} has no column {' and no column '.join(map(repr, missing))}; it has: "
            f"{', '.join(present) or 'none'}; {remedy}"
        )


def check_one_format(present: Iterable[str], source: Source, reads: Sequence[str], beside: Sequence[str] = ()) -> None:
    """Refuse rows that are whole in another format than the one that is read.

    Args:
        present: the columns. source: for the message. reads: the columns that are read.
        beside: columns of other formats that this path knows and leaves alone (golds for a reward).

    Raises:
        DataError: names the columns that are in question.
    """
    present = set(present) - set(beside)
    for columns in _FORMATS:
        if set(columns) <= present and not set(columns) <= set(reads):
            raise DataError(
                f"{source} has {' and '.join(f'`{name}`' for name in reads)} beside "
                f"{' and '.join(f'`{name}`' for name in columns if name not in reads)}: it is unclear which is meant; "
                "remove one of the two"
            )


def check_rows(
    rows: Iterable[Any],
    source: Source,
    checks: Mapping[str, Check],
    remedy: str = "correct it or leave the row out",
    *,
    one_kind: Sequence[str] = (),
    optional: Sequence[str] = (),
    expected: str | None = None,
    start: int = 0,
) -> None:
    """Check the values of every row.

    Args:
        rows: mappings from column to value. source: names them.
        checks: by column. remedy: ends the message.
        one_kind: columns that hold all text, or all messages, in every row.
        optional: columns that a row may lack, or have as null.
        expected: the kind that `one_kind` holds; None: that of the first row. start: number of the first row.

    Raises:
        DataError: for the first row at fault, with file and line (where it is known), and the column.
    """
    for index, row in enumerate(rows, start):
        if not isinstance(row, Mapping):
            raise DataError(f"{source.row(index)} is {shown(row)}, not an object with columns; {remedy}")
        for column, check in checks.items():
            value = row.get(column)
            if value is None and column in optional:
                continue
            fault = check(value) if column in row else f"is missing (the row has {', '.join(map(str, row)) or 'none'})"
            if fault:
                raise DataError(f"{source.row(index)}: column {column!r} {fault}; {remedy}")
        for column in one_kind:
            if row.get(column) is None:
                continue
            kind = kind_of(row[column])
            expected = expected or kind
            if kind != expected:
                raise DataError(
                    f"{source.row(index)}: column {column!r} holds {kind}, the rows before it (or its own other "
                    f"columns) {expected}: use one of the two"
                )


@dataclass(frozen=True)
class _AsRead:
    """Checks one row of a stream and passes it on."""

    source: Source
    checks: Mapping[str, Check]
    remedy: str
    one_kind: tuple[str, ...]
    expected: str | None

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        check_rows(
            [row], self.source, self.checks, self.remedy,
            one_kind=self.one_kind, expected=self.expected, start=index,
        )  # fmt: skip
        return row


def checked_stream(
    rows: Any, source: Source, checks: Mapping[str, Check], remedy: str, one_kind: Sequence[str] = ()
) -> Any:
    """An `IterableDataset` whose rows are checked as they are read, the first of them now.

    Raises:
        DataError: now or while it is read: see `check_rows`.
    """
    first = next(iter(rows), None)
    if first is None:
        raise DataError(f"{source} is empty: {remedy}")
    check_rows([first], source, checks, remedy, one_kind=one_kind)
    expected = kind_of(first[one_kind[0]]) if one_kind else None
    check = _AsRead(source, checks, remedy, tuple(one_kind), expected)
    return rows.map(check, with_indices=True, features=rows.features)
