"""The report: one HTML file that needs nothing else, readable on a phone, in the dark and on paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fdiv.files import write_text
from fdiv.report import sheet
from fdiv.report.canvas import Canvas
from fdiv.report.comparison import before_after_run, before_after_sweep, frontier, frontier_plot
from fdiv.report.metrics import better, hover, marked
from fdiv.report.metrics.glossary import Better
from fdiv.report.pass_at_k_curves import pass_at_k_plot
from fdiv.report.records import RunRecord, SweepRecord, encoding_notes, read_records, read_results
from fdiv.report.table import best_cells, best_of, method_of
from fdiv.report.words import run_summary, runs_summary, settings_summary, sweep_summary
from fdiv.rows.report import faults_of
from fdiv.terminal import divergence_label, number

__all__ = ["write_frontier", "write_report"]


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
    page = Canvas(output)
    names = [sweep.results["recipe"] for sweep in sweeps] + [run.result.get("recipe", run.name) for run in runs]
    title = title or ", ".join(dict.fromkeys(names))
    for index, sweep in enumerate(sweeps):
        _sweep(page, sweep, f"sweep{index}_" if len(sweeps) > 1 else "")
    if runs:
        _runs(page, runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, sheet.document(title, page.parts, page.sections))
    return output


def write_frontier(root: Path) -> Path | None:
    """Write `frontier.png` of a sweep's directory; None when its results name no axes.

    Args:
        root: with the `results.json` of the sweep.
    """
    figure = frontier(read_results(root / "results.json"))
    if figure is None:
        return None
    figure.savefig(root / "frontier.png")
    return root / "frontier.png"


def _sweep(page: Canvas, sweep: SweepRecord, prefix: str) -> None:
    """Everything about one sweep."""
    results = sweep.results
    seeds = ", ".join(map(str, results["seeds"])) or "the recipe's"
    page.add(sheet.paragraph(f"{len(results['cells'])} runs, seeds {seeds}", "sub"))
    page.section("Results")
    columns = _sweep_table(page, results)
    for cell in results["cells"]:
        if cell["status"] != "finished":
            page.add(sheet.paragraph(f"{cell['name']}: {cell.get('error', cell['status'])}", "failed"))
    notes = [pair for cell in results["cells"] for pair in cell.get("values", {}).get("notes", {}).items()]
    page.notes(dict.fromkeys(notes))
    page.words(sweep_summary(results), settings_summary(results, columns))
    plot = frontier_plot(results)
    if plot is not None:
        page.section("Frontier")
        small = frontier_plot(results, width=5.2, height=3.9)
        page.plot(plot, f"{prefix}frontier", "The two axes of the sweep, one point per setting", small)
    bars, solved = before_after_sweep(results), pass_at_k_plot(sweep.runs)
    if bars or solved:
        page.section("Before and after")
        page.plot(bars, f"{prefix}before_after", "Summary metrics by setting")
        page.plot(solved, f"{prefix}pass_at_k", "Pass@k before training and after it")
    page.curves(sweep.runs, "Mean over seeds; bands are ± one standard error over seeds.", prefix)
    page.examples(list({run.setting: run for run in reversed(sweep.runs)}.values())[::-1])
    page.provenance(results["command"], _versions(results), sweep.runs[0].recipe if sweep.runs else "")


def _sweep_table(page: Canvas, results: Mapping[str, Any]) -> dict[str, Better | None]:
    """The table of a sweep, the best of each metric marked; returns what it shows and which way is better."""
    from fdiv.recipe.sweep import Column
    from fdiv.report.table import measured, rows_table, table

    method = method_of(results)
    own = {name: Column(**column) for name, column in results.get("table", {}).items()}
    directions = {name: own[name].better or better(name, method) for name in own}
    directions = directions or {name: better(name, method) for name in results["columns"]}
    best = best_cells(results["aggregate"], directions)
    if own:
        keep_all = (results.get("screen") or {}).get("keep") == "all"
        header, rows = rows_table(results, own, results["screen"]["key"] if keep_all else None)
        titles = {name: (column.title, column.better) for name, column in own.items()}
        first, left = len(measured(results)), len(header) - len(own)
        labels = [group["label"] for group in results["aggregate"]]
        cells = {(first + labels.index(label), left + list(own).index(name)) for label, name in best}
        caption = "Mean ± standard error over seeds."
    else:
        header, rows = table(results["aggregate"], results["columns"], wide=False, method=method)
        titles = {}
        names = {marked(name, method): name for name in directions}
        cells = {
            (place, column)
            for place, row in enumerate(rows)
            for column, heading in enumerate(header)
            if {(row[0], names.get(heading)), (heading, names.get(row[0]))} & best
        }
        caption = "before → after training, mean ± standard error over seeds."
    page.add(sheet.table(header, rows, _hovers(directions, method, titles), cells))
    key = "↑ higher is better, ↓ lower; ★ the best; what a name means: on hover."
    page.add(sheet.paragraph(f"{caption} {key}", "sub"))
    return directions


def _runs(page: Canvas, runs: Sequence[RunRecord]) -> None:
    """Everything about single runs; several are compared first, and follow one by one at the end."""
    finished = {run.name: run.result for run in runs if run.finished}
    several = len(runs) > 1
    if several and len(finished) > 1:
        _comparison(page, finished)
    if not several:
        _run(page, runs[0], "before_after")
    page.notes(encoding_notes(list(runs)))
    summaries = [run_summary(result, name) for name, result in finished.items()]
    page.words(summaries, runs_summary(finished) if len(finished) > 1 else ())
    page.plot(pass_at_k_plot(runs), "pass_at_k", "Pass@k before training and after it")
    page.curves(runs, "" if several else "Bands: standard errors, and 5–95 % quantiles of log-ratios.")
    page.examples(runs)
    for run in runs if several else ():
        _run(page, run, f"before_after_{run.name.replace('/', '_')}")
    for run in runs:
        page.provenance(run.environment.get("command", ""), _versions(run.environment), run.recipe, run.name)


def _run(page: Canvas, run: RunRecord, plot: str) -> None:
    """What one run measured, and what kept it from measuring more."""
    result = run.result
    page.section(run.name)
    page.add(sheet.paragraph(_headline(run), "sub"))
    _run_table(page, result)
    page.notes(result.get("notes", {}).items())
    page.notes(faults_of(result.get("rows", {})))
    for line in result.get("unmet_requirements", ()):
        page.add(sheet.paragraph(f"required, but {line}", "failed"))
    page.plot(before_after_run(run), plot, "Metrics before and after training")


def _comparison(page: Canvas, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Every metric after training, a column for each run, summary metrics first; nothing where none was measured."""
    methods = {result["method"] for result in results.values()}
    method = methods.pop() if len(methods) == 1 else None
    first = [name for result in results.values() for name in result.get("summary_metrics", ())]
    rows = []
    for name in _measured(results.values(), first, ("after",)):
        values = [result.get(f"after/{name}") for result in results.values()]
        errors = [result.get(f"after/{name}_se") for result in results.values()]
        best = {column + 1 for column in best_of(values, better(name, method))}
        rows.append(_Row(name, [_value(*pair) for pair in zip(values, errors, strict=True)], best))
    if not rows:
        return
    page.section("Comparison")
    _metric_table(page, ("after training", *results), rows, first, method)
    page.add(sheet.paragraph("± standard error over rows, where it was measured. ★ the best.", "sub"))


