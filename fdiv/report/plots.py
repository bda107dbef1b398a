"""The plots that a `sweep:` block declares: points, means, paths from log to log, curves over k, heat maps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdiv.recipe.sweep import Panel, staged
from fdiv.report.metrics import marked
from fdiv.report.style import COLOURS, GREY, tidy
from fdiv.report.table import cell_label, measured, method_of, short, values_of
from fdiv.terminal import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["write_plots"]

_MARKERS = "osD^v<>Ph*X"  # eleven, beside nine colours: together they repeat after 99 rows
_LEGEND_ROWS = 20  # as many fit beside a panel


def write_plots(results: Mapping[str, Any], plots: Mapping[str, Sequence[Panel]], folder: Path) -> list[Path]:
    """Draw every plot that has something to show.

    Args:
        results: The content of `results.json`.
        plots: File name → its panels.
        folder: Where the files go.
    """
    written = []
    for name, panels in plots.items():
        figure = _figure(results, panels)
        if figure is not None:
            figure.savefig(folder / name, dpi=130)
            written.append(folder / name)
    return written


def _figure(results: Mapping[str, Any], panels: Sequence[Panel]) -> Figure | None:
    """All panels side by side, one legend; a path has a panel for every screened value."""
    from matplotlib.figure import Figure

    split = [(panel, value) for panel in panels for value in (_screened(results) if panel.kind == "path" else [None])]
    figure = Figure(figsize=(1.6 + 4.2 * len(split), 4.4), layout="constrained")
    axes = figure.subplots(1, len(split), squeeze=False, sharex=_alike(panels), sharey=_alike(panels))[0]
    drawn = [_DRAW[panel.kind](axis, results, panel, value) for axis, (panel, value) in zip(axes, split, strict=True)]
    if not any(drawn):
        return None
    found = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes]
    handles = {label: handle for pairs in found for handle, label in pairs}
    columns = -(-len(handles) // _LEGEND_ROWS)
    figure.set_figwidth(figure.get_figwidth() + 1.6 * max(columns - 1, 0))
    figure.legend(
        handles.values(), handles, loc="outside right center", fontsize=7.5, frameon=False, ncols=max(columns, 1)
    )
    return figure


def _alike(panels: Sequence[Panel]) -> bool:
    """Whether all panels are parts of one path, which are read against each other."""
    return len(panels) == 1 and panels[0].kind == "path"


def _screened(results: Mapping[str, Any]) -> list[Any]:
    """The values that were screened, in their order; one empty value where nothing was."""
    key = (results.get("screen") or {}).get("key")
    values = {}
    for record in results["cells"]:
        if record["status"] == "finished" and record.get("series") and key in record["settings"]:
            values[str(record["settings"][key])] = record["settings"][key]
    found = list(values.values())
    if all(isinstance(value, (int, float)) for value in found):
        found.sort()
    return found or [None]


def _names(results: Mapping[str, Any], panel: Panel) -> list[str]:
    """The rows of a panel: measured models, then the rows of the table."""
    names = [*measured(results), *dict.fromkeys(_row(group["settings"]) for group in results["aggregate"])]
    return [name for name in names if panel.rows is None or name in panel.rows]


def _row(settings: Mapping[str, Any]) -> str:
    return str(settings["method"]) if "method" in settings else cell_label(settings)


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}


def _points(axis: Axes, results: Mapping[str, Any], panel: Panel, _: Any) -> bool:
    """A marker per row, a point per seed."""
    x_name, y_name = staged(panel.x or ""), staged(panel.y)
    models = measured(results)
    drawn = False
    for index, name in enumerate(_names(results, panel)):
        records = [models[name]] if name in models else [
            record["values"] for record in _finished(results) if _row(record["settings"]) == name
        ]  # fmt: skip
        points = [(values.get(x_name), values.get(y_name)) for values in records]
        points = [(x, y) for x, y in points if x is not None and y is not None]
        if points:
            x, y = zip(*points, strict=True)
            axis.scatter(x, _above(y, panel), label=name, alpha=0.8, s=34, **_style(index))
            drawn = True
    _finish(axis, results, panel)
    return drawn


def _above(values: Sequence[float], panel: Panel) -> list[float]:
    """A p-value of 0 has no logarithm: it stands at the edge."""
    return [max(value, 1e-60) if panel.y_scale in ("log", "log2") else value for value in values]


def _finished(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [r for r in results["cells"] if r.get("stage", "run") == "run" and r["status"] == "finished"]


def _means(axis: Axes, results: Mapping[str, Any], panel: Panel, _: Any) -> bool:
    """Mean ± s.e. over seeds, rows of one method joined along a key."""
    names = (staged(panel.x or ""), staged(panel.y))
    drawn = False
    for index, name in enumerate(_names(results, panel)):
        groups = [g for g in results["aggregate"] if _row(g["settings"]) == name and _has(g, names)]
        if panel.join:
            groups.sort(key=lambda group: group["settings"].get(panel.join))
        if groups:
            x, y = ([g["metrics"][metric]["mean"] for g in groups] for metric in names)
            x_error, y_error = ([g["metrics"][metric]["se"] or 0.0 for g in groups] for metric in names)
            line = "-" if panel.join else "none"
            axis.errorbar(
                x, y, xerr=x_error, yerr=y_error, linestyle=line, markersize=4, capsize=2, label=name, **_style(index)
            )
            drawn = True
    _finish(axis, results, panel)
    return drawn


def _has(group: Mapping[str, Any], names: Sequence[str]) -> bool:
    return all(group["metrics"].get(name, {}).get("mean") is not None for name in names)


def _path(axis: Axes, results: Mapping[str, Any], panel: Panel, value: Any) -> bool:
    """The way of each row from log to log, first seed, at one screened value."""
    key = (results.get("screen") or {}).get("key")
    drawn: set[str] = set()
    names = _names(results, panel)
    for record in results["cells"]:
        name, series = _row(record["settings"]), record.get("series") or {}
        x, y = series.get(panel.x), series.get(panel.y)
        if record["status"] != "finished" or not x or not y or name in drawn or name not in names:
            continue
        if value is None or record["settings"].get(key) == value:
            axis.plot(x, y, label=name, alpha=0.8, markersize=4, linewidth=1.2, **_style(names.index(name)))
            drawn.add(name)
    _finish(axis, results, panel)
    if value is not None:
        axis.set_title(f"{key} {short(value)}", fontsize=9, loc="left", fontweight="bold")
    return bool(drawn)


def _curve(axis: Axes, results: Mapping[str, Any], panel: Panel, _: Any) -> bool:
    """A metric over k: mean over seeds, a band of ± one standard error; less a row's own curve where asked."""
    ks = panel.k or []
    names = [staged(panel.y.format(k=k)) for k in ks]
    curves: dict[str, list[list[float]]] = {}
    for label, values in measured(results).items():
        curves[label] = [[values.get(name)] for name in names]
    for group in results["aggregate"]:
        curves[_row(group["settings"])] = [values_of(results, group, name) for name in names]
    curves = {name: v for name, v in curves.items() if all(row and None not in row for row in v)}
    base = [statistics.fmean(row) for row in curves[panel.less]] if panel.less in curves else [0.0] * len(ks)
    models = measured(results)
    shown = [name for name in _names(results, panel) if name in curves]
    for index, name in enumerate(shown):
        rows = [[value - zero for value in row] for row, zero in zip(curves[name], base, strict=True)]
        mean = [statistics.fmean(row) for row in rows]
        error = [statistics.stdev(row) / math.sqrt(len(row)) if len(row) > 1 else 0.0 for row in rows]
        style = {"color": "black", "linestyle": "--"} if name in models else {**_style(index), "markersize": 4}
        axis.plot(ks, mean, label=name, linewidth=1.3, **style)
        low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
        axis.fill_between(ks, low, high, color=style["color"], alpha=0.13, linewidth=0)
    _finish(axis, results, panel)
    return bool(shown)


