"""Digests of what is kept on disk, so that a changed byte is noticed, and named, when the file is read again.

One digest, SHA-256 over every byte, in the three places where it cannot be lost:

* a JSON record holds its own under the key `digest` (`write_record`, `read_record`; `sealed` and `fault` for other
  formats that have room for it),
* so does every line of a file that grows line by line (`sealed_line`, `SealedLines`),
* any other file is listed in the `digests.json` of its folder (`listed`, `check_listed`), with what it was made with.

Files of before carry none: they are read, and the caller says that they were not checked.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fdiv.errors import DataError
from fdiv.files import json_text, read_bytes, write_bytes
from fdiv.secrets import redacted

__all__ = [
    "DIGEST",
    "LISTING",
    "NO_DIGEST",
    "UNSEALED",
    "SealedLines",
    "check_listed",
    "check_sealed",
    "check_token_ids",
    "fault",
    "file_digest",
    "forget_listed",
    "listed",
    "read_record",
    "sealed",
    "sealed_line",
    "write_record",
]

DIGEST = "digest"
"""The key under which a record holds its own digest."""

UNSEALED = "sha256:" + 64 * "0"
"""What stands in place of the digest while the bytes around it are hashed."""

LISTING = "digests.json"
"""The file of a folder that lists the digests of others in it."""

NO_DIGEST = "no digest: not checked"
"""What is said of a file of before."""

_VALUE = re.compile(r"sha256:[0-9a-f]{64}")
_QUOTED = re.compile(rb'"sha256:[0-9a-f]{64}"')
_REMEDY = f"make it again, or remove {LISTING} where it was changed on purpose"
_LINE_END = re.compile(rb', "digest": "([0-9a-f]{16})"\}')


# ---------------------------------------------------------------- a file that holds its own digest
def sealed(content: bytes) -> bytes:
    """`content`, in which `UNSEALED` stands once, with the digest of it all in that place.

    Raises:
        ValueError: `UNSEALED` does not stand in it once.
    """
    if content.count(UNSEALED.encode()) != 1:
        raise ValueError("the place for the digest must stand in the content once")
    return content.replace(UNSEALED.encode(), f"sha256:{hashlib.sha256(content).hexdigest()}".encode())


def fault(content: bytes, digest: Any) -> str | None:
    """What is wrong with `content`, which says that `digest` is its digest; None where nothing is."""
    if not isinstance(digest, str) or not _VALUE.fullmatch(digest):
        return "its digest is damaged"
    before = content.replace(digest.encode(), UNSEALED.encode(), 1)
    right = hashlib.sha256(before).hexdigest() == digest.removeprefix("sha256:")
    return None if right else "its content does not agree with its digest: it is damaged, or was edited"


def check_sealed(path: Path, content: bytes, holder: Mapping[str, Any], remedy: str) -> bool:
    """Compare a file with the digest it holds.

    Args:
        path: the file, for messages. content: all of it.
        holder: the part of it, read, that has the digest under its key `DIGEST`.
        remedy: what to do about a damaged file.

    Returns:
        Whether it was compared; False for a file of before, without a digest.

    Raises:
        DataError: they do not agree, or the digest itself is damaged.
    """
    if DIGEST not in holder and not _QUOTED.search(content):  # the name of the digest may be what is damaged
        return False
    reason = fault(content, holder.get(DIGEST))
    if reason is not None:
        raise DataError(f"{path}: {reason}; {remedy}")
    return True


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """`fdiv.files.write_json` of a record, with its digest as the last entry."""
    text = redacted(json_text({**content, DIGEST: UNSEALED}))
    write_bytes(path, sealed(text.encode()))


def read_record(path: Path, remedy: str, *, unchecked: list[str] | None = None) -> dict[str, Any]:
    """Read a record without its digest.

    Args:
        path: what `write_record` wrote, or `write_json` before it.
        remedy: what to do about a damaged file.
        unchecked: a file without a digest is added to it, as `FILE: no digest: not checked`.

    Raises:
        FdivError: the file is missing, or is not JSON.
        DataError: it is no JSON object, or does not agree with its digest.
    """
    content = read_bytes(path)
    try:
        record = json.loads(content.decode())
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or a number of thousands of digits
        raise DataError(f"{path} is not valid JSON ({error}): it is cut off or damaged; {remedy}") from None
    if not isinstance(record, dict):
        raise DataError(f"{path} holds {str(record)[:40]!r}, not an object of named values; {remedy}")
    if not check_sealed(path, content, record, remedy) and unchecked is not None:
        unchecked.append(f"{path}: {NO_DIGEST}")
    return {name: value for name, value in record.items() if name != DIGEST}


def check_token_ids(ids: Sequence[Any], vocab_size: int | None, where: str, remedy: str) -> None:
    """Refuse what is no token id: no whole number, below 0, or beyond the vocabulary (None: its size is not known).

    Raises:
        DataError: the first such id, at `where`.
    """
    end = float("inf") if vocab_size is None else vocab_size
    if not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < end):
        return
    number = next(i for i, token in enumerate(ids) if type(token) is not int or not 0 <= token < end)
    bound = "of at least 0" if vocab_size is None else f"from 0 to {vocab_size - 1}"
    found = str(ids[number])[:40]
    raise DataError(f"{where}: token {number} is {found}, and a token id is a whole number {bound}; {remedy}")


# ---------------------------------------------------------------- a file of lines, each with its own digest
def sealed_line(item: Mapping[str, Any]) -> str:
    """`item`, not empty, as a JSON line whose last entry is the digest of what stands before it."""
    body = json.dumps(item)[:-1]
    return f'{body}, "{DIGEST}": "{_line_digest(body.encode())}"}}\n'


def _line_digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]


@dataclass
class SealedLines:
    """What a file of `sealed_line` lines holds.

    Args:
        items: the entries in order, without their digests.
        whole: bytes up to the end of the last whole line; what follows was cut off when a process was killed.
        torn: whether anything follows.
        checked: whether every line has a digest, and agrees with it; False for a file in which none has one.
    """

    items: list[dict[str, Any]] = field(default_factory=list)
    whole: int = 0
    torn: bool = False
    checked: bool = True

    @classmethod
    def read(cls, path: Path, remedy: str) -> SealedLines:
        """Read a file; a line that was cut off at its end is left out.

        Raises:
            DataError: a line that is not JSON, or does not agree with its digest; it is named by its number.
        """
        content = read_bytes(path)
        lines = content.split(b"\n")
        torn = lines.pop()
        ends = [_LINE_END.search(line) for line in lines]
        found = cls(whole=len(content) - len(torn), torn=bool(torn), checked=any(ends) or not lines)
        for number, (line, end) in enumerate(zip(lines, ends, strict=True), start=1):
            where = f"{path}, line {number}"
            if end is None and found.checked:
                raise DataError(f"{where} is damaged: it does not end in its digest; {remedy}")
            if end is not None and _line_digest(line[: end.start()]) != end[1].decode():
                raise DataError(f"{where} is damaged: it does not agree with its digest; {remedy}")
            try:
                item = json.loads(line.decode())
            except (ValueError, RecursionError):
                raise DataError(f"{where} is damaged: it is no JSON; {remedy}") from None
            if not isinstance(item, dict):
                raise DataError(f"{where} is damaged: it is no object of named values; {remedy}")
            found.items.append({name: value for name, value in item.items() if name != DIGEST})
        return found


# ---------------------------------------------------------------- files of other formats, listed in their folder
def file_digest(path: Path) -> dict[str, Any]:
    """`{"bytes": size, "sha256": digest of every byte}` of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


