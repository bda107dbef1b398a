"""The cells of a sweep: which runs a `sweep:` block asks for, in which order, and which value screening chose."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from fdiv.errors import FdivError, RecipeError
from fdiv.named import shown
from fdiv.recipe.load import load_cell, load_recipe, read_sweep
from fdiv.recipe.model import Recipe
from fdiv.recipe.schema import CommandLineValue
from fdiv.recipe.sweep import Arm, Screen, SweepBlock, staged
from fdiv.recipe.variables import interpolate
from fdiv.report.records import read_result
from fdiv.report.table import cell_label
from fdiv.run.check import check_screen_names, check_sweep_names
from fdiv.run.directory import RunDirectory
from fdiv.run.plan import RunPlan, plan_run

__all__ = ["Cell", "Choice", "Row", "SweepPlan", "cell_name", "check_axes", "plan_sweep"]

Stage = Literal["run", "screen", "model"]


@dataclass(frozen=True)
class Row:
    """One row of the table: an entry of `method:` and one value of every axis but the seed."""

    arm: Arm
    settings: Mapping[str, Any]
    seeds: tuple[int | None, ...]

    @property
    def label(self) -> str:
        """`FLAT TV`, `alpha(alpha=0.3), beta 0.1`."""
        return cell_label(self.settings)


@dataclass(frozen=True)
class Cell:
    """One run: its settings, and the name of its directory."""

    name: str
    settings: Mapping[str, Any]
    row: Row
    stage: Stage = "run"


@dataclass(frozen=True)
class Choice:
    """What screening found for a row: the value chosen, the metric at every value that finished, and whether the
    chosen one reaches all of `at_least`; None where nothing is asked for."""

    settings: Mapping[str, Any]
    key: str
    value: Any
    scores: Mapping[str, float | None]
    at_least_reached: bool | None = None


def _number(folder: Path, key: str, metric: str) -> float | None:
    """A number of a finished screening run; a metric without a stage is that after training, as in the table."""
    result, name = read_result(folder), staged(metric)
    if name not in result:
        known = ", ".join(sorted(name for name in result if "/" in name))
        raise FdivError(
            f"screen.{key}: {name!r} is not in {folder}/result.json; correct the name and run the same command again "
            f"(finished cells are kept); it has: {known}"
        )
    return result[name]


def _nearness(folder: Path, at_least: Mapping[str, float]) -> float:
    """The smallest ratio of a number to its level, 1 where all reach theirs; 0 where a number has no value."""
    numbers = {metric: _number(folder, "at_least", metric) for metric in at_least}
    return min((1.0, *((numbers[metric] or 0.0) / least for metric, least in at_least.items())))


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that has been checked: every cell's recipe was read and resolved.

    Args:
        source: The recipe or experiment file.
        name: Of the recipe, or of the experiment's folder.
        root: Where the cells go, each into a directory of its own.
        overrides: Command-line words that hold for all cells.
        block: The `sweep:` block.
        rows: The rows, in order.
        report: Title of the report that is written at the end; None: no report.
    """

    source: str
    name: str
    root: Path
    overrides: tuple[str, ...]
    block: SweepBlock
    rows: tuple[Row, ...]
    report: Mapping[str, Any] | None = None
    _resolved: dict[str, RunPlan] = field(default_factory=dict, repr=False, compare=False)

    @property
    def axes(self) -> Mapping[str, str]:
        """`reward` and `divergence`: metrics of the frontier plot; empty when block and evaluation name none."""
        if self.block.metrics:
            return self.block.metrics
        first = next(iter(self.cells()))
        for block in self.plan(first).recipe.evaluations:
            frontier = getattr(block.config, "frontier", None)  # optional class attribute, see catalog.EVALUATIONS
            if frontier:
                return {"divergence": frontier[0], "reward": frontier[1]}
        return {}

    def cells(self) -> Iterator[Cell]:
        """The cells that are known now, in order, each once; those that screening decides follow when it is finished.

        Rows with the same seeds stand together, those with the first row's seeds first. With `method:` or `screen:`
        the seed varies slowest, so that all rows have one seed before one has two; else it varies fastest.
        """
        found: dict[str, Cell] = {}
        for cell in self._cells():
            found[cell.name] = cell  # a screening run that is the row's own run counts as that
        return iter(found.values())

    def _cells(self) -> Iterator[Cell]:
        screen = self.block.screen
        for seeds in dict.fromkeys(row.seeds for row in self.rows):
            rows = [row for row in self.rows if row.seeds == seeds]
            if screen is not None:
                judges = {self._judge(row).label for row in rows}
                for row in (row for row in self.rows if row.label in judges):
                    yield from (self.screen_cell(row, value) for value in screen.values)
            if screen is not None or self.block.arms:
                for seed, row in itertools.product(seeds, rows):
                    yield from (self._run_cell(row, extra, seed) for extra in self._extras(row))
            else:
                for row, seed in itertools.product(rows, seeds):
                    yield self._run_cell(row, {}, seed)
        for model in self.block.models:
            name = cell_name({"model": model.label})
            yield Cell(name, {"method": model.label}, Row(model, {"method": model.label}, (None,)), "model")

    def undecided(self) -> list[Row]:
        """The rows whose runs wait for screening."""
        return [row for row in self.rows if not self._extras(row)]

    def _extras(self, row: Row) -> list[dict[str, Any]]:
        """The screened key at each value that the row runs with; empty while that is undecided."""
        screen = self.block.screen
        if screen is None:
            return [{}]
        if screen.keep == "all":
            return [{screen.key: value} for value in screen.values]
        choice = self.choice(row)
        return [] if choice is None else [{screen.key: choice.value}]

    def _run_cell(self, row: Row, extra: Mapping[str, Any], seed: int | None) -> Cell:
        settings = {**row.settings, **extra, **({} if seed is None else {"seed": seed})}
        return Cell(cell_name(settings), settings, row)

    def screen_cell(self, row: Row, value: Any) -> Cell:
        """The screening run of a row at one value, with its first seed."""
        screen = self._screen()
        cell = self._run_cell(row, {screen.key: value}, row.seeds[0])
        name = f"screen_{cell.name}" if screen.apart else cell.name
        return dataclasses.replace(cell, name=name, stage="screen")

    def _screen(self) -> Screen:
        assert self.block.screen is not None
        return self.block.screen

    def _judge(self, row: Row) -> Row:
        """The row whose screening decides for `row`."""
        by = self._screen().by
        if by is None:
            return row
        named = [other for other in self.rows if by in (other.label, other.arm.label)]
        alike = [r for r in named if {**r.settings, "method": ""} == {**row.settings, "method": ""}]
        return (alike or named)[0]

    def reuses(self, row: Row) -> bool:
        """Whether the row's first seed needs no run of its own: its screening run is the same."""
        return self.block.screen is not None and not self.block.screen.apart and self._judge(row) == row

    def choice(self, row: Row) -> Choice | None:
        """What screening chose for a row; None until all its screening runs have finished or failed.

        A failed run is no candidate, nor is one whose metric has no value. In a tie the smaller number wins. Of the
        candidates that reach all levels of `at_least` the best is chosen; where none does, the one nearest to them.

        Raises:
            FdivError: a metric is not in a run's result.
        """
        screen, judge = self._screen(), self._judge(row)
        scores: dict[Any, float] = {}
        near: dict[Any, float] = {}
        shown: dict[str, float | None] = {}
        for value in screen.values:
            folder = self.root / self.screen_cell(judge, value).name
            if not RunDirectory(folder).finished:
                if not (folder / "error.txt").is_file():
                    return None
                shown[str(value)] = None
                continue
            score = shown[str(value)] = _number(folder, "metric", screen.metric)
            if score is not None:
                scores[value] = score
                near[value] = _nearness(folder, screen.at_least or {})
        if not scores:
            return None
        numbers = all(isinstance(value, (int, float)) for value in scores)
        sign = 1 if screen.better == "higher" else -1
        # All that reach the levels have the nearness 1, so the metric decides among them.
        best = max(sorted(scores) if numbers else scores, key=lambda value: (near[value], sign * scores[value]))
        reached = near[best] == 1 if screen.at_least else None
        return Choice({**row.settings, screen.key: best}, screen.key, best, shown, reached)

    def choices(self) -> list[Choice]:
        """What screening has chosen so far.

        Raises:
            FdivError: a metric is not in a run's result.
        """
        found = [self.choice(row) for row in self.rows] if self.block.screen is not None else []
        return [choice for choice in found if choice is not None]

    def check_screened(self) -> None:
        """Look up in every finished screening run the numbers that it is judged by, before the others have run.

        Raises:
            FdivError: a metric is not in a run's result.
        """
        if self.block.screen is None:
            return
        judges = {judge.label: judge for judge in map(self._judge, self.rows)}
        for judge, value in itertools.product(judges.values(), self.block.screen.values):
            folder = self.root / self.screen_cell(judge, value).name
            if RunDirectory(folder).finished:
                _number(folder, "metric", self.block.screen.metric)
                _nearness(folder, self.block.screen.at_least or {})

    def plan(self, cell: Cell) -> RunPlan:
        """The cell's recipe, resolved.

        Raises:
            RecipeError: something is wrong with it; the message names the cell.
        """
        if cell.name not in self._resolved:
            try:
                self._resolved[cell.name] = plan_run(self._recipe(cell))
            except RecipeError as error:
                raise RecipeError(f"{error} (sweep cell {cell.name})") from error
        return self._resolved[cell.name]

    def _recipe(self, cell: Cell) -> Recipe:
        arm = cell.row.arm
        settings: dict[str, Any] = {key: value for key, value in cell.settings.items() if key != "method"}
        if cell.stage == "model" and arm.extends is None and self.block.arms:  # a model starts from the first row
            first = self.rows[0].arm
            arm = dataclasses.replace(arm, extends=first.extends, keys={**first.keys, **arm.keys})
        settings = {**arm.keys, **settings, "output_dir": str(self.root / cell.name)}
        if cell.stage == "screen":
            screen = self._screen()
            settings |= {} if screen.split is None else {"dataset_test_split": screen.split}
            settings |= screen.settings or {}
        recipe = load_cell(self.source, arm.extends, self.overrides, settings, arm.places)
        # Only a cell that is not finished is run.
        return dataclasses.replace(recipe, stated=MappingProxyType({**recipe.stated, "overwrite_output_dir": True}))

    def check(self) -> None:
        """Read and resolve every cell, those that screening may choose too, before the first one runs.

        Raises:
            RecipeError: a cell that its config refuses, two cells of one name.
        """
        names: dict[str, Mapping[str, Any]] = {}
        for cell in [*self.cells(), *self._candidates()]:
            if names.setdefault(cell.name, cell.settings) != cell.settings:
                raise RecipeError(f"{self.source}: sweep: two cells are called {cell.name!r}")
            self.plan(cell)
        screen = self.block.screen
        for row in self.rows if screen is not None else ():
            check_screen_names(screen, self.plan(self.screen_cell(self._judge(row), screen.values[0])).recipe)

    def _candidates(self) -> Iterator[Cell]:
        """The first seed's run of every row at every screened value."""
        if self.block.screen is not None:
            for row, value in itertools.product(self.rows, self.block.screen.values):
                yield self._run_cell(row, {self.block.screen.key: value}, row.seeds[0])


