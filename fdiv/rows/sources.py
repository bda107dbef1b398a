"""Where rows come from, so that a message can name the file and the line of one."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fdiv.errors import DataError
from fdiv.files import is_json_array, numbered_json_lines

__all__ = ["Source", "mark_source", "source_of"]

_ATTRIBUTE = "fdiv_source"


@dataclass(frozen=True)
class Source:
    """The origin of rows.

    Args:
        name: what a message calls them where no file is known ("train_dataset").
        path: the one file that holds them, in this order; None: not known.
    """

    name: str
    path: Path | None = None

    def row(self, index: int) -> str:
        """Row `index` (from 0) for a message: `FILE, line 5` with lines from 1 where the file has lines, else
        `NAME, row 4` with rows from 0."""
        if self.path is None:
            return f"{self.name}, row {index}"
        line = next(islice(_lines(self.path), index, None), None)
        return f"{self.path}, row {index}" if line is None else f"{self.path}, line {line}"

    def __str__(self) -> str:
        return self.name if self.path is None else str(self.path)


def _lines(path: Path) -> Iterator[int]:
    """Line number (from 1) of each row; nothing for a format without lines."""
    kinds = path.suffixes[-2:]
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader, began = csv.reader(file), 1
                for number, row in enumerate(reader):
                    if number and row:  # the first is the header, blank lines are none
                        yield began
                    began = reader.line_num + 1
        elif ".jsonl" in kinds or (".json" in kinds and not is_json_array(path)):
            for number, _ in numbered_json_lines(path):
                yield number
    except (OSError, DataError, csv.Error, UnicodeDecodeError):
        return  # a place for a message: where the file cannot be read again, the row's number has to do


def mark_source(rows: Any, source: Source) -> Any:
    """`rows` with their origin noted on the object; a selection or a map of them has none."""
    setattr(rows, _ATTRIBUTE, source)
    return rows


def source_of(rows: Any, name: str) -> Source:
    """The origin noted on `rows`, else one that calls them `name`."""
    return getattr(rows, _ATTRIBUTE, None) or Source(name)
