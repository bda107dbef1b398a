"""`fdiv sweep`: run the cells of a `sweep:` block, each a run of its own, and write one table of them all.

Finished cells are not run again, and none is started when the minutes are over; the table says what was not run.
`collect` draws table and plots again from `results.json` alone.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fdiv.errors import FdivError, TerminatedError
from fdiv.files import one_line, plain, write_text
from fdiv.lock import output_lock
from fdiv.provenance import git_revision, package_versions
from fdiv.recipe.crossing import never_together, value_when
from fdiv.recipe.document import read_document
from fdiv.recipe.dump import resolved_yaml
from fdiv.recipe.load import find_recipe, read_sweep
from fdiv.recipe.sweep import SweepBlock
from fdiv.recipe.yaml_text import load_yaml
from fdiv.report.metrics import meanings
from fdiv.report.records import read_history, read_result, read_results
from fdiv.report.table import aggregate, cell_label, markdown, method_of, rows_table, table
from fdiv.run.cells import Cell, SweepPlan, plan_sweep
from fdiv.run.directory import RunDirectory
from fdiv.sealed import check_listed, write_record
from fdiv.terminal import info, is_main_process, print_table

__all__ = ["collect", "plan_sweep", "print_cells", "run_sweep"]

# What may go wrong in one cell without saying anything about the others (RuntimeError holds out-of-memory).
_CELL_FAILURES = (FdivError, ValueError, RuntimeError, OSError, ArithmeticError)
_GIVING_UP = 60.0  # seconds in which what makes a cell fail is found by all processes
_IGNORED = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "use_cpu")


def run_sweep(plan: SweepPlan, command: str, minutes: float | None = None, results: Path | None = None) -> list[str]:
    """Run the cells that are not finished, then write `results.json`, `table.md`, the plots and the report.

    Args:
        plan: From `plan_sweep`.
        command: The command line to record.
        minutes: Start no further cell after this many; None: the block's `minutes`, without limit when it has none.
        results: Where the results go; None: beside the cells.

    Returns:
        One line per failed cell and per requirement that does not hold; empty when all is well.

    Raises:
        FdivError: a finished cell was run with other settings than it has now; another process runs the sweep.
    """
    with output_lock(plan.root):
        return _run_sweep(plan, command, minutes, results)


def _run_sweep(plan: SweepPlan, command: str, minutes: float | None, results: Path | None) -> list[str]:
    for cell in plan.cells():
        _check_unchanged(plan, cell)
    plan.check_screened()
    _quiet_loading_bars()
    minutes = plan.block.minutes if minutes is None else minutes
    stop = None if minutes is None else time.monotonic() + 60 * minutes
    before = {cell.name for cell in plan.cells() if _finished(plan, cell)}
    if before:
        info(f"{len(before)} cells finished before")
    failed: dict[str, str] = {}
    started: list[str] = []
    said: set[str] = set()
    while (cell := _next(plan, started)) is not None and not _is_over(stop):
        started.append(cell.name)
        left = sum(not _finished(plan, other) for other in plan.cells())
        info(f"[{len(started)}, {left} left that are known] {cell.name}")
        failure = _run_cell(plan, cell, command)
        if failure:
            failed[cell.name] = failure
        plan.check_screened()
        for line in _unreached(plain(plan.block.screen), [plain(choice) for choice in plan.choices()]):
            if line not in said:
                info(line)
            said.add(line)
    records = [_record(plan, cell, failed) for cell in plan.cells()] + _waiting(plan)
    missing = [record["name"] for record in records if record["status"] == "not run"]
    if missing:
        info(f"not run, the time was up: {', '.join(missing)}")
    if is_main_process():
        _write(plan, records, command, results or plan.root)
    unmet = [
        f"sweep cell {record['name']}: {line}"
        for record in records
        for line in record.get("values", {}).get("unmet_requirements", ())
    ]
    return [f"sweep cell {name} failed: {text}" for name, text in failed.items()] + unmet


def _next(plan: SweepPlan, started: Sequence[str]) -> Cell | None:
    """The first cell in order that is neither finished nor was started."""
    for cell in plan.cells():
        if cell.name not in started and not _finished(plan, cell):
            return cell
    return None


def _is_over(stop: float | None) -> bool:
    """Whether the time is over, by the main process's clock."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    if stop is None:
        return False
    over = [time.monotonic() >= stop]
    return (broadcast_object_list(over) if PartialState().num_processes > 1 else over)[0]


