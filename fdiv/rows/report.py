"""What became of the rows of a data path: read, used, cut at `max_length`, dropped, without signal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fdiv import terminal
from fdiv.errors import DataError

__all__ = ["MIN_USED_FRACTION", "RowReport", "faults_of", "records_of"]

MIN_USED_FRACTION = 0.5
"""`min_used_fraction` unless it is set."""


_ALL_CUT = {
    "end": ": every answer loses its end, so none teaches where to stop; raise max_length",
    "beginning": ": every row loses its beginning; raise max_length",
}


@dataclass(frozen=True)
class RowReport:
    """Counts of one data path.

    Args:
        name: the path, as a message names it ("training rows").
        read: rows of the data.
        left_out: rows left out on request (`max_items`, `max_rows`, `max_tasks`): no fault.
        dropped: rows that cannot be used, by reason.
        max_length: bound on a row in tokens. cut: used rows that are longer, so that their end is lost.
        longest: tokens of the longest row, before the cut.
        without_signal: used rows that say nothing, by reason; a reason follows "are".
        unit: what a row is, where it is said of one that it has no signal.
        loses: what the cut takes of a row: `end` or `beginning`.
    """

    name: str
    read: int
    left_out: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    max_length: int | None = None
    cut: int = 0
    longest: int | None = None
    without_signal: Mapping[str, int] = field(default_factory=dict)
    unit: str = "rows"
    loses: str = "end"

    @property
    def used(self) -> int:
        """Rows that are neither left out nor dropped."""
        return self.read - self.left_out - sum(self.dropped.values())

    @property
    def left(self) -> int:
        """Used rows that carry signal."""
        return self.used - sum(self.without_signal.values())

    def faults(self) -> list[str]:
        """One phrase for each thing that befell rows; empty where all are used whole."""
        found = [f"{count} of {self.read} rows dropped: {why}" for why, count in self.dropped.items() if count]
        if self.cut:
            lost = _ALL_CUT[self.loses] if self.cut == self.used else ""
            longest = "" if self.longest is None else f", the longest has {self.longest} tokens"
            found.append(f"{self.cut} of {self.used} rows cut at max_length={self.max_length}{longest}{lost}")
        found += [
            f"{count} of {self.used} {self.unit} are {why}, without signal"
            for why, count in self.without_signal.items()
            if count
        ]
        return found

    def line(self) -> str:
        """The report in a line."""
        asked = f", {self.left_out} left out on request" if self.left_out else ""
        longest = "" if self.longest is None else f", longest {self.longest} tokens"
        return "; ".join([f"{self.name}: {self.read} read, {self.used} used{asked}{longest}", *self.faults()])

    def show(self) -> None:
        """Print the line on the main process."""
        terminal.info(self.line())

    def check(self, min_used_fraction: float = MIN_USED_FRACTION) -> None:
        """Refuse data of which less than this share is left.

        Raises:
            DataError: (a ValueError) fewer rows carry signal, or none.
        """
        due = self.read - self.left_out
        if due > 0 and self.left > 0 and self.left >= min_used_fraction * due:
            return
        faults = "; ".join(self.faults()) or "there are no rows"
        raise DataError(
            f"{self.name}: {self.left} of {due} {self.unit} are left with something to learn from or to measure "
            f"({faults}): correct the data, raise max_length where it is what cuts them"
            + (f", or lower min_used_fraction={min_used_fraction:g}" if self.left else "")
        )

    def record(self) -> dict[str, Any]:
        """The counts as plain types, for `result.json`."""
        return {
            "read": self.read,
            "used": self.used,
            "left_out": self.left_out,
            "dropped": {why: count for why, count in self.dropped.items() if count},
            "max_length": self.max_length,
            "cut": self.cut,
            "longest": self.longest,
            "without_signal": {why: count for why, count in self.without_signal.items() if count},
        }  # `unit` and `loses` are words of the line alone

    @classmethod
    def of_record(cls, name: str, record: Mapping[str, Any], unit: str = "rows") -> RowReport:
        """The report that `record` wrote down."""
        return cls(name, unit=unit, **{key: value for key, value in record.items() if key != "used"})


def faults_of(records: object) -> list[tuple[str, str]]:
    """(name, faults) of every report that `records_of` wrote down and that has some; damaged ones say so."""
    if not isinstance(records, Mapping):
        return [("rows", f"{records!r:.60} is no record of rows")]
    found = []
    for name, record in records.items():
        try:
            faults = "; ".join(RowReport.of_record(str(name), record).faults())
        except (TypeError, AttributeError, ValueError):
            faults = f"{record!r:.60} is no record of rows"
        if faults:
            found.append((str(name), faults))
    return found


def records_of(reports: Sequence[RowReport]) -> dict[str, dict[str, Any]]:
    """By name: the records of several reports; of two with one name, the later."""
    return {report.name: report.record() for report in reports}
