"""The look of every plot: a palette that colour-blind readers can tell apart, light axes, sizes in one place."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "GREY", "TITLE", "figure_grid", "tidy"]

# Okabe and Ito's palette, without the yellow that is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C564B", "#7F7F7F")
GREY = "#6b7280"
TITLE = {"fontsize": 9, "loc": "left", "fontweight": "bold"}
"""The keywords of a panel's title."""


def figure_grid(count: int, columns: int, width: float = 4.0, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes in rows of at most `columns`; without pyplot, so nothing stays open."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=110)
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(count)]
    return figure, axes


def tidy(axis: Axes, title: str, x_label: str = "", y_label: str = "", legend: bool = False) -> None:
    """Title, labels, a light grid, two spines."""
    axis.set_title(title, **TITLE)
    axis.set_xlabel(x_label, fontsize=8, color=GREY)
    axis.set_ylabel(y_label, fontsize=8, color=GREY)
    axis.tick_params(labelsize=7.5, colors=GREY)
    axis.grid(True, color="#e5e7eb", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#9ca3af")
    if legend:
        axis.legend(fontsize=6.5, frameon=False)
