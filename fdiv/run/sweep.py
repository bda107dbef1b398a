"""A sweep: one recipe × divergences × seeds (× any other key), each cell a run of its own, one table of them all."""

from __future__ import annotations

import gc
import itertools
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fdiv.errors import FdivError, RecipeError
from fdiv.files import one_line, read_json, write_json
from fdiv.provenance import git_revision, package_versions
from fdiv.recipe.dump import resolved_yaml
from fdiv.recipe.load import load_recipe
from fdiv.recipe.model import Recipe
from fdiv.report.table import _columns, _markdown, aggregate, cell_label, table
from fdiv.run.directory import RunDirectory
from fdiv.terminal import info, is_main_process, print_table

__all__ = ["Cell", "Plan", "print_cells", "run_sweep", "sweep_cells"]

# What may go wrong in one cell without saying anything about the others (RuntimeError holds out-of-memory).
_CELL_FAILURES = (FdivError, ValueError, RuntimeError, OSError, ArithmeticError)
_IGNORED = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "use_cpu")


@dataclass
class Cell:
    """One combination of the swept values: its settings, the directory's name and the checked recipe."""

    settings: dict[str, Any]
    name: str
    recipe: Recipe


@dataclass
class Plan:
    """The cells of a sweep and where they go."""

    recipe: Recipe
    root: Path
    cells: list[Cell]
    axes: dict[str, str]
    """`reward` and `divergence`: metrics of the frontier plot; empty when neither recipe nor evaluation names them."""


def sweep_cells(source: str, overrides: Sequence[str] = (), axes: Mapping[str, list[Any]] | None = None) -> Plan:
    """Check a recipe and every cell of its sweep before the first one runs.

    Args:
        source: A recipe's path or name.
        overrides: Command-line words that hold for all cells.
        axes: Values by key that replace or add to those of the `sweep:` block.

    Raises:
        RecipeError: nothing to sweep, or a cell that its config refuses; the message names the cell.
    """
    base = load_recipe(source, overrides)
    block = dict(base.sweep or {})
    metrics = block.pop("metrics", None)
    values = {**block, **(axes or {})}
    if not values:
        raise RecipeError(
            f"{base.source}: nothing to sweep; give --divergences and --seeds, or a `sweep:` block with lists"
        )
    # Seeds vary fastest, so that the first rows of a long sweep are complete early.
    keys = sorted(values, key=lambda key: key == "seed")
    root = base.output_dir if "output_dir" in base.stated else Path("runs") / f"{base.name}-sweep"
    cells = []
    for combination in itertools.product(*(values[key] for key in keys)):
        settings = dict(zip(keys, combination, strict=True))
        name = cell_name(settings)
        if name in (cell.name for cell in cells):
            raise RecipeError(f"{base.source}: sweep: two cells are called {name!r}; a value is listed twice")
        cells.append(Cell(settings, name, _cell_recipe(source, overrides, settings, root / name)))
    return Plan(base, root, cells, metrics or _default_axes(cells[0].recipe))


def _cell_recipe(source: str, overrides: Sequence[str], settings: dict[str, Any], folder: Path) -> Recipe:
    from fdiv.run.run import check_blocks

    try:
        recipe = load_recipe(source, overrides, {**settings, "output_dir": str(folder)})
        recipe.sweep, recipe.report = None, None  # the sweep writes one report of all cells
        recipe.configs()
        check_blocks(recipe)
    except RecipeError as error:
        raise RecipeError(f"{error} (sweep cell {cell_name(settings)})") from error
    return recipe


def _default_axes(recipe: Recipe) -> dict[str, str]:
    for block in recipe.evaluations:
        frontier = getattr(block.config, "frontier", None)  # optional class attribute, see fdiv.catalog.EVALUATIONS
        if frontier:
            return {"divergence": frontier[0], "reward": frontier[1]}
    return {}


def cell_name(settings: Mapping[str, Any]) -> str:
    """`alpha-0.3_beta-0.1_seed-0`: a directory name from the settings of a cell."""
    parts = []
    for key, value in settings.items():
        if isinstance(value, dict):
            text = "-".join(str(entry) for entry in value.values())
        else:
            text = str(value)
        parts.append(text if key == "divergence" else f"{key.split('.')[-1]}-{text}")
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", "_".join(parts)).strip("-")


