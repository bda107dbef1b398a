"""What runs and sweeps left on disk, read for a report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fdiv.errors import FdivError
from fdiv.files import read_json
from fdiv.terminal import divergence_label

__all__ = ["RunRecord", "SweepRecord", "read_records"]


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

    Raises:
        FdivError: a directory that is neither.
    """
    runs, sweeps = [], []
    for path in directories:
        file = path if path.name == "results.json" else path / "results.json"
        if file.is_file():
            sweeps.append(_read_sweep(file))
        elif (path / "metrics.jsonl").is_file() or (path / "result.json").is_file():
            runs.append(_read_run(path, path.name))
        else:
            raise FdivError(f"{path} is not the output of `fdiv run` or `fdiv sweep`: no result.json or results.json")
    for run in runs:
        run.setting = run.setting or divergence_label(run.result.get("divergence")) if run.result else run.name
    settings = [run.setting for run in runs]
    if len(set(settings)) < len(settings):  # several runs of one divergence that are no seeds of one sweep
        for run in runs:
            run.setting = run.name
    return runs, sweeps


def _read_sweep(file: Path) -> SweepRecord:
    from fdiv.report.table import cell_label

    results = read_json(file)
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
    return RunRecord(
        name=name,
        path=path,
        result=read_json(result) if result.is_file() else {},
        environment=read_json(environment) if environment.is_file() else {},
        history=_read_history(history) if history.is_file() else [],
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
    )


def _read_history(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise FdivError(f"{path} is not one JSON object a line: {error}") from error
