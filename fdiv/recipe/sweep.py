"""The `sweep:` block of a recipe: what `fdiv sweep` combines, in which order, and what it shows.

sweep:
  method:                                # rows: a label, and the keys that make it what it is
    NPO: {extends: tofu/mini/npo}
    FLAT TV: {extends: tofu/mini/flat, divergence: total_variation}
    RMU: {extends: tofu/mini/rmu, seed: [0]}
  seed: [0, 1, 2]                        # any other key of the recipe with a list of values is an axis
  screen: {key: learning_rate, values: [1e-4, 3e-4], metric: train/best_metric}
  models: {retrained: {model_name_or_path: "${FDIV_SHARED}/models/retrained"}}
  table: {forget_quality: {title: FQ, better: higher, format: .1e}}
  plots: {utility.png: {x: model_utility, y: forget_quality, y_scale: log}}
  minutes: 120
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from fdiv.errors import RecipeError
from fdiv.named import nearest, shown
from fdiv.recipe.crossing import is_crossing, value_when
from fdiv.recipe.overrides import KeyPath
from fdiv.recipe.schema import Key, coerce, nearest_key, section_of

__all__ = ["PLAIN", "Arm", "Column", "Panel", "Screen", "SweepBlock", "parse_sweep", "staged"]

Where = Callable[[KeyPath], str]
Better = Literal["higher", "lower", "zero"]
Scale = Literal["linear", "log", "log2", "symlog"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Arm:
    """One row of the `method` axis.

    Args:
        label: What the table and the plots call it.
        keys: Recipe keys, dotted where nested. They win over the file's own.
        extends: A recipe it starts from, in place of the file's base.
        seeds: Its seeds, where they are fewer than the sweep's.
        places: Where each key stands, for errors.
    """

    label: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    extends: str | None = None
    seeds: tuple[int, ...] | None = None
    places: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Screen:
    """`screen:`: try the values of one key with the first seed, and give the other seeds the best of them.

    A tie goes to the smaller value. Without `split` and `settings` the first seed is not run again. Where no candidate
    reaches the levels of `at_least`, the one nearest to them is chosen, and results and terminal say so.
    """

    key: str = field(metadata={"help": "The key to choose, such as learning_rate."})
    values: list[Any] = field(metadata={"help": "Its candidates."})
    metric: str = field(metadata={"help": "A number of result.json that decides, such as train/best_metric."})
    better: Literal["higher", "lower"] = field(default="higher", metadata={"help": "Which way the metric improves."})
    at_least: dict[str, float] | None = field(
        default=None,
        metadata={
            "help": "Numbers of result.json and the level each must reach: {after/x: 0.8} is at least 0.8, no share."
        },
    )
    split: str | None = field(
        default=None, metadata={"help": "`dataset_test_split` of the screening runs, such as validation."}
    )
    settings: dict[str, Any] | None = field(
        default=None, metadata={"help": "Further keys of the screening runs, such as {max_steps: 40}."}
    )
    by: str | None = field(
        default=None, metadata={"help": "The row whose choice holds for all. Null: each row has its own."}
    )
    keep: Literal["best", "all"] = field(
        default="best", metadata={"help": "all: every value is run with every seed, and the best is marked."}
    )

    @property
    def apart(self) -> bool:
        """Whether the screening runs differ from those that are reported."""
        return bool(self.split or self.settings)


@dataclass(frozen=True)
class Column:
    """A column of the table."""

    title: str | None = field(default=None, metadata={"help": "Heading; the metric's name when null."})
    better: Better | None = field(default=None, metadata={"help": "Which way is better; shown as an arrow."})
    format: str | None = field(
        default=None, metadata={"help": "As Python's, such as .3f or .1e; `each` lists the seeds' values."}
    )


@dataclass(frozen=True)
class Panel:
    """A picture: `points` (a marker per row and seed), `means` (mean ± s.e., joined along `join`), `path` (from log to
    log, a panel per screened value), `curve` (`y` at every `k`) or `heatmap` (`value` over two axes of the sweep)."""

    y: str = field(metadata={"help": "Metric; for `curve` with {k}, such as pass@{k}; for `heatmap` an axis."})
    x: str | None = field(default=None, metadata={"help": "Metric; for `heatmap` an axis; not for `curve`."})
    kind: Literal["points", "means", "path", "curve", "heatmap"] = field(
        default="points", metadata={"help": "What is plotted."}
    )
    value: str | None = field(default=None, metadata={"help": "For `heatmap`: the metric of a cell."})
    value_scale: Literal["linear", "log"] = field(
        default="linear", metadata={"help": "For `heatmap`: of its colours."}
    )
    join: str | None = field(
        default=None, metadata={"help": "For `means`: the key along which a line joins the rows."}
    )
    k: list[int] | None = field(default=None, metadata={"help": "For `curve`: where it is evaluated."})
    less: str | None = field(default=None, metadata={"help": "For `curve`: the row or model that is subtracted."})
    rows: list[str] | None = field(default=None, metadata={"help": "The rows to show; all when null."})
    x_scale: Scale = "linear"
    y_scale: Scale = "linear"
    x_label: str | None = None
    y_label: str | None = None
    title: str | None = None
    level: float | str | None = field(
        default=None, metadata={"help": "A dashed line: a number, or the model whose y it marks."}
    )


@dataclass(frozen=True)
class SweepBlock:
    """A checked `sweep:` block."""

    axes: Mapping[str, list[Any]] = field(default_factory=dict)
    arms: tuple[Arm, ...] = ()
    screen: Screen | None = None
    models: tuple[Arm, ...] = ()
    start: str | None = None
    table: Mapping[str, Column] = field(default_factory=dict)
    plots: Mapping[str, tuple[Panel, ...]] = field(default_factory=dict)
    metrics: Mapping[str, str] | None = None
    minutes: float | None = None

    @property
    def crossings(self) -> list[str]:
        """Metrics of the form `when METRIC>=LEVEL/WANTED` in the table and the plots, each once."""
        panels = [panel for panels in self.plots.values() for panel in panels]
        names = (*self.table, *(name for panel in panels for name in (panel.x, panel.y, panel.value)))
        return list(dict.fromkeys(name for name in names if name is not None and is_crossing(name)))


STRUCTURE = {
    name: Key(name, kind, None, text, group="sweep")
    for name, kind, text in (
        (
            "method",
            dict | list | None,
            "Rows: methods by name, or label → keys (`extends`: a recipe; `seed`: fewer seeds).",
        ),
        ("screen", dict | None, "Choose one key's value with the first seed: {key, values, metric}."),
        ("models", dict | None, "Label → keys of a model that is measured and not trained."),
        ("start", str | None, "Label of a row that shows the numbers before training."),
        ("table", dict | list | None, "Metric → {title, better, format}: the columns; or a list of metrics."),
        ("plots", dict | None, "File → a panel {kind, x, y, …} or a list of panels."),
        ("metrics", dict | None, "Axes of the frontier plot: {reward: NAME, divergence: NAME}."),
        ("minutes", float | None, "Start no further run after this many minutes."),
    )
}
"""The keys of `sweep:` that are no axes."""


def parse_sweep(values: Mapping[str, Any], where: Where) -> SweepBlock:
    """The block with every key and type checked.

    Args:
        values: The mapping under `sweep:`.
        where: The place of a key, for errors: `("sweep", "screen", "key")` → `FILE, line N`.

    Raises:
        RecipeError: what is wrong first, in one line.
    """
    axes = {name: entry for name, entry in values.items() if name not in STRUCTURE}
    for name, entry in axes.items():
        if not isinstance(entry, list) or not entry:
            near = nearest(name, STRUCTURE, cutoff=0.7)
            if near:
                raise RecipeError(
                    f"{where(('sweep', name))}: unknown key {name!r} in `sweep`; did you mean {near[0]!r}?"
                )
            raise RecipeError(f"{where(('sweep', name))}: `sweep.{name}` must be a list of values, got {shown(entry)}")
        _check_axis(name, entry, where)
    arms = _arms(values.get("method"), where)
    screen = values.get("screen")
    block = SweepBlock(
        axes=axes,
        arms=arms,
        screen=None if screen is None else _build(Screen, screen, ("sweep", "screen"), where),
        models=_labelled(values.get("models"), ("sweep", "models"), where),
        start=values.get("start"),
        table=_table(values.get("table"), where),
        plots=_plots(values.get("plots"), where),
        metrics=_metrics(values.get("metrics"), where),
        minutes=_minutes(values.get("minutes"), where),
    )
    _check_screen(block, where)
    _check_heatmaps(block, where)
    return block


def _check_axis(name: str, entries: list[Any], where: Where) -> None:
    """The values of the two axes that name the cells; those of other keys are checked with the cell's recipe."""
    kinds: dict[str, tuple[tuple[type, ...], str]] = {
        "seed": ((int,), "a whole number"),
        "divergence": ((str, dict), "a name or a mapping"),
    }
    kind, due = kinds.get(name, ((object,), ""))
    for entry in entries:
        if not isinstance(entry, kind) or (isinstance(entry, bool) and name in kinds):
            raise RecipeError(f"{where(('sweep', name))}: `sweep.{name}`: {name!r} must be {due}, got {shown(entry)}")