def print_cells(plan: Plan) -> None:
    """The cells of a plan, and which are finished."""
    rows = [
        (cell.name, cell_label(cell.settings), str(cell.settings.get("seed", "–")), "yes" if _finished(cell) else "no")
        for cell in plan.cells
    ]
    print_table(
        f"{len(plan.cells)} cells in {plan.root}", ("cell", "settings", "seed", "finished"), rows, text_columns=(0, 1)
    )


def _finished(cell: Cell) -> bool:
    return RunDirectory(cell.recipe.output_dir).finished


def run_sweep(plan: Plan, command: str) -> list[str]:
    """Run the cells that are not finished, then write `results.json`, `table.md`, the frontier plot and the report.

    Returns:
        One line per failed cell and per requirement that does not hold; empty when all is well.

    Raises:
        FdivError: a finished cell was run with other settings than it has now.
    """
    for cell in plan.cells:
        _check_unchanged(cell)
    _quiet_loading_bars()
    records, failures = [], []
    for index, cell in enumerate(plan.cells, start=1):
        position = f"[{index}/{len(plan.cells)}] {cell.name}"
        if _finished(cell):
            info(f"{position}: finished before")
        else:
            info(position)
            failure = _run_cell(cell, plan, command)
            if failure:
                failures.append(f"sweep cell {cell.name} failed: {failure}")
                records.append({"name": cell.name, "settings": cell.settings, "status": "failed", "error": failure})
                continue
        result = read_json(cell.recipe.output_dir / "result.json")
        failures += [f"sweep cell {cell.name}: {line}" for line in result["unmet_requirements"]]
        records.append({"name": cell.name, "settings": cell.settings, "status": "finished", "values": result})
    if is_main_process():
        _write(plan, records, command)
    return failures


def _quiet_loading_bars() -> None:
    """Only the training bars stay: dozens of cells would each show those of loading and tokenising."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def _check_unchanged(cell: Cell) -> None:
    """A finished cell must be what the recipe describes now."""
    if not _finished(cell):
        return
    folder = cell.recipe.output_dir
    before = yaml.safe_load((folder / "recipe_resolved.yaml").read_text(encoding="utf-8"))
    now = yaml.safe_load(resolved_yaml(cell.recipe))
    changed = [key for key in before if key in now and key not in _IGNORED and before[key] != now[key]]
    if changed:
        key = changed[0]
        raise FdivError(
            f"{folder} holds a finished cell with {key}={before[key]!r}, the recipe now says {now[key]!r}; choose "
            "another --output_dir, or remove that directory"
        )


def _run_cell(cell: Cell, plan: Plan, command: str) -> str | None:
    """Run one cell; the failure as one line, with its traceback in `error.txt`."""
    import torch

    from fdiv.run.run import run_recipe

    cell.recipe.stated["overwrite_output_dir"] = True  # only an unfinished cell comes here
    try:
        run_recipe(cell.recipe, command, plan.root / "prepared")
    except _CELL_FAILURES as error:
        folder = cell.recipe.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return f"{type(error).__name__}: {one_line(error)} (traceback in {folder / 'error.txt'})"
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return None


def _write(plan: Plan, records: list[dict[str, Any]], command: str) -> None:
    groups = aggregate(records)
    columns = _columns(records)
    seeds = sorted({record["settings"]["seed"] for record in records if "seed" in record["settings"]})
    plan.root.mkdir(parents=True, exist_ok=True)
    results = {
        "recipe": plan.recipe.name,
        "command": command,
        "versions": package_versions(),
        "git": git_revision(),
        "seeds": seeds,
        "axes": plan.axes,
        "columns": columns,
        "cells": records,
        "aggregate": groups,
    }
    write_json(plan.root / "results.json", results)
    (plan.root / "table.md").write_text(_markdown(*table(groups, columns)), encoding="utf-8")
    note = "before → after training, mean ± standard error over seeds"
    header, rows = table(groups, columns, wide=False)
    print_table(f"{plan.recipe.name}: {len(records)} cells", header, rows, [note, f"everything is in {plan.root}"])
    from fdiv.report.page import write_frontier, write_report

    write_frontier(plan.root)
    if plan.recipe.report:
        info(f"report: {write_report([plan.root], plan.root / 'report.html', plan.recipe.report.title)}")
