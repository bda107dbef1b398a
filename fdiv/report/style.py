"""The look of every plot: a palette that colour-blind readers can tell apart, light axes, sizes in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["AXIS", "COLOURS", "GREY", "GRID", "START", "TITLE", "Panel", "Plot", "figure_grid", "tidy"]

# Okabe and Ito's palette, without the yellow that is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C564B", "#7F7F7F")
GREY = "#6b7280"
AXIS = "#9ca3af"
GRID = "#e5e7eb"
START = "#9ca3b0"
"""Bars of what was measured before training."""
TITLE = {"fontsize": 9, "loc": "left", "fontweight": "bold"}
"""The keywords of a panel's title."""


@dataclass
class Panel:
    """One pair of axes.

    Args:
        title: What it shows.
        draw: Draws it, title included.
        hover: What the title means, in a line.
    """

    title: str
    draw: Callable[[Axes], None]
    hover: str = ""


@dataclass
class Plot:
    """Panels that belong together: one figure as a file, one by one on a page that wraps them.

    Args:
        panels: In order; at least one.
        columns: Panels side by side in the figure.
        width: Of a panel, in inches.
        height: Of a panel, in inches.
        legend: Label → colour of what stands in several panels.
        note: A line below the figure.
    """

    panels: list[Panel]
    columns: int = 3
    width: float = 4.0
    height: float = 2.7
    legend: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def figure(self) -> Figure:
        """All panels."""
        from matplotlib.lines import Line2D

        figure, axes = figure_grid(len(self.panels), self.columns, self.width, self.height)
        for panel, axis in zip(self.panels, axes, strict=True):
            panel.draw(axis)
        if self.legend:
            handles = [Line2D([], [], color=colour) for colour in self.legend.values()]
            figure.legend(handles, self.legend, loc="outside upper left", ncols=4, fontsize=8, frameon=False)
        if self.note:
            figure.supxlabel(self.note, fontsize=8, color=GREY)
        return figure

    def single(self) -> Iterator[tuple[Panel, Figure]]:
        """Each panel as a figure of its own, without its title, which the page shows; smaller, so that its text is
        as large as that of the page."""
        for panel in self.panels:
            figure, (axis,) = figure_grid(1, 1, 0.78 * self.width, 0.82 * self.height)
            panel.draw(axis)
            axis.set_title("", **TITLE)
            yield panel, figure


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
    axis.grid(True, color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(AXIS)
    if legend:
        axis.legend(fontsize=6.5, frameon=False)
