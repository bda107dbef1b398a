"""Find a metric's entry in the glossary, and show it: a mark, a line of meaning, a hover text, the docs page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

from fdiv.report.metrics.glossary import GLOSSARY, LABELLED, Better, Metric

__all__ = ["better", "describe", "documentation", "hover", "marked", "meanings", "plain_name"]

_MARKS: dict[Better, str] = {"higher": "↑", "lower": "↓", "zero": "→ 0"}
_STAGE = re.compile(r"^(?:(?:before|after|train|late|log|when [^/]+)/)?(?:eval_)?")

_ATTACKED = re.compile(r"(?P<whose>retrained/)?attack/[^/]+(?:/(?P<metric>[^/]+))?")


def plain_name(name: str) -> str:
    """A metric without where in the run it was measured: `after/pass@1` is `pass@1`, `train/eval_loss` is `loss`.

    Args:
        name: as in `result.json` or a log.
    """
    return _STAGE.sub("", name, count=1)


@cache
def _pattern(name: str) -> re.Pattern[str]:
    """`*` stands for any text, `K` for a number."""
    return re.compile(re.escape(name).replace(r"\*", ".+").replace("K", r"\d+"))


@cache
def _entries(method: str | None) -> tuple[tuple[Metric, bool], ...]:
    """The entries in the order in which they are tried, and whether a label may stand before the name.

    Those of the method come first, exact names before patterns, and longer patterns before shorter ones.
    """
    found = [
        (metric, title in LABELLED)
        for title, metrics in GLOSSARY.items()
        for metric in metrics
        if metric.method in (None, method)
    ]

    def rank(entry: tuple[Metric, bool]) -> tuple[bool, bool, int]:
        metric = entry[0]
        return metric.method is None, "*" in metric.name, -len(metric.name)

    return tuple(sorted(found, key=rank))


@cache
def describe(name: str, method: str | None = None) -> Metric | None:
    """The entry of a metric; None for one the glossary does not know, such as that of an evaluation of one's own.

    Args:
        name: As in `result.json` or a log: with or without `before/`, `after/`, `train/`, `late/`, `when …/`, `eval_`.
            `NAME_se` is the standard error of NAME.
        method: Of the run. Some names mean another thing in one method: the divergences of f-DPG are to the target.
    """
    plain = plain_name(name)
    attacked = _ATTACKED.fullmatch(plain)
    if attacked is not None:
        return _after_attack(attacked["whose"] is not None, attacked["metric"], method)
    of = describe(plain.removesuffix("_se"), method) if plain.endswith("_se") else None
    if of is not None:
        return Metric(f"{of.name}_se", f"standard error of `{of.name}`", "≥ 0")
    last = plain.rpartition("/")[2]
    for metric, labelled in _entries(method):
        pattern = _pattern(metric.name)
        if pattern.fullmatch(plain) or (labelled and pattern.fullmatch(last)):
            return metric
    return None


def _after_attack(retrained: bool, name: str | None, method: str | None) -> Metric | None:
    """The entry of `attack/LABEL/NAME`, of the curve's area `attack/LABEL/NAME_area`, and of the retrained model's."""
    if name is None:
        return Metric("attack/*", "an attack that was not made; its note says why", "none")
    area = name.endswith("_area")
    of = describe(name.removesuffix("_area") if area else name, method)
    if of is None:
        return None
    how = "mean height of its relearning curve" if area else "after the attack"
    whose = ", of the retrained model" if retrained else ""
    head, tail = ("retrained/" if retrained else ""), ("_area" if area else "")
    return Metric(
        f"{head}attack/*/{of.name}{tail}", f"{of.meaning}; {how}{whose}", of.range, None if retrained else of.better
    )


def better(name: str, method: str | None = None) -> Better | None:
    """Which way is better: `higher`, `lower`, `zero`; None for neither, and for a metric that is not known.

    Args:
        name: as of `describe`. method: of the run.
    """
    metric = describe(name, method)
    return None if metric is None else metric.better


def marked(name: str, method: str | None = None, title: str | None = None, towards: Better | None = None) -> str:
    """`pass@1 ↑`: the name, or `title`, with the mark of the better direction; `towards` wins over the glossary's.

    Args:
        name: as of `describe`. method: of the run. title: what is shown in place of the name.
        towards: which way is better, where the glossary does not know.
    """
    direction = towards or better(name, method)
    return (title or name) if direction is None else f"{title or name} {_MARKS[direction]}"


def hover(name: str, method: str | None = None) -> str:
    """Meaning and range in one line, for the hover text of a report; empty for a metric that is not known.

    Args:
        name: as of `describe`. method: of the run.
    """
    metric = describe(name, method)
    if metric is None:
        return ""
    direction = {None: "", "zero": "; best at 0", "higher": "; higher is better", "lower": "; lower is better"}
    return f"{metric.meaning}; {metric.range}{direction[metric.better]}"


def meanings(
    names: Iterable[str], method: str | None = None, titles: Mapping[str, str | None] | None = None
) -> list[str]:
    """A line for every entry that some shown metrics have: `pass@1, pass@8 ↑: chance that … (0 to 1)`.

    The standard errors have none, nor do metrics that are not known.

    Args:
        names: Of the metrics.
        method: Of the run.
        titles: What the table calls some of them.
    """
    shown: dict[Metric, list[str]] = {}
    for name in names:
        metric = describe(name, method)
        if metric is not None and not plain_name(name).endswith("_se"):
            shown.setdefault(metric, []).append((titles or {}).get(name) or name)
    return [
        f"{marked(', '.join(found), method, towards=metric.better)}: {metric.meaning} ({metric.range})"
        for metric, found in shown.items()
    ]


def documentation() -> str:
    """The page `docs/metrics.md`: the whole glossary, a table for each group."""
    lines = [
        "# Metrics", "",
        "What the tables, reports and plots show. `↑`: higher is better, `↓`: lower, `→ 0`: nearer to 0; no mark: "
        "neither. In a name `*` stands for any text and `K` for a number; a method in brackets: in its runs the name "
        "means this. In `result.json` `before/NAME` and `after/NAME` are an evaluation before and after training, "
        "`train/NAME` the last logged value, `late/NAME` the mean over the last fifth of the logs, `eval_NAME` a "
        "value on the evaluation rows; `NAME_se` is the standard error of NAME. `attack/LABEL/NAME` is NAME after an "
        "attack on the unlearned model, `attack/LABEL/NAME_area` the mean height of the curve of its steps, "
        "`retrained/attack/…` the retrained model's. Divergences are in nats.", "",
        "`make metrics` writes this page from `fdiv.report.metrics`.",
    ]  # fmt: skip
    for title, metrics in GLOSSARY.items():
        lines += ["", f"## {title}", "", "| Metric | Meaning | Range | Better |", "|---|---|---|---|"]
        for metric in metrics:
            of = f" ({metric.method})" if metric.method else ""
            mark = "" if metric.better is None else _MARKS[metric.better]
            cells = (f"`{metric.name}`{of}", metric.meaning, metric.range, mark)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
