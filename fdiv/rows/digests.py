"""Keyed digests of rows: equal rows have equal digests, and without the key a digest says nothing of its row.

A plain digest of a row that can be guessed (a name and a phone number) gives the row away to anyone who tries all of
them. With a key of 32 random bytes, only a holder of the key can try.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fdiv.errors import DataError
from fdiv.rows.sources import Source

__all__ = ["canonical", "data_digest", "new_key", "row_digest", "row_digests"]

_LENGTH = 24  # hex digits: 96 bits, so that a billion rows do not meet by chance


def new_key() -> bytes:
    """32 random bytes, which leave the random streams of a training alone."""
    return secrets.token_bytes(32)


def canonical(row: Mapping[str, Any]) -> str:
    """A row as text that depends on its content alone, nothing folded: no case, no white space, no Unicode form.

    Keys are in order. A key whose value is null counts as absent, and 1.0 as 1: a table fills in columns that a row
    lacks, and gives a column one type of number.

    Raises:
        TypeError: a value that is no JSON (an image).
    """
    return json.dumps(_plain(row), sort_keys=True, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta)):  # a table reads times from text
        return str(value)
    return value


def row_digest(row: Mapping[str, Any], key: bytes) -> str:
    """HMAC-SHA256 of `canonical(row)` under `key`, 24 hex digits."""
    text = canonical(row).encode("utf-8", "surrogatepass")
    return hmac.new(key, text, hashlib.sha256).hexdigest()[:_LENGTH]


def row_digests(rows: Iterable[Mapping[str, Any]], key: bytes, source: Source) -> list[str]:
    """`row_digest` of every row; `source` names them.

    Raises:
        DataError: a row that holds something other than text, numbers, lists and mappings.
    """
    found = []
    for number, row in enumerate(rows):
        try:
            found.append(row_digest(row, key))
        except TypeError as error:
            raise DataError(
                f"{source.row(number)}: {error}: a batch log and exclude_rows need rows of text and numbers"
            ) from error
    return found


def data_digest(digests: Sequence[str], removed: Iterable[int], key: bytes) -> str:
    """One digest of a data set: of all rows in their order, those of `removed` counting by their place alone."""
    without = set(removed)
    text = "\n".join("" if number in without else digest for number, digest in enumerate(digests))
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()[:_LENGTH]
