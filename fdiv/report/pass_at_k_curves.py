"""The Pass@k curve of runs whose evaluation measured it: before training, and after it for each setting."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fdiv.report.metrics import hover, marked
from fdiv.report.records import RunRecord
from fdiv.report.style import COLOURS, GREY, Panel, Plot, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["pass_at_k_curves", "pass_at_k_plot", "pass_at_k_points"]

_NAME = re.compile(r"(?P<label>.*/)?pass@(?P<k>\d+)")


def pass_at_k_points(result: Mapping[str, Any], stage: str) -> dict[str, dict[int, tuple[float, float]]]:
    """Label of the evaluation → k → (value, standard error) of `STAGE/…pass@K` in a run's result; in order of k."""
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for key, value in result.items():
        match = _NAME.fullmatch(key.removeprefix(f"{stage}/")) if key.startswith(f"{stage}/") else None
        if match and value is not None:
            error = result.get(f"{key}_se") or 0.0
            found.setdefault((match["label"] or "").rstrip("/"), {})[int(match["k"])] = (value, error)
    return {label: dict(sorted(points.items())) for label, points in found.items()}


def pass_at_k_curves(runs: Sequence[RunRecord]) -> Figure | None:
    """All panels of `pass_at_k_plot` as one figure."""
    plot = pass_at_k_plot(runs)
    return None if plot is None else plot.figure()


def pass_at_k_plot(runs: Sequence[RunRecord]) -> Plot | None:
    """One panel per evaluation: pass@k over k; None without two k. Dashed: before training (the first run). A line per
    setting: after it, mean over its seeds; the band of a single run is ± one standard error over problems."""
    finished = [run for run in runs if run.finished]
    start = pass_at_k_points(finished[0].result, "before") if finished else {}
    start = {label: points for label, points in start.items() if len(points) > 1}
    made = [
        Panel(label or "Pass@k", partial(_draw, runs=finished, label=label, before=before), hover("pass@1"))
        for label, before in start.items()
    ]
    return Plot(made, columns=2, width=5.0, height=3.6) if made else None


def _draw(axis: Axes, runs: Sequence[RunRecord], label: str, before: Mapping[int, tuple[float, float]]) -> None:
    axis.plot(list(before), [v for v, _ in before.values()], "--", color=GREY, label="before training")
    for index, setting in enumerate(dict.fromkeys(run.setting for run in runs)):
        members = [pass_at_k_points(run.result, "after").get(label, {}) for run in runs if run.setting == setting]
        ks = [k for k in before if all(k in points for points in members)]
        mean = [statistics.fmean(points[k][0] for points in members) for k in ks]
        colour = COLOURS[index % len(COLOURS)]
        axis.plot(ks, mean, marker="o", markersize=3, color=colour, label=setting or "after training")
        if len(members) == 1:
            bounds = [[m + sign * members[0][k][1] for m, k in zip(mean, ks, strict=True)] for sign in (-1, 1)]
            axis.fill_between(ks, *bounds, color=colour, alpha=0.15, linewidth=0)
    axis.set_xscale("log", base=2)
    tidy(axis, label or "Pass@k", "k", marked("pass@1", title="pass@k"), legend=True)