def plan_sweep(
    source: str,
    overrides: Sequence[str] = (),
    axes: Mapping[str, list[Any]] | None = None,
    methods: Sequence[str] | None = None,
) -> SweepPlan:
    """Check a recipe or an experiment file and every cell of its sweep before the first one runs.

    Args:
        source: A path, or the name of a packaged recipe.
        overrides: Command-line words that hold for all cells.
        axes: Values by key that replace or add to those of the `sweep:` block.
        methods: Labels of the rows to run; all when None. Without rows in the block: methods by name.

    Raises:
        RecipeError: nothing to sweep, or a cell that its config refuses; the message names the cell.
    """
    name, values, block = read_sweep(source, overrides)
    block = dataclasses.replace(block, axes={**block.axes, **(axes or {})}, arms=_picked(block.arms, methods, source))
    if not block.axes and not block.arms and block.screen is None:
        raise RecipeError(
            f"{source}: nothing to sweep; give --divergences and --seeds, or a `sweep:` block with lists"
        )
    for key, entries in block.axes.items():
        if len({str(entry) for entry in entries}) < len(entries):
            raise RecipeError(f"{source}: sweep: a value of {key!r} is listed twice: {entries}")
    stated = values.get("output_dir")
    stated = " ".join(stated.words) if isinstance(stated, CommandLineValue) else stated
    root = Path(interpolate(stated, {}, "output_dir", source) if stated else f"runs/{name}-sweep")
    report = values.get("report")
    report = report.read() if isinstance(report, CommandLineValue) else report
    rows = tuple(_rows(block))
    by = block.screen.by if block.screen else None
    labels = dict.fromkeys(label for row in rows for label in (row.arm.label or row.label, row.label))
    if by is not None and by not in labels:
        raise RecipeError(f"{source}: `sweep.screen.by` must be a row ({', '.join(labels)}), got {shown(by)}")
    plan = SweepPlan(source, name, root, tuple(overrides), block, rows, report)
    plan.check()
    check_sweep_names(block, plan.plan(next(plan.cells())).recipe)
    return plan


