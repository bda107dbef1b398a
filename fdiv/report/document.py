"""Self-contained HTML: styles and images inline, no scripts; readable on paper too."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fdiv.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Page"]

_STYLE = """
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: #1f2937; background: #fff;
       max-width: 1100px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem;
     border-bottom: 1px solid #e5e7eb; padding-bottom: .2rem; } h3 { font-size: 1rem; margin-top: 1.4rem; }
p.sub { color: #6b7280; margin-top: 0; } img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .88rem; margin: .6rem 0; display: block; overflow-x: auto; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid #e5e7eb; text-align: right;
         font-variant-numeric: tabular-nums; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } [title] { cursor: help; }
thead th { border-bottom: 2px solid #9ca3af; }
code, pre { font: 12.5px/1.45 ui-monospace, Menlo, Consolas, monospace; }
pre { background: #f6f7f9; padding: .8rem; overflow-x: auto; border-radius: 4px; }
summary { cursor: pointer; color: #374151; } .note { color: #92400e; font-size: .88rem; }
.failed { color: #b91c1c; } p, li, summary { overflow-wrap: anywhere; }
"""


class Page:
    """The parts of a page in order.

    Args:
        output: the HTML file; the plots are also written as PNG files into `plots/` beside it.
    """

    def __init__(self, output: Path):
        self.output = output
        self.parts: list[str] = []
        self.plots = output.parent / "plots"

    def add(self, text: str) -> None:
        """A part, as HTML."""
        self.parts.append(text)

    def plot(self, figure: Figure | None, name: str, description: str) -> None:
        """The figure inline, and as a file."""
        if figure is None:
            return
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        self.plots.mkdir(parents=True, exist_ok=True)
        (self.plots / f"{name}.png").write_bytes(buffer.getvalue())
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        self.add(f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], hovers: Mapping[str, str]) -> None:
        """A table; the first column is text. A heading or a first cell in `hovers` shows that text on hover."""

        def cell(kind: str, text: str) -> str:
            title = f' title="{html.escape(hovers[text])}"' if hovers.get(text) else ""
            return f"<{kind}{title}>{html.escape(text)}</{kind}>"

        head = "".join(cell("th", text) for text in header)
        body = ""
        for first, *others in rows:
            body += f"<tr>{cell('td', first)}{''.join(f'<td>{html.escape(text)}</td>' for text in others)}</tr>\n"
        self.add(f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>")

    def notes(self, notes: Iterable[tuple[str, str]]) -> None:
        """Why values are missing: (metric, reason)."""
        for name, reason in notes:
            self.add(f'<p class="note">{html.escape(name)}: {html.escape(reason)}</p>')

    def details(self, summary: str, text: str) -> None:
        """Text folded away."""
        if text:
            self.add(f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>")

    def write(self, title: str, style: str = "") -> Path:
        """The file, under a heading; `style` goes behind the page's own."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        head = f'<meta charset="utf-8"><title>{html.escape(title)}</title>'
        view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
        parts = "\n".join(self.parts)
        write_text(
            self.output,
            f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}{view}<style>{_STYLE}{style}</style></head>\n<body>\n'
            f"<h1>{html.escape(title)}</h1>\n{parts}\n</body>\n</html>\n",
        )
        return self.output