def _arms(value: Any, where: Where) -> tuple[Arm, ...]:
    """`method:` as a list of names, or as label → keys."""
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return tuple(Arm(name, {"method": name}) for name in value)
    if value is not None and not (isinstance(value, dict) and value):
        raise RecipeError(
            f"{where(('sweep', 'method'))}: `sweep.method` must be a list of methods, or label → keys, "
            f"got {shown(value)}"
        )
    return _labelled(value, ("sweep", "method"), where)


def _labelled(value: Any, path: KeyPath, where: Where) -> tuple[Arm, ...]:
    """Label → keys."""
    arms = []
    for label, keys in _mapping(value or {}, path, where).items():
        here = (*path, str(label))
        keys = dict(_mapping(keys or {}, here, where))
        extends, seeds = keys.pop("extends", None), keys.pop("seed", None)
        if extends is not None and not isinstance(extends, str):
            raise RecipeError(
                f"{where((*here, 'extends'))}: `extends` must be the name of one recipe, got {shown(extends)}"
            )
        if seeds is not None and not (isinstance(seeds, list) and seeds and all(isinstance(s, int) for s in seeds)):
            raise RecipeError(
                f"{where((*here, 'seed'))}: `seed` of one row must be a list of seeds, got {shown(seeds)}"
            )
        flat = _dotted(keys)
        places = {key: where((*here, *key.split("."))) for key in flat}
        arms.append(Arm(str(label), flat, extends, None if seeds is None else tuple(seeds), places))
    return tuple(arms)


