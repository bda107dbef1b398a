"""Tries cases of every kind, one kind after the other, until the time is up; reports each fault once, at its smallest."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.case import FAULTS, VERDICTS, Edit, Kind, Outcome, Unavailable
from tests.fuzz.command import TooLong, crash
from tests.fuzz.world import World

__all__ = ["Fault", "Report", "edits_of", "fuzz", "print_report", "write_report"]

_SHRINKING = 30.0  # seconds, for one fault


@dataclass
class Fault:
    """A fault, at its smallest input."""

    kind: str
    case: int
    seed: int
    outcome: Outcome
    edits: list[Edit]
    times: int = 1

    @property
    def reproduce(self) -> str:
        """The command that shows it again."""
        return f"python -m tests.fuzz --only {self.kind} --seed {self.seed} --case {self.case}"


@dataclass
class Report:
    """Counts by kind and verdict, and the faults."""

    seed: int
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, fault: Fault) -> bool:
        """Count a fault; whether it is a new one."""
        for known in self.faults:
            if (known.kind, known.outcome.signature) == (fault.kind, fault.outcome.signature):
                known.times += 1
                return False
        self.faults.append(fault)
        return True


def edits_of(kind: Kind, seed: int, case: int) -> list[Edit]:
    """The edits of case `case`: the same for the same seed, whatever was tried before."""
    return kind.members(random.Random(f"{seed}/{kind.name}/{case}"))


def judge(kind: Kind, edits: list[Edit], place: Path) -> Outcome:
    """The kind's judgement in a folder of its own; what is said meanwhile is not shown.

    What the judge itself raises is a traceback too.
    """
    folder, said = Path(tempfile.mkdtemp(dir=place)), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return kind.judge(edits, folder)
    except Unavailable:
        raise
    except (Exception, TooLong) as error:
        return crash(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def smallest(kind: Kind, edits: list[Edit], outcome: Outcome, place: Path) -> list[Edit]:
    """Edits that still make this fault, and none of which can be left out."""
    stop = time.monotonic() + _SHRINKING
    for number in reversed(range(len(edits))):
        fewer = edits[:number] + edits[number + 1 :]
        if not fewer or time.monotonic() > stop:
            break
        if judge(kind, fewer, place).signature == outcome.signature:
            edits = fewer
    return edits


def fuzz(
    kinds: Sequence[type[Kind]],
    seed: int,
    *,
    minutes: float | None = None,
    cases: Sequence[int] | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Try cases of each kind.

    Args:
        kinds: the kinds of input.
        seed: of all cases.
        minutes: how long; every kind has the same time. None: the kind's `few` cases of each, or `cases`.
        cases: numbers of the cases, in place of a time.
        say: is told each new fault at once.
        progress: is called after each case.
    """
    report = Report(seed)
    place = Path(tempfile.mkdtemp(prefix="fdiv-fuzz-"))
    began = time.monotonic()
    try:
        world = World(place / "world")
        live = {kind.name: kind(world) for kind in kinds}
        report.counts = {name: Counter() for name in live}
        report.seconds = dict.fromkeys(live, 0.0)
        due = {name: list(range(kind.few) if cases is None else cases) for name, kind in live.items()}
        while live:
            if minutes is not None and time.monotonic() - began > 60 * minutes:
                break
            name = min(live, key=report.seconds.__getitem__)
            number = sum(report.counts[name].values()) if minutes is not None else due[name].pop(0)
            try:
                _try(live[name], number, place, report, say)
            except Unavailable as reason:
                report.left_out[name] = str(reason)
                del live[name]
                continue
            if minutes is None and not due[name]:
                del live[name]
            progress(report)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return report


def _try(kind: Kind, number: int, place: Path, report: Report, say: Callable[[str], None]) -> None:
    began = time.monotonic()
    edits = edits_of(kind, report.seed, number)
    outcome = judge(kind, edits, place)
    report.counts[kind.name][outcome.verdict] += 1
    if outcome.is_fault:
        fault = Fault(kind.name, number, report.seed, outcome, edits)
        if report.add(fault):
            fault.edits = smallest(kind, edits, outcome, place)
            say(describe(fault))
    report.seconds[kind.name] += time.monotonic() - began


def describe(fault: Fault) -> str:
    """A fault in a few lines: what, the smallest input, the command that shows it again."""
    outcome = fault.outcome
    lines = [f"{outcome.verdict} · {fault.kind}: {outcome.reason}"]
    if outcome.message:
        lines.append(f"    said: {_short(outcome.message, 300)}")
    lines += [f"    input: {_short(repr(edit), 120)}" for edit in fault.edits]
    return "\n".join([*lines, f"    again: {fault.reproduce}"])


def _short(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length]}… ({len(text)} characters)"


def print_report(report: Report, kinds: Sequence[type[Kind]]) -> None:
    """The table."""
    from fdiv.terminal import print_table

    columns = ("kind", "tried", *VERDICTS, "seconds")
    total: Counter[str] = sum(report.counts.values(), Counter())
    rows = [_row(kind.name, report.counts[kind.name], report.seconds[kind.name]) for kind in kinds]
    rows.append(_row("sum", total, sum(report.seconds.values())))
    notes = [f"left out: {name}: {reason}" for name, reason in report.left_out.items()]
    if report.faults:
        notes.append(f"{len(report.faults)} faults of different causes:")
        notes += [f"{describe(fault)}    ({fault.times} times)" for fault in report.faults]
    print_table(f"Fuzz, seed {report.seed}", columns, rows, notes)
    sys.stdout.flush()


def _row(name: str, counts: Counter[str], seconds: float) -> tuple[str, ...]:
    return (name, str(sum(counts.values())), *(str(counts[verdict]) for verdict in VERDICTS), f"{seconds:.0f}")


def write_report(report: Report, path: Path) -> None:
    """The counts and faults as JSON, and the counts as a table in Markdown beside it."""
    from fdiv.provenance import environment

    content: dict[str, Any] = {
        "seed": report.seed,
        "seconds": {name: round(seconds, 1) for name, seconds in report.seconds.items()},
        "tried": {name: sum(counts.values()) for name, counts in report.counts.items()},
        "counts": {
            name: {verdict: counts[verdict] for verdict in VERDICTS} for name, counts in report.counts.items()
        },
        "faults": [
            {"kind": fault.kind, "verdict": fault.outcome.verdict, "reason": fault.outcome.reason, "times": fault.times,
             "input": [repr(edit)[:1000] for edit in fault.edits], "again": fault.reproduce}
            for fault in report.faults
        ],
        "sum_of_faults": sum(counts[verdict] for counts in report.counts.values() for verdict in FAULTS),
        "left_out": report.left_out,
        "environment": environment("python -m tests.fuzz", report.seed),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(report), encoding="utf-8")


def markdown(report: Report) -> str:
    """The counts as a table; a column of the faults of each class."""
    heads = (
        "kind",
        "tried",
        "ok",
        "refused",
        *(f"{verdict}s" if verdict == "traceback" else verdict for verdict in FAULTS),
    )
    rows = [(name, counts) for name, counts in report.counts.items() if name not in report.left_out]
    rows.append(("sum", sum(report.counts.values(), Counter())))
    lines = [heads, ("---", *["---:"] * (len(heads) - 1))]
    lines += [_row(name, counts, 0)[:-1] for name, counts in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
