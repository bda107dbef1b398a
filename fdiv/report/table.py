"""The tables of runs and sweeps: means over seeds, their errors, terminal and Markdown form."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fdiv.recipe.sweep import PLAIN, Column, staged
from fdiv.report.metrics import marked, meanings
from fdiv.report.metrics.glossary import Better
from fdiv.terminal import divergence_label, number, print_table

__all__ = [
    "aggregate",
    "best_cells",
    "best_of",
    "cell_label",
    "entry",
    "markdown",
    "method_of",
    "rows_table",
    "run_table",
    "short",
    "table",
]


def cell_label(settings: Mapping[str, Any]) -> str:
    """`alpha(alpha=0.3), beta 0.1`: the settings of a row without its seed."""
    parts = [
        value if key == "method" else divergence_label(value) if key == "divergence" else f"{key} {value}"
        for key, value in settings.items()
        if key != "seed"
    ]
    return ", ".join(parts) or "all"


def aggregate(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean ± standard error over seeds (s/√n, s with n−1) of every number, by setting; one seed has no error.

    The runs that only screened are left out, and so are models that were measured and not trained.
    """
    groups: dict[str, dict[str, Any]] = {}
    for record in records:
        if record.get("stage", "run") != "run":
            continue
        label = cell_label(record["settings"])
        settings = {key: value for key, value in record["settings"].items() if key != "seed"}
        group = groups.setdefault(label, {"label": label, "settings": settings, "n": 0, "failed": 0, "values": []})
        if record["status"] == "finished":
            group["n"] += 1
            group["values"].append(record["values"])
        elif record["status"] == "failed":
            group["failed"] += 1
    for group in groups.values():
        values = group.pop("values")
        names = dict.fromkeys(name for entry in values for name in entry if "/" in name or name in PLAIN)
        group["metrics"] = {name: _mean([entry.get(name) for entry in values]) for name in names}
    return list(groups.values())


def _mean(values: Sequence[float | None]) -> dict[str, float | int | None]:
    present = [float(value) for value in values if value is not None]
    if not present:
        return {"mean": None, "se": None, "n": 0}
    error = statistics.stdev(present) / math.sqrt(len(present)) if len(present) > 1 else None
    return {"mean": statistics.fmean(present), "se": error, "n": len(present)}