@contextmanager
def listed(*paths: Path, made_with: Mapping[str, Any] | None = None, listing: str = LISTING) -> Iterator[None]:
    """Write `paths`, files of one folder, inside the block; after it their digests stand in the folder's `LISTING`.

    A process killed inside leaves them unlisted. One process writes; the folder exists by the end of the block.

    Args:
        paths: the files; one that was not written is not listed.
        made_with: what a reader compares before it uses them (JSON values).
        listing: another name of the `LISTING`, in a folder that several processes write to.
    """
    forget_listed(*paths, listing=listing)
    yield
    entry = {} if made_with is None else {"made_with": dict(made_with)}
    found = {path.name: file_digest(path) | entry for path in paths if path.is_file()}
    if found:
        file = paths[0].parent / listing
        write_record(file, {"files": _listing(file) | found})


def forget_listed(*paths: Path, listing: str = LISTING) -> None:
    """Take `paths`, files of one folder, out of its `LISTING`: they are about to be written."""
    file = paths[0].parent / listing
    known = _listing(file)
    left = {name: entry for name, entry in known.items() if name not in {path.name for path in paths}}
    if left:
        write_record(file, {"files": left})
    elif known:
        file.unlink()


def check_listed(path: Path, remedy: str = _REMEDY, *, listing: str = LISTING) -> dict[str, Any] | None:
    """Compare a file with the `LISTING` of its folder.

    Returns:
        What it was made with (empty where nothing was said); None where the file is not listed: it is of before, or
        someone else's, and was not checked.

    Raises:
        DataError: size or content are not those listed, or the listing itself is damaged.
    """
    entry = _listing(path.parent / listing).get(path.name)
    if entry is None or not path.is_file():
        return None
    now = file_digest(path)
    if now["bytes"] != entry.get("bytes"):
        sizes = f"it has {now['bytes']} bytes, {entry.get('bytes')} were written"
        raise DataError(f"{path}: {sizes}: it is cut off, damaged, or was edited; {remedy}")
    if now["sha256"] != entry.get("sha256"):
        raise DataError(f"{path}: its content does not agree with {listing}: it is damaged, or was edited; {remedy}")
    return dict(entry.get("made_with") or {})


def _listing(path: Path) -> dict[str, Any]:
    """The entries of a `LISTING`; empty where there is none."""
    if not path.is_file():
        return {}
    record = read_record(path, "remove it; the files it lists are then not checked")
    files = record.get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise DataError(f"{path} lists no files; remove it")
    return files