def _finished(plan: SweepPlan, cell: Cell) -> bool:
    return RunDirectory(plan.root / cell.name).finished


def _quiet_loading_bars() -> None:
    """Only the training bars stay: dozens of cells would each show those of loading and tokenising."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def _check_unchanged(plan: SweepPlan, cell: Cell) -> None:
    """A finished cell must be what the recipe describes now."""
    if not _finished(plan, cell):
        return
    folder = plan.root / cell.name
    check_listed(folder / "recipe_resolved.yaml", f"remove {folder}, so that the cell runs again")
    before = read_document(folder / "recipe_resolved.yaml").values
    now = load_yaml(resolved_yaml(plan.plan(cell).recipe), cell.name)[1]
    changed = [key for key in before if key in now and key not in _IGNORED and before[key] != now[key]]
    if changed:
        key = changed[0]
        raise FdivError(
            f"{folder} holds a finished cell with {key}={before[key]!r}, the recipe now says {now[key]!r}; choose "
            "another --output_dir, or remove that directory"
        )


def _run_cell(plan: SweepPlan, cell: Cell, command: str) -> str | None:
    """Run one cell; the failure as one line, with its traceback in `error.txt`."""
    import torch

    from fdiv.run.run import measure_plan, run_plan

    run = measure_plan if cell.stage == "model" else run_plan
    try:
        run(plan.plan(cell), command, plan.root / "prepared")
    except TerminatedError as error:  # the whole sweep is asked to stop
        raise TerminatedError(f"terminated (SIGTERM): {_in_sweep(cell)}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted (Ctrl-C): {_in_sweep(cell)}") from None
    except _CELL_FAILURES as error:
        folder = plan.root / cell.name
        if is_main_process():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "error.txt", traceback.format_exc())
        _check_given_up(cell, error)
        return f"{type(error).__name__}: {one_line(error)} (traceback in {folder / 'error.txt'})"
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return None


def _check_given_up(cell: Cell, error: BaseException) -> None:
    """Of several processes, see that all have failed in this cell.

    One that failed alone must not go on to the next cell: the others, which wait for it in this one, would take what
    it does there for their own work.

    Raises:
        FdivError: another process has not failed within a while.
    """
    import torch
    from accelerate import PartialState

    state = PartialState()
    if state.num_processes == 1 or not torch.distributed.is_initialized():
        return
    store, key = torch.distributed.distributed_c10d._get_default_store(), f"fdiv/sweep/given up/{cell.name}"
    store.add(key, 1)
    stop = time.monotonic() + _GIVING_UP
    while store.add(key, 0) < state.num_processes:
        if time.monotonic() > stop:
            raise FdivError(
                f"sweep cell {cell.name}: process {state.process_index} failed and others did not, so the sweep ends: "
                f"{one_line(error)}. Run the same command again; finished cells are kept"
            ) from error
        time.sleep(0.1)


def _in_sweep(cell: Cell) -> str:
    return (
        f"stopped in the cell {cell.name}; run the same command again; finished cells are kept, and --minutes 0 "
        "writes their results"
    )


# ---------------------------------------------------------------- results
def _record(plan: SweepPlan, cell: Cell, failed: Mapping[str, str]) -> dict[str, Any]:
    """What `results.json` says of a cell."""
    record: dict[str, Any] = {"name": cell.name, "settings": dict(cell.settings), "stage": cell.stage}
    if not _finished(plan, cell):
        error = failed.get(cell.name)
        return record | ({"status": "not run"} if error is None else {"status": "failed", "error": error})
    folder = plan.root / cell.name
    record |= {"status": "finished", "values": read_result(folder) | _crossings(plan.block, folder)}
    series = _series(plan.block, folder / "metrics.jsonl")
    return record | ({"series": series} if series else {})


def _crossings(block: SweepBlock, folder: Path) -> dict[str, float | None]:
    """The metrics of the form `when METRIC>=LEVEL/WANTED`, from the log of a run."""
    log = folder / "metrics.jsonl"
    if not block.crossings or not log.is_file():
        return {}
    history = read_history(log)
    for name in block.crossings:
        if never_together(name, history):
            info(f"{folder.name}: no log entry holds both metrics of {name!r}: it is empty for that reason")
    return {name: value_when(name, history) for name in block.crossings}


def _series(block: SweepBlock, log: Path) -> dict[str, list[float | None]]:
    """The logged values that the block's paths are plotted from."""
    series: dict[str, list[float | None]] = {}
    for panel in (panel for panels in block.plots.values() for panel in panels if panel.kind == "path"):
        if log.is_file():
            entries = [entry for entry in read_history(log) if panel.x in entry and panel.y in entry]
            series |= {name: [entry[name] for entry in entries] for name in (panel.x, panel.y) if name and entries}
    return series