def check_axes(recipe: Recipe, source: str, overrides: Sequence[str], variables: Mapping[str, str]) -> None:
    """Resolve a recipe at every value of its `sweep:` block, one at a time: what a dry run of the recipe says of it.

    Args:
        recipe: As read from `source` with `overrides`.
        source: A path, or the name of a packaged recipe.
        overrides: Command-line words.
        variables: Values of `${NAME}` in place of the environment's.

    Raises:
        RecipeError: a value that the recipe cannot have, a metric that does not exist.
    """
    _, _, block = read_sweep(source, overrides)
    for key, entries in block.axes.items():
        for value in entries:
            try:
                plan_run(load_recipe(source, overrides, {str(key): value}), variables)
            except RecipeError as error:
                raise RecipeError(f"{error} (sweep.{key}: {shown(value)})") from error
    check_sweep_names(block, recipe)


def _picked(arms: tuple[Arm, ...], methods: Sequence[str] | None, source: str) -> tuple[Arm, ...]:
    """The rows that `--methods` names."""
    if methods is None:
        return arms
    if not arms:
        return tuple(Arm(name, {"method": name}) for name in methods)
    labels = [arm.label for arm in arms]
    for method in methods:
        if method not in labels:
            raise RecipeError(
                f"{source}: --methods: no row {method!r} in `sweep.method`; there are: {', '.join(labels)}"
            )
    return tuple(arm for arm in arms if arm.label in methods)


def _rows(block: SweepBlock) -> Iterator[Row]:
    """Every arm with every combination of the axes but the seed."""
    keys = [key for key in block.axes if key != "seed"]
    for arm in block.arms or (Arm(""),):
        for combination in itertools.product(*(block.axes[key] for key in keys)):
            settings = {**({"method": arm.label} if arm.label else {}), **dict(zip(keys, combination, strict=True))}
            yield Row(arm, settings, arm.seeds or tuple(block.axes.get("seed", (None,))))


def cell_name(settings: Mapping[str, Any]) -> str:
    """`alpha-0.3_beta-0.1_seed-0`: a directory name from the settings of a cell."""
    parts = []
    for key, value in settings.items():
        if isinstance(value, dict):
            text = "-".join(str(entry) for entry in value.values())
        else:
            text = str(value)
        parts.append(text if key in ("divergence", "method") else f"{key.split('.')[-1]}-{text}")
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", "_".join(parts)).strip("-")


# Names of release 0.1; they go with release 0.3.
Plan = SweepPlan
sweep_cells = plan_sweep
