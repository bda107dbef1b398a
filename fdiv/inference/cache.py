"""A resumable store of per-item results: one JSON line per item, in a folder named by what the items depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fdiv.sealed import NO_DIGEST, SealedLines, sealed_line
from fdiv.terminal import info

__all__ = ["ItemCache", "fingerprint", "kept_keys"]

_REMEDY = "delete the file to evaluate its items again"


def fingerprint(*parts: Any) -> str:
    """Hex digest of JSON-serialisable parts: the same parts, the same digest, in every process and run."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def kept_keys(folder: Path | None, kind: str, digest: str) -> set[str]:
    """Keys of the items that an `ItemCache` of these arguments would find; nothing is written.

    Raises:
        DataError: a line of a file is damaged; the line is named.
    """
    if folder is None:
        return set()
    files = sorted((Path(folder) / f"{kind}-{digest}").glob("rank*.jsonl"))
    found = [SealedLines.read(file, _REMEDY) for file in files]
    return {item["key"] for lines in found if lines.checked for item in lines.items}


class ItemCache:
    """Results by key, appended as they come, so that a killed run continues where it stopped.

    Each process appends to its own file and reads everybody's, so a run may be continued with another number of
    processes. Every line holds its digest; one that was cut off by a kill is left out, and said. Results made by other
    weights, data or settings live under another fingerprint and are never reused.

    Args:
        folder: where the caches of an evaluation live; None keeps results in memory only.
        kind: `scores`, `generations`, …
        digest: fingerprint of everything the results depend on.
        rank: this process.

    Raises:
        DataError: a line of a file is damaged; the line is named.
    """

    def __init__(self, folder: Path | None, kind: str, digest: str, rank: int = 0):
        self._file: Path | None = None
        self.items: dict[str, dict[str, Any]] = {}
        if folder is None:
            return
        place = Path(folder) / f"{kind}-{digest}"
        place.mkdir(parents=True, exist_ok=True)
        self._file = place / f"rank{rank}.jsonl"
        for file in sorted(place.glob("rank*.jsonl")):
            self._read(file)

    def _read(self, file: Path) -> None:
        """Take the items of a file; of our own, cut off what cannot be used, so that whole lines follow whole ones."""
        lines = SealedLines.read(file, _REMEDY)
        if not lines.checked:
            info(f"{file}: {NO_DIGEST}; its {len(lines.items)} items are evaluated again")
        elif lines.torn:
            info(f"{file}: its last line was cut off; that item is evaluated again")
        if lines.checked:
            self.items |= {item["key"]: item for item in lines.items}
        if file == self._file and (lines.torn or not lines.checked):
            with file.open("r+b") as own:
                own.truncate(lines.whole if lines.checked else 0)

    def add(self, items: Iterable[dict[str, Any]]) -> None:
        """Store results; each has a `key`. They are on disk, or with the operating system, when this returns."""
        items = list(items)
        for item in items:
            self.items[item["key"]] = item
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write("".join(sealed_line(item) for item in items))
