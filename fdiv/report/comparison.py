"""Plots that compare: the frontier of a sweep (reward against divergence, or the two metrics it names), and summary
metrics before and after training."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fdiv.report.metrics import hover, marked
from fdiv.report.records import RunRecord
from fdiv.report.style import AXIS, COLOURS, GREY, START, Panel, Plot, tidy
from fdiv.report.table import method_of
from fdiv.terminal import divergence_label, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["before_after_run", "before_after_sweep", "frontier", "frontier_plot"]


def frontier(results: Mapping[str, Any]) -> Figure | None:
    """Reward against divergence: one point per setting, mean ± s.e. over seeds, single seeds faint, the start hollow.

    Points of one divergence (a sweep over β as well) are joined. None when the sweep names no axes, or a metric was
    not measured.
    """
    plot = frontier_plot(results)
    return None if plot is None else plot.figure()


def frontier_plot(results: Mapping[str, Any], width: float = 7.0, height: float = 4.4) -> Plot | None:
    """`frontier` as one panel of a size in inches."""
    axes = results.get("axes") or {}
    if set(axes) != {"reward", "divergence"}:
        return None
    x_name, y_name = _stage(axes["divergence"]), _stage(axes["reward"])
    groups = [group for group in results["aggregate"] if _point(group, x_name, y_name)]
    if not groups:
        return None
    method = method_of(results)
    meaning = "; ".join(f"{name}: {hover(name, method)}" for name in (axes["reward"], axes["divergence"]))
    draw = partial(_draw_frontier, results=results, groups=groups, x_name=x_name, y_name=y_name)
    return Plot([Panel(f"{axes['reward']} against {axes['divergence']}", draw, meaning)], 1, width, height)


def _draw_frontier(
    axis: Axes, results: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], x_name: str, y_name: str
) -> None:
    axes, method = results["axes"], method_of(results)
    families = list(dict.fromkeys(_family(group) for group in groups))
    for index, family in enumerate(families):
        colour = COLOURS[index % len(COLOURS)]
        members = sorted((g for g in groups if _family(g) == family), key=lambda g: g["metrics"][x_name]["mean"])
        _draw_family(axis, members, x_name, y_name, colour)
    _draw_seeds(axis, results, x_name, y_name, families)
    _draw_start(axis, results, axes)
    tidy(
        axis,
        f"{axes['reward']} against {axes['divergence']}",
        *(marked(axes[name], method) for name in ("divergence", "reward")),
    )
    axis.margins(0.12)
    axis.legend(fontsize=8, frameon=False, loc="best")


def _stage(metric: str) -> str:
    return metric if metric.startswith(("before/", "after/", "train/")) else f"after/{metric}"


def _point(group: Mapping[str, Any], *names: str) -> bool:
    return all(group["metrics"].get(name, {}).get("mean") is not None for name in names)


def _family(group: Mapping[str, Any]) -> str:
    spec = group["settings"].get("divergence")
    return divergence_label(spec) if spec is not None else "all settings"


def _draw_family(axis: Axes, members: Sequence[Mapping[str, Any]], x_name: str, y_name: str, colour: str) -> None:
    x, y = ([g["metrics"][name]["mean"] for g in members] for name in (x_name, y_name))
    x_error, y_error = ([g["metrics"][name]["se"] or 0.0 for g in members] for name in (x_name, y_name))
    axis.errorbar(
        x, y, xerr=x_error, yerr=y_error, color=colour, marker="o", markersize=6, capsize=3,
        linewidth=1.2, linestyle="-" if len(members) > 1 else "none", label=_family(members[0]), zorder=3,
    )  # fmt: skip
    if len(members) == 1:
        return  # the legend says which it is
    for member, x_value, y_value in zip(members, x, y, strict=True):
        others = [f"{key} {value}" for key, value in member["settings"].items() if key not in ("divergence", "seed")]
        text = ", ".join(others)
        axis.annotate(text, (x_value, y_value), (6, 5), textcoords="offset points", fontsize=7.5, color=colour)


def _draw_seeds(axis: Axes, results: Mapping[str, Any], x_name: str, y_name: str, families: Sequence[str]) -> None:
    for cell in results["cells"]:
        values = cell.get("values") or {}
        if values.get(x_name) is None or values.get(y_name) is None:
            continue
        colour = COLOURS[families.index(_family(cell)) % len(COLOURS)]
        axis.plot(values[x_name], values[y_name], ".", color=colour, alpha=0.35, markersize=5, zorder=2)


def _draw_start(axis: Axes, results: Mapping[str, Any], axes: Mapping[str, str]) -> None:
    """The mean of the untrained model, where both metrics are defined there."""
    points = []
    for cell in results["cells"]:
        values = cell.get("values") or {}
        point = [values.get(f"before/{axes[name]}") for name in ("divergence", "reward")]
        if None not in point:
            points.append(point)
    if points:
        x, y = (statistics.fmean(column) for column in zip(*points, strict=True))
        axis.plot(x, y, "o", markerfacecolor="white", color=GREY, markersize=7, label="before training", zorder=3)


def before_after_run(run: RunRecord) -> Plot | None:
    """One small panel per summary metric, two bars each (the metrics have different units)."""
    names = [n for n in run.result.get("summary_metrics", ()) if run.result.get(f"after/{n}") is not None]
    method = run.result.get("method")
    made = [
        Panel(marked(name, method), partial(_draw_bars, run=run, name=name), hover(name, method)) for name in names
    ]
    return Plot(made, columns=4, width=2.6, height=2.3) if made else None


def before_after_sweep(results: Mapping[str, Any]) -> Plot | None:
    """One panel per summary metric: a bar per setting, mean ± s.e. over seeds; a mark across it is the start."""
    groups = [group for group in results["aggregate"] if group["n"]]
    names = [name for name in results.get("columns", ()) if any(_point(g, f"after/{name}") for g in groups)]
    method = method_of(results)
    made = []
    for name in names:
        draw = partial(_draw_settings, groups=groups, name=name, method=method)
        made.append(Panel(marked(name, method), draw, hover(name, method)))
    note = "bars: after training, mean ± s.e. over seeds; marks across: before training"
    height = max(1.6, 0.5 + 0.32 * len(groups))
    return Plot(made, columns=2, width=5.0, height=height, note=note) if made else None


def _draw_settings(axis: Axes, groups: Sequence[Mapping[str, Any]], name: str, method: str | None) -> None:
    shown = [group for group in groups if _point(group, f"after/{name}")]
    entries = [group["metrics"][f"after/{name}"] for group in shown]
    positions = list(range(len(shown)))[::-1]
    families = [group["label"] for group in groups]
    colours = [COLOURS[families.index(group["label"]) % len(COLOURS)] for group in shown]
    means = [entry["mean"] for entry in entries]
    errors = [entry["se"] or 0.0 for entry in entries]
    axis.barh(positions, means, xerr=errors, color=colours, ecolor=GREY, height=0.62, capsize=3)
    axis.set_yticks(positions, [group["label"] for group in shown])
    starts = [g["metrics"].get(f"before/{name}", {}).get("mean") for g in shown]
    for position, start in zip(positions, starts, strict=True):
        if start is not None:
            axis.plot([start, start], [position - 0.42, position + 0.42], color="black", linewidth=1.4)
    tidy(axis, marked(name, method))
    axis.grid(False, axis="y")


def _draw_bars(axis: Axes, run: RunRecord, name: str) -> None:
    """The value before and after, with the standard errors that were measured."""
    found = [
        (stage, run.result[f"{stage}/{name}"], run.result.get(f"{stage}/{name}_se") or 0.0)
        for stage in ("before", "after")
        if run.result.get(f"{stage}/{name}") is not None
    ]
    labels, values, errors = zip(*found, strict=True)
    colours = [START, COLOURS[0]][-len(values) :]
    some = any(errors)
    bars = axis.bar(labels, values, yerr=errors if some else None, color=colours, ecolor=GREY, width=0.6, capsize=3)
    axis.bar_label(bars, labels=[number(value) for value in values], fontsize=7.5, padding=2, color=GREY)
    axis.margins(y=0.18)
    axis.axhline(0, color=AXIS, linewidth=0.8)
    tidy(axis, marked(name, run.result.get("method")))
    axis.grid(False, axis="x")
