"""What runs and sweeps left on disk, read for a report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fdiv.errors import DataError, FdivError
from fdiv.files import numbered_json_lines, read_bytes
from fdiv.report.shapes import ENVIRONMENT, check_result, check_results, check_shape
from fdiv.sealed import LISTING, NO_DIGEST, check_listed, read_record
from fdiv.stamps import compare_stamps
from fdiv.terminal import divergence_label, info

__all__ = [
    "RERUN",
    "RERUN_LISTED",
    "RunRecord",
    "SweepRecord",
    "encoding_notes",
    "read_history",
    "read_records",
    "read_result",
    "read_results",
]

RERUN = "run it again, or take `digest` out of the file where it was edited on purpose"
"""What to do about a damaged record."""
RERUN_LISTED = f"run it again, or remove {LISTING} where it was edited on purpose"
"""The same of a file whose digest stands beside it."""


@dataclass
class RunRecord:
    """One run: its summary (empty while unfinished), provenance, log history and resolved recipe."""

    name: str
    path: Path
    result: dict[str, Any]
    environment: dict[str, Any]
    history: list[dict[str, Any]]
    recipe: str
    setting: str = ""
    """What tells it from the other runs of the page; runs with the same setting differ by seed only."""

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.result)


@dataclass
class SweepRecord:
    """One sweep: `results.json`, and the runs of its cells where their directories are still there."""

    path: Path
    results: dict[str, Any]
    runs: list[RunRecord] = field(default_factory=list)


def read_records(directories: list[Path]) -> tuple[list[RunRecord], list[SweepRecord]]:
    """The runs and the sweeps of some output directories (a `results.json` alone is a sweep without its runs).

    One that is given twice is read once. A run is named by its folder, with those above where another is called so.

    Raises:
        FdivError: a directory that is neither.
        DataError: a record that is cut off or damaged.
    """
    runs, sweeps = [], []
    given: dict[Path, Path] = {}
    for path in directories:
        given.setdefault(Path(os.path.realpath(path)), path)
    if len(given) < len(directories):
        info(f"{len(directories)} directories, of which {len(given)} are different: each is shown once")
    names = _apart(list(given))
    for place, path in given.items():
        file = path if path.name == "results.json" else path / "results.json"
        if file.is_file():
            sweeps.append(_read_sweep(file))
        elif (path / "metrics.jsonl").is_file() or (path / "result.json").is_file():
            runs.append(_read_run(path, names[place]))
        else:
            raise FdivError(f"{path} is not the output of `fdiv run` or `fdiv sweep`: no result.json or results.json")
    for run in runs:
        run.setting = run.setting or divergence_label(run.result.get("divergence")) if run.result else run.name
    settings, methods = [run.setting for run in runs], {run.result.get("method") for run in runs}
    # Several runs of one divergence that are no seeds of one sweep; of several methods a divergence says too little.
    if len(set(settings)) < len(settings) or len(methods) > 1:
        for run in runs:
            run.setting = run.name
    return runs, sweeps


def _apart(places: Sequence[Path]) -> dict[Path, str]:
    """A name for each of some different paths: the end of it, as long as it takes to tell it from all others."""
    names = {}
    for place in places:
        parts = place.parts
        for count in range(1, len(parts) + 1):
            end = parts[-count:]
            if sum(other.parts[-count:] == end for other in places) == 1:
                break
        names[place] = "/".join(end).replace("//", "/")
    return names


def encoding_notes(runs: list[RunRecord]) -> list[tuple[str, str]]:
    """(run, what differs) for runs whose rows were encoded otherwise than those of the first: their numbers stand
    side by side, and may not be alike."""
    known = [(run.name, run.result["encoding"]) for run in runs if run.result.get("encoding")]
    notes = []
    for name, theirs in known[1:]:
        first, ours = known[0]
        for line in compare_stamps(ours, theirs, "it", "", noted={*ours, *theirs}):
            notes.append((name, line.replace("now it is", f"{first} with")))
    return notes


def read_results(file: Path) -> dict[str, Any]:
    """`results.json` of a sweep.

    Raises:
        FdivError: it does not exist.
        DataError: it is damaged, or not what `fdiv sweep` writes.
    """
    unchecked: list[str] = []
    results = read_record(file, RERUN, unchecked=unchecked)
    for line in unchecked:
        info(line)
    check_results(results, file, RERUN)
    return results


def read_result(cell: Path) -> dict[str, Any]:
    """`result.json` of a finished cell of a sweep.

    Raises:
        DataError: it is damaged.
    """
    return read_record(cell / "result.json", f"remove {cell}, so that the cell runs again")


def _read_sweep(file: Path) -> SweepRecord:
    from fdiv.report.table import cell_label

    results = read_results(file)
    sweep = SweepRecord(file.parent, results)
    for cell in results["cells"]:
        folder = file.parent / cell["name"]
        if (folder / "metrics.jsonl").is_file():
            run = _read_run(folder, cell["name"])
            run.setting = cell_label(cell["settings"])
            sweep.runs.append(run)
    return sweep


def _read_run(path: Path, name: str) -> RunRecord:
    result, environment = path / "result.json", path / "environment.json"
    recipe, history = path / "recipe_resolved.yaml", path / "metrics.jsonl"
    unchecked: list[str] = []
    record = RunRecord(
        name=name,
        path=path,
        result=read_record(result, RERUN, unchecked=unchecked) if result.is_file() else {},
        environment=read_record(environment, RERUN, unchecked=unchecked) if environment.is_file() else {},
        history=read_history(history) if history.is_file() else [],
        recipe=_read_recipe(recipe) if recipe.is_file() else "",
    )
    if record.finished:
        check_result(record.result, result, RERUN)
    check_shape(record.environment, ENVIRONMENT, environment, RERUN)
    if record.finished and (path / LISTING).is_file() is False:
        unchecked += [f"{file}: {NO_DIGEST}" for file in (recipe, history) if file.is_file()]
    for line in unchecked:
        info(line)
    return record


def _read_recipe(path: Path) -> str:
    check_listed(path, RERUN_LISTED)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}; {RERUN}") from None


def read_history(path: Path) -> list[dict[str, Any]]:
    """The log of a run, `metrics.jsonl`. Of an unfinished run, a last line that was cut off is left out, and said.

    Raises:
        DataError: a line is no JSON object; the file of a finished run has changed.
    """
    cut = check_listed(path, RERUN_LISTED) is None and not read_bytes(path).endswith(b"\n")
    if cut and path.stat().st_size:
        info(f"{path}: its last line was cut off and is left out")
    entries = []
    for number, entry in numbered_json_lines(path, cut=cut):
        if not isinstance(entry, dict):
            raise DataError(f"{path}, line {number} holds {str(entry)[:40]!r}, not an object of named values; {RERUN}")
        entries.append(entry)
    return entries