def table(
    groups: Sequence[Mapping[str, Any]], columns: Sequence[str], wide: bool = True, method: str | None = None
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparison: a row per setting; a row per metric where that is narrower and not `wide`."""
    header = ["setting", "n", *(marked(name, method) for name in columns)]
    rows = [[group["label"], str(group["n"]), *(entry(group, name) for name in columns)] for group in groups]
    if wide or len(columns) <= len(groups):
        return header, rows
    turned = [list(line) for line in zip(header, *rows, strict=True)]
    return turned[0], turned[1:]


def best_of(values: Sequence[float | None], towards: Better | None) -> set[int]:
    """The places of the best values: the largest, smallest, or nearest to 0. Empty where all are equal, where fewer
    than two are known, and without a better way."""
    rank = {"higher": lambda v: -v, "lower": lambda v: v, "zero": abs, None: lambda v: 0.0}[towards]
    known = {place: rank(v) for place, v in enumerate(values) if v is not None and math.isfinite(v)}
    best = {place for place, value in known.items() if value == min(known.values())}
    return best if len(best) < len(known) else set()


def best_cells(groups: Sequence[Mapping[str, Any]], columns: Mapping[str, Better | None]) -> set[tuple[str, str]]:
    """(setting, metric) of the best means after training: what a table of `groups` marks."""
    found = set()
    for name, towards in columns.items():
        means = [group["metrics"].get(staged(name), {}).get("mean") for group in groups]
        found |= {(groups[place]["label"], name) for place in best_of(means, towards)}
    return found


def entry(group: Mapping[str, Any], name: str) -> str:
    """`0.500 → 0.812 ± 0.010` of one metric in one row; `(2 of 3)` where not every seed has a value."""
    before, after = (group["metrics"].get(f"{stage}/{name}", {}) for stage in ("before", "after"))
    text = number(after.get("mean"))
    if after.get("se") is not None:
        text += f" ± {number(after['se'])}"
    if 0 < after.get("n", 0) < group["n"]:
        text += f" ({after['n']} of {group['n']})"
    return f"{number(before['mean'])} → {text}" if before.get("mean") is not None else text


def rows_table(
    results: Mapping[str, Any], columns: Mapping[str, Column], chosen: str | None = None
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a comparison with columns of its own: after training, mean ± standard error over seeds.

    Args:
        results: The content of `results.json`: `start`, measured models, then every row.
        columns: Metric → how it is shown.
        chosen: The screened key, when every value of it is shown: the chosen one is marked with `*`.
    """
    groups = results["aggregate"]
    keys = [key for key in dict.fromkeys(key for group in groups for key in group["settings"]) if key != "method"]
    method = method_of(results)
    titles = [marked(name, method, column.title, column.better) for name, column in columns.items()]
    rows = []
    for label, values in measured(results).items():
        texts = [_text([values.get(staged(name))], column) for name, column in columns.items()]
        rows.append([label, *[""] * (len(keys) + 1), *texts])
    for group in groups:
        settings = group["settings"]
        shown = [
            short(settings.get(key)) + ("*" if key == chosen and _is_chosen(group, results) else "") for key in keys
        ]
        if group["n"]:
            cells = [_text(values_of(results, group, name), column) for name, column in columns.items()]
            rows.append([_row_name(settings), *shown, str(group["n"]), *cells])
        else:
            rows.append([_row_name(settings), *shown, "0", *["not run"] * len(columns)])
    return ["method", *keys, "seeds", *titles], rows


def method_of(results: Mapping[str, Any]) -> str | None:
    """The method of every run of a sweep; None where there are several."""
    found = {(record.get("values") or {}).get("method") for record in results["cells"]} - {None}
    return found.pop() if len(found) == 1 else None


def measured(results: Mapping[str, Any]) -> dict[str, Mapping[str, float | None]]:
    """Label → values of what was measured and not trained: the start, and the models."""
    start = results.get("start")
    found = {start["label"]: {f"after/{name}": value for name, value in start["values"].items()}} if start else {}
    for record in results["cells"]:
        if record.get("stage") == "model" and record["status"] == "finished":
            found[record["settings"]["method"]] = record["values"]
    return found


def values_of(results: Mapping[str, Any], group: Mapping[str, Any], metric: str) -> list[float | None]:
    """The value of a metric for every finished seed of a row."""
    return [
        record["values"].get(staged(metric))
        for record in results["cells"]
        if record.get("stage", "run") == "run"
        and record["status"] == "finished"
        and cell_label(record["settings"]) == group["label"]
    ]


def short(value: Any) -> str:
    """A setting in a table: `3e-4`, `alpha(alpha=0.2)`; nothing for a missing one."""
    if value is None:
        return ""
    if isinstance(value, float) and value != 0 and not 1e-2 <= abs(value) < 1e4:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return (
        divergence_label(value)
        if isinstance(value, dict)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _row_name(settings: Mapping[str, Any]) -> str:
    return str(settings.get("method", "")) or "all"


def _is_chosen(group: Mapping[str, Any], results: Mapping[str, Any]) -> bool:
    return any(choice["settings"] == group["settings"] for choice in results.get("chosen", ()))


def _text(values: Sequence[float | None], column: Column) -> str:
    """Mean ± standard error, the number alone when it is one; how many seeds have a value where some have none."""
    present = [value for value in values if value is not None]
    if not present:
        return "–"
    if column.format == "each":
        return ", ".join(number(int(value) if float(value).is_integer() else value) for value in present)
    found = _mean(present)
    form = number if column.format is None else (lambda value: format(value, column.format))
    text = form(found["mean"])
    text = text if found["se"] is None else f"{text} ± {form(found['se'])}"
    return text if len(present) == len(values) else f"{text} ({len(present)} of {len(values)})"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown; a bar in a cell (`KL(p||q)`) is escaped, or it would end the cell."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)]) + "\n"


def run_table(result: Mapping[str, Any], output_dir: Any) -> None:
    """The end-of-run table: every summary metric before and after training, and the change."""
    rows = []
    method, names = result.get("method"), result["summary_metrics"]
    for name in names:
        before, after = result.get(f"before/{name}"), result.get(f"after/{name}")
        change = None if before is None or after is None else after - before
        change_text = "–" if change is None else f"{change:+.4g}"
        rows.append((marked(name, method), number(before), number(after), change_text))
    if not rows:
        trained = {name.removeprefix("train/"): v for name, v in result.items() if name.startswith("train/")}
        rows = [(marked(name, method), "–", number(value), "–") for name, value in trained.items()]
        names = list(trained)
    title = f"{result['recipe']} · {divergence_label(result['divergence'])} · seed {result['seed']}"
    measured = {name.partition("/")[2] for name in result}
    notes = meanings(names, method)
    # A metric that is not shown here keeps its reason in result.json and the report.
    notes += [f"{name}: {why}" for name, why in result["notes"].items() if name in names or name not in measured]
    notes.append(f"{result['steps']} steps in {result['train_seconds']:.1f} s; everything is in {output_dir}")
    print_table(title, ("metric", "before", "after", "change"), rows, notes)
