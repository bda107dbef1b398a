"""A figure as SVG inside a page: its colours are those of the page, light or dark, and its text that of the page."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

from fdiv.report.style import AXIS, COLOURS, GREY, GRID, START

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DARK", "LIGHT", "inline_svg"]

LIGHT = {
    "page": "#ffffff", "text": "#1f2937", "muted": GREY, "axis": AXIS, "grid": GRID, "start": START,
    **{f"c{index}": colour for index, colour in enumerate(COLOURS)},
}  # fmt: skip
"""Name of a CSS variable → its colour; a plot is made of these."""
DARK = {
    "page": "#12161d", "text": "#dfe4ea", "muted": "#9aa4b2", "axis": "#5b6675", "grid": "#2a313c", "start": "#6b7684",
    **{
        f"c{index}": colour
        for index, colour in enumerate(
            ("#4aa3df", "#f08a4b", "#2fc39a", "#e29bc4", "#93d3f5", "#f1bb49", "#e5e7eb", "#c79a8f", "#a6a6a6")
        )
    },
}  # fmt: skip
"""The same for a dark page: colours that stand out there."""

_VARIABLES = {colour.lower(): name for name, colour in reversed(LIGHT.items()) if name != "text"}
# Matplotlib's own numbering would repeat from figure to figure; ids that are referred to are hashes.
_IDS = re.compile(r' id="[A-Za-z0-9.]+_\d+"')
_COMMENTS = re.compile(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*|<style.*?</style>\s*", re.DOTALL)
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}\b")


def inline_svg(figure: Figure, description: str, key: str = "") -> str:
    """The `<svg>` element of a figure, without anything that reaches outside of it.

    Args:
        figure: With the colours of `fdiv.report.style` only; others stay as they are on a dark page.
        description: For readers who cannot see it.
        key: Put before the names of lines (`sN-…`), which are to differ from plot to plot of a page.
    """
    from html import escape

    import matplotlib

    buffer = io.StringIO()
    # Text stays text, and the hashes of clip paths do not change from page to page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fdiv"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = _COMMENTS.sub("", text[text.index("<svg") :])
    text = _IDS.sub("", text)
    text = _COLOUR.sub(lambda match: _variable(match.group()), text)
    text = re.sub(r' id="s(?=\d+-)', f' id="{key}s', text)
    head, _, rest = text.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    return f'<svg {box.group() if box else ""} role="img" aria-label="{escape(description)}">{rest.strip()}'


def _variable(colour: str) -> str:
    name = _VARIABLES.get(colour.lower())
    return f"var(--{name})" if name else colour