def _dotted(keys: Mapping[str, Any]) -> dict[str, Any]:
    """`{eval: {k: 1}}` → `{eval.k: 1}`, so that one key of a block is set and the others stay; a mapping with a `name`
    is a value of its own (a divergence, another builder)."""
    flat: dict[str, Any] = {}
    for key, value in keys.items():
        if isinstance(value, dict) and value and "name" not in value:
            flat |= {f"{key}.{inner}": entry for inner, entry in _dotted(value).items()}
        else:
            flat[str(key)] = value
    return flat


def _table(value: Any, where: Where) -> dict[str, Column]:
    found = _columns(value, where)
    _check_crossings(found, ("sweep", "table"), where)
    return found


def _check_crossings(names: Iterable[str | None], path: KeyPath, where: Where) -> None:
    """Refuse a metric that begins like `when pass@1>=0.5/pass@64` and goes on in another form."""
    for name in names:
        if name is not None and is_crossing(name):
            try:
                value_when(name, ())
            except RecipeError as error:
                raise RecipeError(f"{where(path)}: {error}") from None


def _columns(value: Any, where: Where) -> dict[str, Column]:
    path = ("sweep", "table")
    if isinstance(value, list):
        return {str(name): Column() for name in value}
    columns = {}
    for metric, entry in _mapping(value or {}, path, where).items():
        column = _build(Column, entry or {}, (*path, metric), where)
        if column.format is not None and not re.fullmatch(r"each|\.\d+[efg]", column.format):
            raise RecipeError(
                f"{where((*path, metric, 'format'))}: `format` must be like .3f, .1e or .3g, or `each`, "
                f"got {shown(column.format)}"
            )
        columns[str(metric)] = column
    return columns


def _plots(value: Any, where: Where) -> dict[str, tuple[Panel, ...]]:
    path = ("sweep", "plots")
    plots = {}
    for file, entry in _mapping(value or {}, path, where).items():
        if not re.fullmatch(r"[\w.-]+\.(png|svg|pdf)", str(file)):
            raise RecipeError(f"{where((*path, file))}: a plot is a file name such as curve.png, got {shown(file)}")
        panels = entry if isinstance(entry, list) else [entry]
        plots[file] = tuple(_build(Panel, panel, (*path, file), where) for panel in panels)
        for panel in plots[file]:
            _check_crossings((panel.x, panel.y, panel.value), (*path, file), where)
            if panel.kind == "curve" and not (panel.k and "{k}" in panel.y):
                raise RecipeError(f"{where((*path, file))}: a curve needs `k`, and {{k}} in `y`, such as pass@{{k}}")
            if panel.kind != "curve" and panel.x is None:
                raise RecipeError(f"{where((*path, file))}: a plot of kind {panel.kind} needs `x`")
    return plots


def _metrics(value: Any, where: Where) -> dict[str, str] | None:
    if value is None:
        return None
    path = ("sweep", "metrics")
    value = _mapping(value, path, where)
    unknown = [key for key in value if key not in ("reward", "divergence")]
    if unknown:
        raise RecipeError(
            f"{where(path)}: unknown key {unknown[0]!r} in `sweep.metrics`; there are: reward, divergence"
        )
    return value