def _heatmap(axis: Axes, results: Mapping[str, Any], panel: Panel, _: Any) -> bool:
    """Mean (± s.e.) of a metric for each pair of values of two axes; a cell that was not run is blank."""
    from matplotlib.colors import LogNorm

    metric = staged(panel.value or "")
    groups = [group for group in results["aggregate"] if panel.x in group["settings"]]
    if results.get("screen"):  # every value may have been run: the chosen one counts
        chosen = [choice["settings"] for choice in results.get("chosen", ())]
        groups = [group for group in groups if group["settings"] in chosen]
    keys = [list(dict.fromkeys(short(group["settings"][key]) for group in groups)) for key in (panel.x, panel.y)]
    cells = {tuple(short(g["settings"][key]) for key in (panel.x, panel.y)): g["metrics"].get(metric) for g in groups}
    known = {place: cell for place, cell in cells.items() if cell and cell["mean"] is not None}
    if not known:
        return False
    log = panel.value_scale == "log"
    means = [[known.get((x, y), {}).get("mean", math.nan) for x in keys[0]] for y in keys[1]]
    if log:
        means = [[max(value, 1e-60) for value in row] for row in means]
    image = axis.imshow(means, cmap="viridis", aspect="auto", norm=LogNorm() if log else None)
    for (x, y), cell in known.items():
        column, row = keys[0].index(x), keys[1].index(y)
        text = number(cell["mean"]) + ("" if cell["se"] is None else f"\n± {number(cell['se'])}")
        dark = image.norm(means[row][column]) < 0.55
        axis.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    tidy(axis, panel.title or _label(results, panel.value or ""), panel.x_label or panel.x, panel.y_label or panel.y)
    axis.grid(False)
    axis.set_xticks(range(len(keys[0])), keys[0], rotation=30, ha="right", fontsize=7)
    axis.set_yticks(range(len(keys[1])), keys[1], fontsize=7)
    axis.figure.colorbar(image, ax=axis, shrink=0.85).ax.tick_params(labelsize=7)
    return True


def _finish(axis: Axes, results: Mapping[str, Any], panel: Panel) -> None:
    """Scales, labels, the dashed level."""
    x_label = panel.x_label or ("k" if panel.kind == "curve" else _label(results, panel.x or ""))
    tidy(axis, panel.title or "", x_label, panel.y_label or _label(results, panel.y))
    for name, scale in (("x", panel.x_scale), ("y", panel.y_scale)):
        set_scale: Callable[..., None] = getattr(axis, f"set_{name}scale")
        if scale == "log2":
            set_scale("log", base=2)
        elif scale != "linear":
            set_scale(scale)
    level = panel.level
    if isinstance(level, str):
        level = measured(results).get(level, {}).get(staged(panel.y))
    if level is not None:
        axis.axhline(level, color=GREY, linewidth=0.8, linestyle="--")


def _label(results: Mapping[str, Any], metric: str) -> str:
    """`forget quality ↑`: the last part of a metric's name in words, and which way is better."""
    words = metric.rpartition("/")[2].removeprefix("eval_").replace("{k}", "k").replace("_", " ")
    return marked(metric.replace("{k}", "1"), method_of(results), words)


_DRAW: dict[str, Callable[[Axes, Mapping[str, Any], Panel, Any], bool]] = {
    "points": _points,
    "means": _means,
    "path": _path,
    "curve": _curve,
    "heatmap": _heatmap,
}
