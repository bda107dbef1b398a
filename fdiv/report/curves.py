"""Training curves: log entries into panels, by the prefix of their names, for whatever a method logs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from fdiv.report.metrics import hover, marked, meanings, plain_name
from fdiv.report.records import RunRecord
from fdiv.report.style import COLOURS, Panel, Plot, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Curve", "constant_curves", "curve_plot", "panels", "training_curves"]

_SKIPPED = ("step", "epoch", "num_tokens", "num_input_tokens_seen", "total_flos", "learning_rate")
_SKIPPED_PARTS = ("runtime", "per_second", "train_loss")
# Shares and accuracies live in [0, 1]: beside margins or log-probabilities they would be a flat line.
_OWN_PANEL = ("accuracies", "accuracy", "fraction", "margins")
_FIRST = ("loss", "rewards/margins", "rewards/accuracies", "divergence", "log_ratio", "clamped_fraction", "entropy")


@dataclass
class Curve:
    """One line: values by step, with an optional band (standard error, or 5–95 % quantiles)."""

    label: str
    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    evaluation: bool = False
    metric: str = ""


def panels(runs: Sequence[RunRecord]) -> dict[str, list[Curve]]:
    """Panel title → curves. One setting: a line per metric; several: a line per setting, mean over its seeds."""
    settings = list(dict.fromkeys(run.setting for run in runs))
    found = _metric_names(runs)
    titles: dict[str, list[Curve]] = {}
    for name in found:
        title, label = _place(name)
        for setting in settings:
            members = [run for run in runs if run.setting == setting]
            curve = _curve(members, name)
            if curve is None:
                continue
            curve.evaluation, curve.metric = name.startswith("eval_"), name
            if len(settings) == 1:
                curve.label = label
            else:
                # One panel per metric; the divergence's own name differs from setting to setting.
                curve.label = setting + (" (eval)" if curve.evaluation else "")
                title = title if title == "divergence" else name.removeprefix("eval_").removesuffix("_p50")
            titles.setdefault(title, []).append(curve)
    order = sorted(titles, key=lambda title: (_rank(title), title))
    return {title: titles[title] for title in order}


def _rank(title: str) -> int:
    return next((index for index, start in enumerate(_FIRST) if title.startswith(start)), len(_FIRST))


def _metric_names(runs: Sequence[RunRecord]) -> list[str]:
    """Every plotted metric; `x_se`, `x_p05` and `x_p95` are bands of `x` and `x_p50`."""
    names = dict.fromkeys(name for run in runs for entry in run.history for name in entry)
    kept = []
    for name in names:
        plain = name.removeprefix("eval_")
        if plain in _SKIPPED or any(part in plain for part in _SKIPPED_PARTS):
            continue
        if name.endswith("_se") and name.removesuffix("_se") in names:
            continue
        if name.endswith(("_p05", "_p95")) and name[:-4] + "_p50" in names:
            continue
        kept.append(name)
    return kept


def _place(name: str) -> tuple[str, str]:
    """Panel and label of a metric: `log_ratio/chosen_p50` → (`log_ratio`, `chosen`)."""
    evaluation = name.startswith("eval_")
    plain = name.removeprefix("eval_").removesuffix("_p50")
    prefix, slash, rest = plain.partition("/")
    title = plain if not slash or rest.endswith(_OWN_PANEL) else prefix
    return title, (rest or plain) + (" (eval)" if evaluation else "")


def _curve(runs: Sequence[RunRecord], name: str) -> Curve | None:
    """The mean over runs at every step that all logged; the band is that of one run, or ± s.e. over several."""
    series = [_series(run, name) for run in runs]
    series = [values for values in series if values]
    if not series:
        return None
    steps = sorted(set.intersection(*(set(values) for values in series)))
    curve = Curve(label=name, steps=[float(step) for step in steps])
    curve.values = [statistics.fmean(values[step] for values in series) for step in steps]
    if len(series) > 1:
        errors = [statistics.stdev([values[step] for values in series]) / math.sqrt(len(series)) for step in steps]
        curve.low = [value - error for value, error in zip(curve.values, errors, strict=True)]
        curve.high = [value + error for value, error in zip(curve.values, errors, strict=True)]
    elif name.endswith("_p50"):
        low, high = (_series(runs[0], name[:-4] + suffix) for suffix in ("_p05", "_p95"))
        if all(step in low and step in high for step in steps):
            curve.low, curve.high = [low[step] for step in steps], [high[step] for step in steps]
    else:
        error = _series(runs[0], f"{name}_se")
        if error and all(step in error for step in steps):
            curve.low = [v - error[step] for v, step in zip(curve.values, steps, strict=True)]
            curve.high = [v + error[step] for v, step in zip(curve.values, steps, strict=True)]
    return curve


def _series(run: RunRecord, name: str) -> dict[float, float]:
    return {
        entry["step"]: float(entry[name])
        for entry in run.history
        if name in entry and "step" in entry and isinstance(entry[name], (int, float)) and math.isfinite(entry[name])
    }


def constant_curves(found: Mapping[str, Sequence[Curve]]) -> tuple[dict[str, list[Curve]], dict[str, list[Curve]]]:
    """(panels that show something, what is left out of them): curves of one value only.

    A curve stays that is compared with a moving one of the same metric (settings side by side), or was logged once
    beside one that moves.
    """
    moving: dict[str, list[Curve]] = {}
    constant: dict[str, list[Curve]] = {}
    for title, curves in found.items():
        names = {curve.metric for curve in curves if _moves(curve)}
        kept = [curve for curve in curves if curve.metric in names or (names and len(curve.steps) == 1)]
        left = [curve for curve in curves if curve not in kept]
        if kept:
            moving[title] = kept
        if left:
            constant[title] = left
    return moving, constant


def _moves(curve: Curve) -> bool:
    """Whether two of its values, or of the bounds of its band, differ by more than rounding."""
    lines = [line for line in (curve.values, curve.low, curve.high) if line]
    return any(max(line) - min(line) > 1e-9 * max(map(abs, line)) for line in lines)


def training_curves(runs: Sequence[RunRecord]) -> Figure | None:
    """All panels as one figure; None when nothing was logged that moves."""
    plot = curve_plot(runs)
    return None if plot is None else plot.figure()


def curve_plot(runs: Sequence[RunRecord]) -> Plot | None:
    """A panel for every metric, or group of metrics, that moves; None when nothing does."""
    found, _ = constant_curves(panels(runs))
    if not found:
        return None
    colours = _colours(found)
    methods = {run.result.get("method") for run in runs}
    method = methods.pop() if len(methods) == 1 else None
    logged = {plain_name(name).removesuffix("_p50") for run in runs for entry in run.history for name in entry}
    made = []
    for place, (title, curves) in enumerate(found.items()):
        single = title in logged  # one metric, and no group of them
        shown = marked(title, method) if single else title
        if title == "divergence" and len({_base(curve) for curve in curves}) == 1:
            shown = f"{title}/{curves[0].label}"
        lines = [hover(title, method)] if single else meanings((curve.metric for curve in curves), method)
        draw = partial(_draw, place=place, title=shown, curves=curves, colours=colours)
        made.append(Panel(shown, draw, "; ".join(lines)))
    return Plot(made, columns=3, legend=colours)


def _colours(found: Mapping[str, Sequence[Curve]]) -> dict[str, str]:
    """The labels that stand in several panels, each of one colour in all."""
    labels = dict.fromkeys(_base(curve) for curves in found.values() for curve in curves)
    several = [curves for curves in found.values() if len({_base(curve) for curve in curves}) > 1]
    shared = [label for label in labels if sum(any(_base(c) == label for c in curves) for curves in several) > 1]
    return {label: COLOURS[index % len(COLOURS)] for index, label in enumerate(shared)}


def _base(curve: Curve) -> str:
    return curve.label.removesuffix(" (eval)")


def _draw(axis: Axes, place: int, title: str, curves: Sequence[Curve], colours: Mapping[str, str]) -> None:
    spare = [colour for colour in COLOURS if colour not in colours.values()] or list(COLOURS)
    own: dict[str, str] = {}
    alone = len({_base(curve) for curve in curves}) == 1 and _base(curves[0]) not in colours
    for number, curve in enumerate(curves):
        base = _base(curve)
        colour = COLOURS[0] if alone else colours.get(base) or own.setdefault(base, spare[len(own) % len(spare)])
        style = {"linestyle": "--", "marker": "o", "markersize": 3} if curve.evaluation else {}
        if len(curve.steps) == 1 and not style:
            style = {"marker": "o", "markersize": 3}
        # The page hides what its legend switches off by the beginning of these names.
        gid = f"s{list(colours).index(base)}-{place}-{number}" if base in colours else None
        label = curve.label if gid is None else f"_{curve.label}"  # the shared legend has it
        axis.plot(curve.steps, curve.values, color=colour, label=label, linewidth=1.4, gid=gid, **style)
        if curve.low:
            band = gid and f"{gid}-band"
            axis.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0, gid=band)
    if title.endswith("fraction"):
        axis.set_ylim(0, max(0.05, 1.1 * max(max(curve.values) for curve in curves)))
    others = any(_base(curve) not in colours for curve in curves)
    tidy(axis, title, "optimizer step", legend=len(curves) > 1 and others)