def _minutes(value: Any, where: Where) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise RecipeError(
            f"{where(('sweep', 'minutes'))}: `sweep.minutes` must be a number from 0, got {shown(value)}"
        )
    return float(value)


def _check_screen(block: SweepBlock, where: Where) -> None:
    """Facts about `screen:` that need the other keys."""
    screen = block.screen
    if screen is None:
        return
    path: KeyPath = ("sweep", "screen")
    if not screen.values:
        raise RecipeError(f"{where((*path, 'values'))}: `sweep.screen.values` is empty; give the candidates")
    if any(isinstance(value, (list, dict)) for value in screen.values):
        raise RecipeError(f"{where((*path, 'values'))}: `sweep.screen.values` must be numbers or names")
    if screen.key in ("seed", "method", *block.axes):
        raise RecipeError(f"{where((*path, 'key'))}: {screen.key!r} is an axis of the sweep; screen another key")
    reported = {staged(name) for name in block.table}
    for key, metrics in (("metric", [screen.metric]), ("at_least", screen.at_least or {})):
        for metric in metrics:
            if is_crossing(metric):
                raise RecipeError(
                    f"{where((*path, key))}: {metric!r} is read from a log for table and plots, and no number of "
                    "result.json; choose by one of those, such as train/best_metric"
                )
            if staged(metric).startswith("after/") and staged(metric) in reported and not screen.split:
                raise RecipeError(
                    f"{where((*path, key))}: {metric!r} is reported in the table, so choosing by it chooses on the "
                    "test; give `split: validation`, or another metric"
                )
    for metric, least in (screen.at_least or {}).items():
        number = isinstance(least, (int, float)) and not isinstance(least, bool)
        if not number or not 0 < least < math.inf:
            raise RecipeError(
                f"{where((*path, 'at_least'))}: `sweep.screen.at_least` of {metric} must be a number above 0, "
                f"got {shown(least)}"
            )


# Numbers of a run that belong to neither stage.
PLAIN = ("train_seconds", "wall_seconds", "steps", "peak_mib", "cpu_seconds")
_STAGES = ("before/", "after/", "train/", "late/", "when ")


def staged(metric: str) -> str:
    """The name of a metric in `result.json`: `pass@1` is `after/pass@1`, also where it has a slash."""
    return metric if metric.startswith(_STAGES) or metric in PLAIN else f"after/{metric}"


def _check_heatmaps(block: SweepBlock, where: Where) -> None:
    """A heat map has one number for each pair of values of its two axes."""
    axes = [*(["method"] if block.arms else []), *(name for name in block.axes if name != "seed")]
    for file, panel in ((file, panel) for file, panels in block.plots.items() for panel in panels):
        if panel.kind != "heatmap":
            continue
        place = where(("sweep", "plots", file))
        if panel.value is None:
            raise RecipeError(f"{place}: a heatmap needs `value`, the metric of a cell")
        missing = [name for name in (panel.x, panel.y) if name not in axes]
        if missing or panel.x == panel.y:
            wrong = missing[0] if missing else panel.x
            raise RecipeError(
                f"{place}: `x` and `y` of a heatmap must be two axes of the sweep ({', '.join(axes)}), "
                f"got {shown(wrong)}"
            )
        others = [name for name in axes if name not in (panel.x, panel.y)]
        if others:
            raise RecipeError(f"{place}: a heatmap of {panel.x} and {panel.y} has no place for the axis {others[0]!r}")


def _mapping(value: Any, path: KeyPath, where: Where) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise RecipeError(f"{where(path)}: `{'.'.join(path)}` must be a mapping, got {shown(value)}")
    return value


def _build(kind: type[_T], value: Any, path: KeyPath, where: Where) -> _T:
    """A dataclass from a mapping, key by key."""
    section = section_of(kind, ".".join(path))
    given = {}
    for name, entry in _mapping(value, path, where).items():
        here = (*path, str(name))
        if name not in section.keys:
            near = nearest_key(str(name), section, lambda: iter(()))
            known = f"did you mean {near.rpartition('.')[2]!r}?" if near else f"there are: {', '.join(section.keys)}"
            raise RecipeError(f"{where(here)}: unknown key {name!r} in `{'.'.join(path)}`; {known}")
        given[name] = coerce(entry, section.keys[name], where(here))
    missing = [f.name for f in dataclasses.fields(kind) if section.keys[f.name].required and f.name not in given]
    if missing:
        raise RecipeError(f"{where(path)}: `{'.'.join((*path, missing[0]))}` is missing")
    return kind(**given)
