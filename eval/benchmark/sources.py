"""Rows of a benchmark by name: from a local folder or file, or from the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fdiv.errors import DataError
from fdiv.files import DATA_FORMATS, read_csv_rows, read_json_lines
from fdiv.rows.loading import loaded
from fdiv.rows.sources import Source, mark_source

__all__ = ["Rows", "first_of", "load_rows", "read_rows_file"]

_SUFFIXES = f"{', '.join(list(DATA_FORMATS)[:-1])} or {list(DATA_FORMATS)[-1]}"


class Rows(list[dict[str, Any]]):
    """Rows with their origin, for messages."""

    fdiv_source: Source


def read_rows_file(path: Path, name: str) -> Rows:
    """The rows of one local file (JSON lines, a JSON array, parquet, CSV)."""
    if path.suffix == ".parquet":
        from datasets import Dataset

        rows = Rows(loaded(lambda: Dataset.from_parquet(str(path)), str(path), quiet=True).to_list())
    else:
        rows = Rows(read_csv_rows(path) if path.suffix == ".csv" else read_json_lines(path))
    return mark_source(rows, Source(name, path))


def load_rows(source: str, name: str, split: str = "train") -> Rows:
    """Rows of one configuration of a dataset.

    Args:
        source: a local folder holding `NAME.json`, `.jsonl` (JSON lines or one JSON array), `.parquet` or `.csv`, or a
            hub name.
        name: the file's stem, or the configuration on the hub.
        split: split on the hub.
    Raises:
        FileNotFoundError: the local folder has no such file, the hub dataset no such configuration (a DataError is
            raised for an unreachable one).
    """
    folder = Path(source)
    if folder.is_dir():
        for suffix in DATA_FORMATS:
            if (folder / f"{name}{suffix}").exists():
                return read_rows_file(folder / f"{name}{suffix}", name)
        raise FileNotFoundError(f"{folder} has no {name}{_SUFFIXES}")
    if folder.is_absolute() or source.startswith(".") or folder.suffix in DATA_FORMATS:
        raise DataError(f"data {'file' if folder.suffix in DATA_FORMATS else 'folder'} {source} does not exist")
    from datasets import load_dataset

    try:
        rows = Rows(load_dataset(source, name, split=split).to_list())
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if re.match("BuilderConfig .* not found", reason):
            raise FileNotFoundError(f"{source} has no configuration {name}") from None
        raise DataError(
            f"{source} ({name}) cannot be had from the hub: {reason}; give a local folder with --data"
        ) from None
    return mark_source(rows, Source(f"{source} ({name})"))


def first_of(source: str, names: Sequence[str], split: str = "train") -> tuple[str, Rows]:
    """(name, rows) of the first of `names` that `source` has; a name may also be the path of a file.

    Raises:
        FileNotFoundError: it has none of them.
    """
    reasons = []
    for name in names:
        path = Path(name)
        if path.suffix in DATA_FORMATS:
            if not path.is_file():
                raise DataError(f"data file {name} does not exist")
            return path.stem, read_rows_file(path, path.stem)
        try:
            if Path(source).is_file():
                raise FileNotFoundError(f"{source} is one file of forget rows and has no set {name}")
            return name, load_rows(source, name, split)
        except FileNotFoundError as error:
            reasons.append(str(error))
    raise FileNotFoundError(reasons[0] + (f", nor {' or '.join(names[1:])}" if names[1:] else ""))
