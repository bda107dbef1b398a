"""What became of the rows of a data path: read, used, cut at `max_length`, dropped, without signal."""

from __future__ import annotations

from dataclasses import dataclass

from fdiv import terminal

__all__ = ["RowReport"]


@dataclass(frozen=True)
class RowReport:
    """Counts of one data path.

    Args:
        name: the path, as a message names it.
        read: rows of the data. used: rows left.
        max_length: bound on a row in tokens. cut: used rows that are longer. longest: tokens of the longest.
        dropped_for: why rows were dropped. without_signal: used pairs whose two answers are the same tokens.
    """

    name: str
    read: int
    used: int
    max_length: int | None = None
    cut: int = 0
    longest: int = 0
    dropped_for: str = ""
    without_signal: int = 0

    def faults(self) -> list[str]:
        """One sentence for each thing that befell rows; empty where all are used whole."""
        found = []
        if self.used < self.read:
            found.append(f"{self.read - self.used} of {self.read} rows dropped: {self.dropped_for}")
        if self.cut:
            bound = f"max_length={self.max_length}, the longest has {self.longest} tokens"
            found.append(f"{self.cut} of {self.used} rows cut at {bound}")
        if self.without_signal:
            found.append(f"{self.without_signal} of {self.used} pairs are identical after truncation, without signal")
        return found

    def show(self) -> None:
        """Print the faults on the main process, one line each."""
        for fault in self.faults():
            terminal.info(f"{self.name}: {fault}")
