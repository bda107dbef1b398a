"""The HTML page: self-contained (styles and images inline, no scripts), readable on paper too."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdiv.files import write_text
from fdiv.report.comparison import before_after_run, before_after_sweep, frontier
from fdiv.report.curves import training_curves
from fdiv.report.metrics import hover, marked
from fdiv.report.metrics.glossary import Better
from fdiv.report.pass_at_k_curves import pass_at_k_curves
from fdiv.report.records import RunRecord, SweepRecord, encoding_notes, read_records, read_results
from fdiv.rows.report import faults_of
from fdiv.terminal import divergence_label, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_frontier", "write_report"]

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
.failed { color: #b91c1c; }
"""


def write_report(directories: Sequence[Path], output: Path, title: str | None = None) -> Path:
    """Write `output` (one HTML file that needs nothing else) and its plots as PNG files in `plots/` beside it.

    Args:
        directories: Output directories of runs and sweeps.
        output: The HTML file.
        title: Heading; made from the recipes' names when None.

    Raises:
        FdivError: a directory that holds neither.
    """
    runs, sweeps = read_records([Path(directory) for directory in directories])
    page = _Page(output)
    names = [sweep.results["recipe"] for sweep in sweeps] + [run.result.get("recipe", run.name) for run in runs]
    title = title or ", ".join(dict.fromkeys(names))
    for index, sweep in enumerate(sweeps):
        page.sweep(sweep, f"sweep{index}_" if len(sweeps) > 1 else "")
    if runs:
        page.runs(runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(
        output,
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n<body>\n'
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(page.parts) + "\n</body>\n</html>\n",
    )
    return output


def write_frontier(root: Path) -> Path | None:
    """Write `frontier.png` of a sweep's directory; None when its results name no axes."""
    figure = frontier(read_results(root / "results.json"))
    if figure is None:
        return None
    figure.savefig(root / "frontier.png")
    return root / "frontier.png"


class _Page:
    """The parts of the page in order, and the folder of its plots."""

    def __init__(self, output: Path):
        self.parts: list[str] = []
        self.plots = output.parent / "plots"

    def add(self, text: str) -> None:
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

    def sweep(self, sweep: SweepRecord, prefix: str) -> None:
        """Everything about one sweep."""
        from fdiv.recipe.sweep import Column
        from fdiv.report.table import method_of, rows_table, table

        results = sweep.results
        method = method_of(results)
        seeds = ", ".join(map(str, results["seeds"])) or "the recipe's"
        self.add(f'<p class="sub">{len(results["cells"])} runs, seeds {html.escape(seeds)}</p>')
        self.add("<h2>Results</h2>")
        columns = {name: Column(**column) for name, column in results.get("table", {}).items()}
        if columns:
            keep_all = (results.get("screen") or {}).get("keep") == "all"
            found = rows_table(results, columns, results["screen"]["key"] if keep_all else None)
            titles = {name: (column.title, column.better) for name, column in columns.items()}
            self.table(*found, _hovers(columns, method, titles))
            self.add('<p class="sub">Mean ± standard error over seeds.</p>')
        else:
            found = table(results["aggregate"], results["columns"], wide=False, method=method)
            self.table(*found, _hovers(results["columns"], method))
            self.add('<p class="sub">before → after training, mean ± standard error over seeds.</p>')
        for cell in results["cells"]:
            if cell["status"] != "finished":
                reason = html.escape(cell.get("error", cell["status"]))
                self.add(f'<p class="failed">{html.escape(cell["name"])}: {reason}</p>')
        notes = [pair for cell in results["cells"] for pair in cell.get("values", {}).get("notes", {}).items()]
        self.notes(dict.fromkeys(notes))
        figure = frontier(results)
        if figure is not None:
            self.add("<h2>Frontier</h2>")
            self.plot(figure, f"{prefix}frontier", "The two axes of the sweep, one point per setting")
        self.add("<h2>Before and after</h2>")
        self.plot(before_after_sweep(results), f"{prefix}before_after", "Summary metrics by setting")
        self.plot(pass_at_k_curves(sweep.runs), f"{prefix}pass_at_k", "Pass@k before training and after it")
        if sweep.runs:
            self.add("<h2>Training curves</h2>")
            self.add('<p class="sub">Mean over seeds; bands are ± one standard error over seeds.</p>')
            self.plot(training_curves(sweep.runs), f"{prefix}curves", "Training curves by setting")
        self.provenance(results["command"], _versions(results), sweep.runs[0].recipe if sweep.runs else "")

    def runs(self, runs: Sequence[RunRecord]) -> None:
        """Everything about single runs: one table and one set of curves for all, the rest one by one."""
        for run in runs:
            self.add(f"<h2>{html.escape(run.name)}</h2>")
            self.add(f'<p class="sub">{html.escape(_headline(run))}</p>')
            self.run_table(run)
            self.plot(before_after_run(run), _file("before_after", run, runs), "Metrics before and after training")
        self.notes(encoding_notes(list(runs)))
        self.plot(pass_at_k_curves(runs), "pass_at_k", "Pass@k before training and after it")
        self.add("<h2>Training curves</h2>")
        single = "Bands: standard errors, and 5–95 % quantiles of log-ratios." if len(runs) == 1 else ""
        self.add(f'<p class="sub">{single}</p>')
        self.plot(training_curves(runs), "curves", "Training curves")
        for run in runs:
            self.provenance(run.environment.get("command", ""), _versions(run.environment), run.recipe, run.name)

    def run_table(self, run: RunRecord) -> None:
        """Every metric that was evaluated, the summary ones first."""
        result = run.result
        measured = [name.partition("/")[2] for name in result if name.startswith(("before/", "after/"))]
        names, method = dict.fromkeys([*result.get("summary_metrics", ()), *measured]), result.get("method")
        rows = []
        for name in names:
            before, after = result.get(f"before/{name}"), result.get(f"after/{name}")
            change = "–" if before is None or after is None else f"{after - before:+.4g}"
            rows.append((marked(name, method), number(before), number(after), change))
        if rows:
            self.table(("metric", "before", "after", "change"), rows, _hovers(names, method))
        self.notes(result.get("notes", {}).items())
        self.notes(faults_of(result.get("rows", {})))
        for line in result.get("unmet_requirements", ()):
            self.add(f'<p class="failed">required, but {html.escape(line)}</p>')

    def provenance(self, command: str, versions: str, recipe: str, name: str = "") -> None:
        """How to get the same numbers again."""
        self.add(f"<h2>Reproduce{' ' + html.escape(name) if name else ''}</h2>")
        self.add(f"<pre>{html.escape(command)}</pre><p>{html.escape(versions)}</p>")
        self.details("resolved recipe" if not name else f"resolved recipe of {name}", recipe)


def _hovers(
    names: Iterable[str], method: str | None, titles: Mapping[str, tuple[str | None, Better | None]] | None = None
) -> dict[str, str]:
    """What a table calls each metric → its meaning, range and direction."""
    return {marked(name, method, *(titles or {}).get(name, (None, None))): hover(name, method) for name in names}


def _file(name: str, run: RunRecord, runs: Sequence[RunRecord]) -> str:
    return name if len(runs) == 1 else f"{name}_{run.name}"


def _headline(run: RunRecord) -> str:
    if not run.finished:
        return "unfinished: the curves end where the run stopped"
    result = run.result
    parts = [f"{result['method']}, {divergence_label(result['divergence'])}"]
    if result.get("beta") is not None:
        parts.append(f"β = {result['beta']}")
    parts += [f"seed {result['seed']}", f"{result['steps']} steps in {result['train_seconds']:.1f} s"]
    return " · ".join(parts)


def _versions(record: Mapping[str, Any]) -> str:
    versions = [f"{name} {version}" for name, version in record.get("versions", {}).items() if version]
    git = record.get("git")
    if git:
        versions.append(f"git {git['revision'][:12]}{' with local changes' if git['dirty'] else ''}")
    return " · ".join([*versions, *filter(None, (record.get("device"), record.get("date")))])
