"""What a page is put together from: sections, plots, words, answers, and how to get the same numbers again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from fdiv.report import sheet
from fdiv.report.curves import constant_curves, curve_plot, panels
from fdiv.report.drawing import inline_svg
from fdiv.report.examples import read_examples
from fdiv.report.metrics import hover, marked
from fdiv.report.records import RunRecord
from fdiv.report.style import Plot
from fdiv.report.words import Summary
from fdiv.terminal import number

__all__ = ["Canvas"]

_SHOWN = 8  # changes of one setting in words; the others are folded away
_INTERVALS = (
    "Intervals of 95 %: over seeds by Student's t of the differences; of a single run from the standard errors over "
    "rows, before and after as if independent, which is too wide where the rows are the same."
)


class Canvas:
    """The parts of the page in order, its sections, and the folder of its plots."""

    def __init__(self, output: Path):
        self.parts: list[str] = []
        self.sections: dict[str, str] = {}
        self.plots = output.parent / "plots"
        self.key = ""

    def add(self, *parts: str) -> None:
        """Put HTML at the end; empty parts are left out."""
        self.parts += filter(None, parts)

    def section(self, name: str) -> None:
        """Begin a section, which the head of the page links to."""
        anchor = f"part-{len(self.sections)}"
        self.sections[anchor] = name
        self.add(f'<h2 id="{anchor}">{escape(name)}</h2>')

    def plot(self, plot: Plot | None, name: str, description: str, page: Plot | None = None) -> None:
        """The panels inline, in as many columns as there is room for, and all of them as one file.

        Args:
            plot: None: nothing to show.
            name: Of the file.
            description: For readers who cannot see it.
            page: The same for the page, where it has another size there.
        """
        if plot is None:
            return
        self.plots.mkdir(parents=True, exist_ok=True)
        plot.figure().savefig(self.plots / f"{name}.png")
        figures = ""
        for panel, figure in (page or plot).single():
            title = f' title="{escape(panel.hover)}"' if panel.hover else ""
            drawn = inline_svg(figure, f"{description}: {panel.title}", self.key)
            figures += f"<figure><figcaption{title}>{escape(panel.title)}</figcaption>{drawn}</figure>"
        kind = "plots" if len(plot.panels) > 1 else "plots one"
        self.add(f'<div class="{kind}" style="--width: {62 * (page or plot).width:.0f}px">{figures}</div>')
        if plot.note:
            self.add(sheet.paragraph(plot.note, "sub"))

    def notes(self, notes: Iterable[tuple[str, str]]) -> None:
        """Why values are missing: (metric, reason)."""
        self.add(*(sheet.paragraph(f"{name}: {reason}", "note") for name, reason in notes))

    def lines(self, lines: Sequence[tuple[str, str]]) -> None:
        """(text, kind) of each; those after the first eight folded away."""
        self.add(sheet.bullets(lines[:_SHOWN]))
        self.add(sheet.details(f"{len(lines) - _SHOWN} more", sheet.bullets(lines[_SHOWN:])))

    def words(self, summaries: Sequence[Summary], comparison: Sequence[str]) -> None:
        """What changed beyond its error, setting by setting, and which setting is best."""
        if not any(summary.changes for summary in summaries) and not comparison:
            return
        self.section("What changed beyond its error")
        self.lines([(line, "") for line in comparison])
        for summary in summaries:
            beyond = [(change.sentence(), change.direction or "") for change in summary.of("beyond")]
            if len(summaries) > 1:
                self.add(f"<h3>{escape(summary.heading)}</h3>")
            self.lines(beyond)
            within, unknown = ([change.name for change in summary.of(v)] for v in ("within", "unknown"))
            if within:
                self.add(sheet.paragraph(f"Within their error: {', '.join(within)}."))
            if unknown:
                text = f"{len(unknown)} metrics have no known error: the table has them"
                self.add(sheet.details(text, sheet.paragraph(", ".join(unknown))))
        tried = sum(len(s.of("beyond")) + len(s.of("within")) for s in summaries)
        if not tried and not comparison:
            return
        chance = f" Of {tried} comparisons about {round(tried / 20)} would seem changed by chance alone."
        self.add(sheet.paragraph(_INTERVALS + (chance if tried > 9 else ""), "sub"))

    def examples(self, runs: Sequence[RunRecord]) -> None:
        """The answers that the evaluations kept, side by side."""
        groups = read_examples(runs)
        if not groups:
            return
        self.section("Answers before and after")
        for group, found in groups.items():
            changed = sum(question.changed for question in found)
            self.add(f"<h3>{escape(group)}</h3>")
            self.add(sheet.paragraph(f"{len(found)} questions, evenly spaced; {changed} answers differ.", "sub"))
            self.add(sheet.questions(found[:4]))
            self.add(sheet.details(f"{len(found) - 4} more", sheet.questions(found[4:])))

    def curves(self, runs: Sequence[RunRecord], note: str, prefix: str = "") -> None:
        """Training curves under one legend; those that never move are a folded table."""
        plot, found = curve_plot(runs), panels(runs)
        if not found:
            return
        self.section("Training curves")
        dashed = any(curve.evaluation for curves in found.values() for curve in curves)
        note = f"{note} Dashed, with dots: on the evaluation rows.".strip() if dashed else note
        self.key = f"k{len(self.sections)}"
        self.add("<section>")  # the legend stays in sight as far as its plots go
        self.add(sheet.legend(plot.legend if plot else {}, self.key), sheet.paragraph(note, "sub") if note else "")
        self.plot(plot, f"{prefix}curves", "Training curves")
        self.add("</section>")
        constant = [curve for curves in constant_curves(found)[1].values() for curve in curves]
        several = len({run.setting for run in runs}) > 1
        rows = [
            (marked(curve.metric), *([curve.label] if several else []), number(curve.values[0]), str(len(curve.steps)))
            for curve in constant
        ]
        header = ("metric", *(["setting"] if several else []), "value", "logged")
        hovers = {marked(curve.metric): hover(curve.metric) for curve in constant}
        self.add(sheet.details(f"{len(rows)} curves never change", sheet.table(header, rows, hovers) if rows else ""))

    def provenance(self, command: str, versions: str, recipe: str, name: str = "") -> None:
        """How to get the same numbers again."""
        self.section(f"Reproduce{' ' + name if name else ''}")
        self.add(f"<pre>{escape(command)}</pre>", sheet.paragraph(versions))
        heading = "resolved recipe" if not name else f"resolved recipe of {name}"
        self.add(sheet.details(heading, f"<pre>{escape(recipe)}</pre>" if recipe else ""))