def _run_table(page: Canvas, result: Mapping[str, Any]) -> None:
    """Every metric that was evaluated, the summary ones first."""
    first, method = result.get("summary_metrics", ()), result.get("method")
    changes = {change.name: change for change in run_summary(result, "").changes}
    rows = []
    for name in _measured([result], first, ("before", "after")):
        before, after = values = [result.get(f"{stage}/{name}") for stage in ("before", "after")]
        errors = [result.get(f"{stage}/{name}_se") for stage in ("before", "after")]
        change = "–" if before is None or after is None else f"{after - before:+.4g}"
        cells = [*(_value(*pair) for pair in zip(values, errors, strict=True)), change]
        beyond = name in changes and changes[name].verdict == "beyond"
        kinds = {3: changes[name].direction or ""} if beyond else {}
        rows.append(_Row(name, cells, {column + 1 for column in best_of(values, better(name, method))}, kinds))
    _metric_table(page, ("metric", "before", "after", "change"), rows, first, method)


class _Row(NamedTuple):
    """A metric: its cells, the columns of the best of them, and column → `better` or `worse`."""

    name: str
    cells: list[str]
    best: set[int]
    kinds: Mapping[int, str] = {}


def _measured(results: Iterable[Mapping[str, Any]], first: Iterable[str], stages: Sequence[str]) -> list[str]:
    """The metrics of some stages, `first` ones first; a standard error stands beside its metric."""
    found = [key.partition("/")[::2] for result in results for key in result]
    names = dict.fromkeys([*first, *(name for stage, name in found if stage in stages)])
    return [name for name in names if not (name.endswith("_se") and name.removesuffix("_se") in names)]


def _value(value: float | None, error: float | None) -> str:
    return number(value) + (f" ± {number(error)}" if value is not None and error is not None else "")


def _metric_table(
    page: Canvas, header: Sequence[str], rows: Sequence[_Row], first: Sequence[str], method: str | None
) -> None:
    """A row per metric; those beyond the summary are folded away where there are many."""
    shown = [row for row in rows if row.name in first] if len(rows) > 16 else list(rows)
    shown = shown or list(rows)
    tables = []
    for part in (shown, [row for row in rows if row not in shown]):
        best = {(place, column) for place, row in enumerate(part) for column in row.best}
        kinds = {(place, column): kind for place, row in enumerate(part) for column, kind in row.kinds.items()}
        lines = [(marked(row.name, method), *row.cells) for row in part]
        hovers = _hovers((row.name for row in part), method)
        tables.append(sheet.table(header, lines, hovers, best, kinds) if part else "")
    page.add(tables[0], sheet.details(f"{len(rows) - len(shown)} more metrics", tables[1]))


def _hovers(
    names: Iterable[str], method: str | None, titles: Mapping[str, tuple[str | None, Better | None]] | None = None
) -> dict[str, str]:
    """What a table calls each metric → its meaning, range and direction."""
    return {marked(name, method, *(titles or {}).get(name, (None, None))): hover(name, method) for name in names}


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
