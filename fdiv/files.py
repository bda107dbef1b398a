"""Files: JSON and text written whole or not at all, values as plain types, flushing to disk."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import enum
import errno
import gzip
import json
import math
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fdiv.errors import DataError, FdivError
from fdiv.named import shown
from fdiv.secrets import redacted

__all__ = [
    "DATA_FORMATS",
    "flush_tree",
    "folded",
    "home_path",
    "is_json_array",
    "json_text",
    "numbered_json_lines",
    "numbered_lines",
    "one_line",
    "place_fault",
    "plain",
    "read_bytes",
    "read_csv_rows",
    "read_json",
    "read_json_lines",
    "temporary_of",
    "write_bytes",
    "write_json",
    "write_text",
]

DATA_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
"""Suffix of a data file → the loader of `datasets` that reads it."""


def temporary_of(path: Path) -> Path:
    """Where `write_bytes` writes a file before it takes its name: what a process leaves that is killed in between."""
    return path.with_name(f".{path.name}.part")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = temporary_of(path)
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_text(path: Path, content: str) -> None:
    """Write a text file whole or not at all, without the secrets that `fdiv.secrets` knows."""
    write_bytes(path, redacted(content).encode())


def json_text(content: Any) -> str:
    """JSON in lines, two spaces deep. NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, content: Any) -> None:
    """Write `json_text` whole or not at all."""
    write_text(path, json_text(content))


def read_bytes(path: Path) -> bytes:
    """All of a file.

    Raises:
        FdivError: it does not exist, or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FdivError(f"{path} does not exist") from None
    except OSError as error:
        raise FdivError(f"{path} cannot be read: {error.strerror}") from None


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        FdivError: the file is missing, cannot be read, or is not JSON.
    """
    try:
        return json.loads(read_bytes(path).decode())
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or a number of thousands of digits
        raise FdivError(f"{path} is not valid JSON: {error}") from error


def numbered_lines(path: Path, *, cut: bool = False) -> Iterator[tuple[int, str]]:
    """(number, text) of every line of a UTF-8 file (`.gz` too) that is not blank; numbers start at 1.

    A byte order mark is passed over. A line ends in LF, CRLF or CR: other characters that Unicode calls line ends
    (U+2028, U+0085, …) are text.

    Args:
        path: the file.
        cut: leave out what follows the last line end: the writer may have been killed within a line.

    Raises:
        DataError: not UTF-8 text.
        FileNotFoundError: no such file.
    """
    opener = gzip.open if Path(path).suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:  # text mode ends lines at LF, CRLF and CR alone
            for number, line in enumerate(file, start=1):
                if line.strip() and not (cut and not line.endswith("\n")):
                    yield number, line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None


def numbered_json_lines(path: Path, *, cut: bool = False) -> Iterator[tuple[int, Any]]:
    """(number, value) of every line of a JSON-lines file, by the rules of `numbered_lines`.

    Args:
        path: the file.
        cut: see `numbered_lines`.

    Raises:
        DataError: not UTF-8 text; a line that is not JSON, by its number.
        FileNotFoundError: no such file.
    """
    for number, line in numbered_lines(path, cut=cut):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError
            reason = getattr(error, "msg", one_line(error))
            remedy = "give one JSON object per line"
            raise DataError(f"{path}, line {number} is no JSON ({reason}): {remedy}") from None
        yield number, value


def is_json_array(path: Path) -> bool:
    """Whether a file holds one JSON array rather than JSON lines."""
    opener = gzip.open if Path(path).suffix == ".gz" else open
    with opener(path, "rb") as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def read_json_lines(path: Path) -> list[Any]:
    """Values of a file of JSON lines, or of one JSON array, in order.

    Raises:
        DataError, FileNotFoundError: see `numbered_json_lines`.
    """
    if not is_json_array(path):
        return [value for _, value in numbered_json_lines(path)]
    opener = gzip.open if Path(path).suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            return json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON ({error})") from None


def read_csv_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file whose first line names the columns, every value as the text that stands there.

    Raises:
        DataError: not UTF-8 text, no line of names, a row with another number of values than names.
        FileNotFoundError: no such file.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            names, *lines = [line for line in reader if line] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not CSV in UTF-8: {error}") from None
    if not names or len(set(names)) < len(names) or not all(names):
        raise DataError(f"{path}: the first line has to name the columns, each by a name of its own; it is {names}")
    for number, line in enumerate(lines):
        if len(line) != len(names):
            raise DataError(f"{path}, row {number} has {len(line)} values for {len(names)} columns: {str(line)[:80]}")
    return [dict(zip(names, line, strict=True)) for line in lines]


def folded(text: str) -> str:
    """`text` for a comparison that Unicode forms, case and white space do not matter to."""
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def _finite(content: Any) -> Any:
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, dict):
        return {str(key): _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, (list, tuple)) else content


def flush_tree(folder: Path) -> None:
    """Have the system write everything below `folder`, and its entries, to disk."""
    inside = list(folder.rglob("*"))
    for path in (path for path in inside if path.is_file()):
        _flush(path)
    for path in (folder, *(path for path in inside if path.is_dir())):
        _flush(path)


def _flush(path: Path) -> None:
    """Have the system write a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain(value: Any) -> Any:
    """A value as YAML's own types."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value


_REMEDIES = {
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "choose another place, or change its permissions",
    errno.EPERM: "choose another place, or change its permissions",
    errno.ENOTDIR: "a file stands where a directory belongs: choose another place",
    errno.EEXIST: "a file stands where a directory belongs: choose another place",
    errno.EISDIR: "a directory stands where a file belongs: choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOSPC: "make room, or choose another place",
    errno.EDQUOT: "make room, or choose another place",
    errno.ELOOP: "a link leads back to itself: remove it, or choose another place",
}


def place_fault(error: OSError) -> str:
    """What is wrong with a file or directory, and what to do, in one line."""
    if error.errno == errno.ENOENT and error.filename is None:
        return "the current directory does not exist any more: change into another one"
    if error.errno is None or error.strerror is None:  # of a library, with a text of its own
        return one_line(error)
    place = f"{shown(os.fspath(error.filename), 200)}: " if isinstance(error.filename, (str, os.PathLike)) else ""
    remedy = _REMEDIES.get(error.errno)
    return f"{place}{error.strerror}" + (f"; {remedy}" if remedy else "")


def home_path(name: str | Path) -> Path:
    """A path with a leading `~` replaced by the home directory.

    Raises:
        DataError: there is no such user, or this one has no home.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise DataError(f"{shown(str(name))}: {one_line(error)} Write the path out") from error


def one_line(error: BaseException | str) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())
