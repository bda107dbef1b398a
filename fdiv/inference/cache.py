"""A resumable store of per-item results: one JSON line per item, in a folder named by what the items depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fdiv.errors import DataError

__all__ = ["ItemCache", "fingerprint"]


def fingerprint(*parts: Any) -> str:
    """Hex digest of JSON-serialisable parts: the same parts, the same digest, in every process and run."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class ItemCache:
    """Results by key, appended as they come, so that a killed run continues where it stopped.

    Each process appends to its own file and reads everybody's, so a run may be continued with another number of
    processes. Results made by other weights, data or settings live under another fingerprint and are never reused.

    Args:
        folder: where the caches of an evaluation live; None keeps results in memory only.
        kind: `scores`, `generations`, …
        digest: fingerprint of everything the results depend on.
        rank: this process.
    """

    def __init__(self, folder: Path | None, kind: str, digest: str, rank: int = 0):
        self._file: Path | None = None
        self.items: dict[str, dict[str, Any]] = {}
        if folder is None:
            return
        place = Path(folder) / f"{kind}-{digest}"
        place.mkdir(parents=True, exist_ok=True)
        for file in sorted(place.glob("rank*.jsonl")):
            self._read(file)
        self._file = place / f"rank{rank}.jsonl"
        self._drop_unfinished_line()

    def _read(self, file: Path) -> None:
        lines = file.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline was cut off by a kill
            try:
                item = json.loads(line)
            except json.JSONDecodeError:
                raise DataError(
                    f"{file}, line {number} is damaged; delete the file to evaluate its items again"
                ) from None
            self.items[item["key"]] = item

    def _drop_unfinished_line(self) -> None:
        if self._file is None or not self._file.exists():
            return
        content = self._file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with self._file.open("r+b") as file:
                file.truncate(whole)

    def add(self, items: Iterable[dict[str, Any]]) -> None:
        """Store results; each has a `key`. They are on disk, or with the operating system, when this returns."""
        items = list(items)
        for item in items:
            self.items[item["key"]] = item
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(item) + "\n" for item in items))