def _waiting(plan: SweepPlan) -> list[dict[str, Any]]:
    """A record for every row whose runs still wait for screening, so that the table shows it."""
    return [
        {"name": row.label, "settings": dict(row.settings), "stage": "run", "status": "not run"}
        for row in plan.undecided()
    ]


def _write(plan: SweepPlan, records: list[dict[str, Any]], command: str, folder: Path) -> None:
    """`results.json`, then everything that is plotted from it."""
    screen = plan.block.screen
    results = {
        "recipe": plan.name,
        "command": command,
        "versions": package_versions(),
        "git": git_revision(),
        "seeds": sorted({record["settings"]["seed"] for record in records if "seed" in record["settings"]}),
        "axes": dict(plan.axes),
        "columns": _columns(records),
        "table": {name: plain(column) for name, column in plan.block.table.items()},
        "screen": None if screen is None else plain(screen),
        "chosen": [dataclasses.asdict(choice) for choice in plan.choices()],
        "start": _start(plan.block, records),
        "cells": records,
        "aggregate": aggregate(records),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder / "results.json", results)
    _show(plan.block, results, folder)
    if plan.report is not None:
        from fdiv.report import write_report

        info(f"report: {write_report([folder], folder / 'report.html', plan.report.get('title'))}")


def _unreached(screen: Mapping[str, Any] | None, chosen: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for every row of which no candidate reached the levels of `screen.at_least`."""
    levels = ", ".join(f"{metric} {level:g}" for metric, level in ((screen or {}).get("at_least") or {}).items())
    return [
        f"{cell_label(choice['settings'])}: no candidate reached screen.at_least ({levels}); the nearest was chosen"
        for choice in chosen
        if choice.get("at_least_reached") is False
    ]


def _columns(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics that the evaluations of the first finished run put forward."""
    for record in records:
        if record["status"] == "finished" and record["stage"] == "run":
            return record["values"]["summary_metrics"]
    return []


def _start(block: SweepBlock, records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The numbers before training, mean over the runs (their seeds may sample differently)."""
    runs = [record["values"] for record in records if record["status"] == "finished" and record["stage"] == "run"]
    if block.start is None or not runs:
        return None
    found: dict[str, list[float]] = {}
    for values in runs:
        for name, value in values.items():
            if name.startswith("before/") and value is not None:
                found.setdefault(name.removeprefix("before/"), []).append(value)
    return {"label": block.start, "values": {name: statistics.fmean(numbers) for name, numbers in found.items()}}


def collect(source: str, folder: Path | None = None) -> Path:
    """Write `table.md` and the plots of a sweep again from its `results.json`, which is not changed.

    Args:
        source: The recipe or experiment file.
        folder: Where `results.json` is; None: beside an experiment file.

    Raises:
        FdivError: no `results.json` there; it holds a row that the file does not.
    """
    _, _, block = read_sweep(source)
    folder = folder or find_recipe(source).parent
    results = read_results(folder / "results.json")
    labels = {arm.label for arm in block.arms}
    for record in results["cells"]:
        label = record["settings"].get("method")
        if record.get("stage", "run") != "model" and labels and label not in labels:
            raise FdivError(f"{folder / 'results.json'} has a row {label!r}, and `sweep.method` of {source} has not")
    _show(block, {**results, "aggregate": aggregate(results["cells"])}, folder)
    return folder


def _show(block: SweepBlock, results: Mapping[str, Any], folder: Path) -> None:
    """`table.md` and the plots in `folder`, the table on the terminal."""
    from fdiv.report.page import write_frontier
    from fdiv.report.plots import write_plots

    groups, columns, method = results["aggregate"], results["columns"], method_of(results)
    if block.table:
        marked = block.screen.key if block.screen and block.screen.keep == "all" else None
        header, rows = wide = rows_table(results, block.table, marked)
        note = "mean ± standard error over seeds" + (f"; *: the {marked} that was chosen" if marked else "")
    else:
        wide = table(groups, columns, method=method)
        header, rows = table(groups, columns, wide=False, method=method)
        note = "before → after training, mean ± standard error over seeds"
    write_text(folder / "table.md", markdown(*wide))
    title = f"{results['recipe']}: {len(results['cells'])} cells"
    shown = meanings(block.table or columns, method, {name: column.title for name, column in block.table.items()})
    unreached = _unreached(results.get("screen"), results.get("chosen") or ())
    print_table(title, header, rows, [note, *unreached, *shown, f"everything is in {folder}"])
    write_frontier(folder)
    write_plots(results, block.plots, folder)


# ---------------------------------------------------------------- dry run
def print_cells(plan: SweepPlan, minutes: float | None = None) -> None:
    """The cells of a plan, which are finished, and how long the others may take."""
    cells = list(plan.cells())
    rows = [
        (cell.name, cell_label(cell.settings), _seed(cell), cell.stage, "yes" if _finished(plan, cell) else "no")
        for cell in cells
    ]
    screen = plan.block.screen
    later = 0
    for row in plan.undecided():
        later += len(row.seeds) - plan.reuses(row)
        seeds = ", ".join(str(seed) for seed in row.seeds)
        rows.append((f"{row.label}, the best {screen.key}" if screen else row.label, "", seeds, "run", "no"))
    title = f"{len(cells)} cells in {plan.root}" + (f", {later} more after screening" if later else "")
    header = ("cell", "settings", "seed", "stage", "finished")
    print_table(title, header, rows, _estimate(plan, cells, later, minutes), text_columns=(0, 1, 3))


def _seed(cell: Cell) -> str:
    return str(cell.settings.get("seed", "–"))


def _estimate(plan: SweepPlan, cells: Sequence[Cell], later: int, minutes: float | None) -> list[str]:
    """What is left, in minutes: by the cells that finished here, else by the record beside an experiment file."""
    left = sum(not _finished(plan, cell) for cell in cells) + later
    folders = [plan.root / cell.name for cell in cells if _finished(plan, cell)]
    seconds = [read_result(folder).get("wall_seconds") for folder in folders]
    source = f"{len(folders)} finished cells"
    record = find_recipe(plan.source).parent / "results.json"
    if not seconds and find_recipe(plan.source).stem == "experiment" and record.is_file():
        values = [cell.get("values", {}) for cell in read_results(record)["cells"]]
        seconds = [entry.get("wall_seconds", entry.get("train_seconds")) for entry in values]
        source = f"{record}, training alone where it says no more"
    known = [second for second in seconds if second is not None]
    limit = plan.block.minutes if minutes is None else minutes
    notes = [f"no cell is started after {limit:g} minutes"] if limit is not None else []
    if not known:
        return [f"{left} cells to run; how long one takes is not known yet", *notes]
    mean = statistics.fmean(known)
    return [f"{left} cells to run, about {left * mean / 60:.1f} minutes at {mean:.0f} s each (by {source})", *notes]
