"""From what a log holds of attacks to numbers: every metric after every attack, the retrained model's beside it.

`attack/LABEL/METRIC` is the model's value after the attack, `retrained/attack/LABEL/METRIC` the retrained model's
after the same attack, or without one where its log holds none (the note says which). `attack/NAME/METRIC_area` is the
mean height of the curve of NAME's steps; it begins at 0 steps with the value before the attack on the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fdiv.eval.benchmark.aggregation import Aggregates
from fdiv.eval.benchmark.log import EvalLog
from fdiv.eval.metrics.leakage import leak_at_k
from fdiv.eval.unlearning.attacks.curves import curve_area

__all__ = ["put_attacks"]

Aggregate = Callable[[EvalLog, EvalLog | None], Aggregates]
_LEAKS = (1, 8, 64, 512)


def put_attacks(
    result: Aggregates, retain: EvalLog | None, aggregate: Aggregate, names: Sequence[str], retained: Sequence[str]
) -> None:
    """Put the values of every attack that the log of `result` holds, and the reasons of those that were not made.

    Args:
        result: of the benchmark without attack. retain: the retrained model's log on the same rows.
        aggregate: the benchmark's own, of a log against a retain log.
        names: of the values that are of interest after an attack.
        retained: of those of them, the ones of retained rows, which an attack on prompts leaves as they are.
    """
    attacks = result.log.stamp.get("attacks", {})
    for label, facts in attacks.items():
        own = _part(result.log, label, facts)
        if facts["sampled"]:
            _put_leaks(result, f"attack/{label}", own, facts)
            theirs = None if retain is None else _same_attack(retain, label, facts)
            if theirs is not None:
                _put_leaks(result, f"retrained/attack/{label}", theirs, facts)
            continue
        shown = [name for name in names if facts["weights"] or name not in retained]
        other, note = _retrained(retain, label, facts, own)
        _put(result, f"attack/{label}", aggregate(own, other), shown, _about(facts))
        if other is not None:
            _put(result, f"retrained/attack/{label}", aggregate(other.restricted_to(own), None), shown, note)
    _put_areas(result, retain, aggregate, names)
    for name, reason in result.log.stamp.get("missing", {}).items():
        if name.startswith("attack/") and name.count("/") == 1:
            result.put(name, None, reason)


def _put(result: Aggregates, head: str, found: Aggregates, names: Sequence[str], note: str) -> None:
    for name in names:
        value = found.values.get(name)
        own = found.notes.get(name) or ("" if value is not None else "the log holds no items of it")
        result.put(f"{head}/{name}", value, "; ".join(filter(None, (note, own))) or None)


def _about(facts: dict[str, Any]) -> str:
    """What a reader of the attack's values has to know, in a line."""
    parts = [f"on {facts['rows']} of {facts['of']} rows"] if facts["rows"] < facts["of"] else []
    if facts["trained_on"]:
        parts.append(f"{len(facts['trained_on'])} rows were trained on")
    return ", ".join([*parts, *facts["notes"]])


def _part(log: EvalLog, label: str, facts: dict[str, Any]) -> EvalLog:
    """What the log holds of one attack, as a log of its own; of a subset of the rows."""
    head = f"attack/{label}/"
    metrics = {name.removeprefix(head): dict(node) for name, node in log.metrics.items() if name.startswith(head)}
    return replace(log, metrics=metrics, stamp=_without_attacks(log) | {"max_items": facts["rows"]})


def _without_attacks(log: EvalLog) -> dict[str, Any]:
    return {name: value for name, value in log.stamp.items() if name not in ("attacks", "missing")}


def _plain(log: EvalLog) -> EvalLog:
    """The log without its attacks."""
    metrics = {name: dict(node) for name, node in log.metrics.items() if not name.startswith("attack/")}
    return replace(log, metrics=metrics, stamp=_without_attacks(log))


def _same_attack(log: EvalLog, label: str, facts: dict[str, Any]) -> EvalLog | None:
    """What another log holds of the same attack; None: nothing, or one with other parameters."""
    theirs = log.stamp.get("attacks", {}).get(label)
    return None if theirs is None or theirs["settings"] != facts["settings"] else _part(log, label, theirs)


def _retrained(retain: EvalLog | None, label: str, facts: dict[str, Any], own: EvalLog) -> tuple[EvalLog | None, str]:
    """The retrained model's log that an attack is compared with, and the note to its values."""
    if retain is None:
        return None, ""
    attacked = _same_attack(retain, label, facts)
    if attacked is not None and _rows(own) <= _rows(attacked):
        return attacked, ""
    return _plain(retain), "of the retrained model without the attack: its log holds none with these settings"


def _rows(log: EvalLog) -> set[tuple[str, str]]:
    return {(name, row) for name, node in log.metrics.items() for row in node.get("value_by_index", {})}


def _put_leaks(result: Aggregates, head: str, log: EvalLog, facts: dict[str, Any]) -> None:
    """leak@k and its standard error for k of 1, 8, 64, 512 below the number of samples, and that number."""
    leaked, samples = log.column("leak", "leaked"), log.column("leak", "samples")
    if not leaked:
        result.put(f"{head}/leak@1", None, "the log holds no samples")
        return
    counts, most = [int(count) for count in leaked.values()], min(int(count) for count in samples.values())
    for k in sorted({k for k in _LEAKS if k < most} | {most}):
        rate = leak_at_k(counts, [int(count) for count in samples.values()], k)
        result.put(f"{head}/leak@{k}", rate.value, _about(facts) or None)
        if len(counts) > 1:
            result.put(f"{head}/leak@{k}_se", rate.error)


def _put_areas(result: Aggregates, retain: EvalLog | None, aggregate: Aggregate, names: Sequence[str]) -> None:
    """Areas of the curves of several steps."""
    attacks = result.log.stamp.get("attacks", {})
    curves: dict[str, list[tuple[int, str]]] = {}
    for label, facts in attacks.items():
        if "curve" in facts:
            curves.setdefault(facts["curve"]["name"], []).append((facts["curve"]["step"], label))
    for curve, points in curves.items():
        points.sort()
        first = _part(result.log, points[0][1], attacks[points[0][1]])
        starts = {"attack": _plain(result.log)}
        if retain is not None and all(_same_attack(retain, label, attacks[label]) for _, label in points):
            starts["retrained/attack"] = _plain(retain)
        for head, log in starts.items():
            start = aggregate(replace(log.restricted_to(first), stamp=first.stamp), None)
            for name in names:
                heights = [result.values.get(f"{head}/{label}/{name}") for _, label in points]
                if name == "forget_quality" or all(height is None for height in heights):
                    continue  # a p-value has no mean height
                heights = [start.values.get(name), *heights]
                area = None if None in heights else curve_area([0, *(step for step, _ in points)], heights)
                result.put(f"{head}/{curve}/{name}_area", area, None if area is not None else _no_area(heights))


def _no_area(heights: Sequence[float | None]) -> str:
    return "the curve has no value before the attack" if heights[0] is None else "a point of the curve has no value"
