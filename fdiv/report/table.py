"""The tables of runs and sweeps: means over seeds, their errors, terminal and Markdown form."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fdiv.terminal import divergence_label, number, print_table

__all__ = ["aggregate", "cell_label", "entry", "run_table", "table"]


def cell_label(settings: Mapping[str, Any]) -> str:
    """`alpha(alpha=0.3), beta 0.1`: the settings of a row without its seed."""
    parts = [
        divergence_label(value) if key == "divergence" else f"{key} {value}"
        for key, value in settings.items()
        if key != "seed"
    ]
    return ", ".join(parts) or "all"


def aggregate(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean ± standard error over seeds (s/√n, s with n−1) of every number, by setting; one seed has no error."""
    groups: dict[str, dict[str, Any]] = {}
    for record in records:
        label = cell_label(record["settings"])
        settings = {key: value for key, value in record["settings"].items() if key != "seed"}
        group = groups.setdefault(label, {"label": label, "settings": settings, "n": 0, "failed": 0, "values": []})
        if record["status"] == "finished":
            group["n"] += 1
            group["values"].append(record["values"])
        else:
            group["failed"] += 1
    for group in groups.values():
        values = group.pop("values")
        names = dict.fromkeys(name for entry in values for name in entry if "/" in name)
        group["metrics"] = {name: _mean([entry.get(name) for entry in values]) for name in names}
    return list(groups.values())


def _mean(values: Sequence[float | None]) -> dict[str, float | int | None]:
    present = [float(value) for value in values if value is not None]
    if not present:
        return {"mean": None, "se": None, "n": 0}
    error = statistics.stdev(present) / math.sqrt(len(present)) if len(present) > 1 else None
    return {"mean": statistics.fmean(present), "se": error, "n": len(present)}


def _columns(records: Sequence[Mapping[str, Any]]) -> list[str]:
    for record in records:
        if record["status"] == "finished":
            return record["values"]["summary_metrics"]
    return []


def table(
    groups: Sequence[Mapping[str, Any]], columns: Sequence[str], wide: bool = True
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparison: a row per setting; a row per metric where that is narrower and not `wide`."""
    header = ["setting", "n", *columns]
    rows = [[group["label"], str(group["n"]), *(entry(group, name) for name in columns)] for group in groups]
    if wide or len(columns) <= len(groups):
        return header, rows
    turned = [list(line) for line in zip(header, *rows, strict=True)]
    return turned[0], turned[1:]


def entry(group: Mapping[str, Any], name: str) -> str:
    """`0.500 → 0.812 ± 0.010` of one metric in one row."""
    before, after = (group["metrics"].get(f"{stage}/{name}", {}) for stage in ("before", "after"))
    text = number(after.get("mean"))
    if after.get("se") is not None:
        text += f" ± {number(after['se'])}"
    return f"{number(before['mean'])} → {text}" if before.get("mean") is not None else text


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def run_table(result: Mapping[str, Any], output_dir: Any) -> None:
    """The end-of-run table: every summary metric before and after training, and the change."""
    rows = []
    for name in result["summary_metrics"]:
        before, after = result.get(f"before/{name}"), result.get(f"after/{name}")
        change = None if before is None or after is None else after - before
        rows.append((name, number(before), number(after), "–" if change is None else f"{change:+.4g}"))
    if not rows:
        trained = {name: value for name, value in result.items() if name.startswith("train/")}
        rows = [(name.removeprefix("train/"), "–", number(value), "–") for name, value in trained.items()]
    title = f"{result['recipe']} · {divergence_label(result['divergence'])} · seed {result['seed']}"
    notes = [f"{name}: {reason}" for name, reason in result["notes"].items()]
    notes.append(f"{result['steps']} steps in {result['train_seconds']:.1f} s; everything is in {output_dir}")
    print_table(title, ("metric", "before", "after", "change"), rows, notes)
