"""What changed beyond its error, in words: intervals of 95 % from seeds, or from the standard errors of one run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from fdiv.report.metrics import better, marked, plain_name
from fdiv.report.metrics.glossary import Better
from fdiv.report.table import best_of, cell_label, staged
from fdiv.terminal import number

__all__ = ["Change", "Summary", "difference", "run_summary", "runs_summary", "settings_summary", "sweep_summary"]

Verdict = Literal["beyond", "within", "unknown"]


@dataclass(frozen=True)
class Change:
    """The difference of one metric between two measurements.

    Args:
        name: Of the metric. method: of the run.
        before: The first value. after: the second.
        low: Lower end of the 95 % interval of after − before; None where no error is known.
        high: Its upper end.
    """

    name: str
    method: str | None
    before: float
    after: float
    low: float | None = None
    high: float | None = None

    @property
    def verdict(self) -> Verdict:
        """`beyond`: the interval leaves out 0; `within`: it holds 0; `unknown`: there is none."""
        if self.low is None or self.high is None:
            return "unknown"
        return "beyond" if self.low > 0 or self.high < 0 else "within"

    @property
    def direction(self) -> Literal["better", "worse"] | None:
        """Which way it went; None for a metric without a better way, or a change of 0."""
        wanted = better(self.name, self.method)
        first, second = (abs(self.before), abs(self.after)) if wanted == "zero" else (self.before, self.after)
        if wanted is None or first == second:
            return None
        return "better" if (second > first) == (wanted == "higher") else "worse"

    def sentence(self) -> str:
        """`pass@1 ↑ rose from 0.50 to 0.81 (+0.31; 95 %: +0.25 to +0.37): better`."""
        verb = "rose" if self.after > self.before else "fell" if self.after < self.before else "stayed"
        change = f"{self.after - self.before:+.3g}"
        if self.low is not None and self.high is not None:
            change += f"; 95 %: {self.low:+.3g} to {self.high:+.3g}"
        text = f"{marked(self.name, self.method)} {verb} from {number(self.before)} to {number(self.after)} ({change})"
        return f"{text}: {self.direction}" if self.direction else text


@dataclass
class Summary:
    """The changes of a run, or of a setting of a sweep."""

    heading: str
    changes: list[Change]

    def of(self, verdict: Verdict) -> list[Change]:
        """Those with a verdict."""
        return [change for change in self.changes if change.verdict == verdict]


def difference(first: Sequence[float], second: Sequence[float], paired: bool) -> tuple[float, float] | None:
    """The 95 % interval of mean(second) − mean(first) by Student's t; None with fewer than two values in each.

    Args:
        first: One value per seed. second: the other values.
        paired: The values stand for the same seeds in the same order: the interval is that of their differences,
            n − 1 degrees of freedom. Otherwise Welch's.
    """
    from scipy.special import stdtrit

    if min(len(first), len(second)) < 2:
        return None
    if paired:
        gaps = [b - a for a, b in zip(first, second, strict=True)]
        mean, error, freedom = statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps)), len(gaps) - 1.0
    else:
        mean = statistics.fmean(second) - statistics.fmean(first)
        parts = [statistics.variance(values) / len(values) for values in (first, second)]
        error = math.sqrt(sum(parts))
        spread = sum(part**2 / (len(v) - 1) for part, v in zip(parts, (first, second), strict=True))
        freedom = sum(parts) ** 2 / spread if spread else float(min(len(first), len(second)) - 1)
    half = float(stdtrit(freedom, 0.975)) * error
    return mean - half, mean + half


def _normal(before: float, after: float, errors: Sequence[float | None]) -> tuple[float, float] | None:
    """The 95 % interval from two standard errors, as if the two were independent; None where one is missing."""
    known = [error for error in errors if error is not None and math.isfinite(error)]
    if len(known) < 2 or not any(known):
        return None
    half = 1.959964 * math.hypot(*known)
    return after - before - half, after - before + half


def _finite(*values: Any) -> bool:
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)


def _names(values: Mapping[str, Any], first: Iterable[str]) -> list[str]:
    """The metrics measured after training, without the standard errors; `first` ones first."""
    found = [name.removeprefix("after/") for name in values if name.startswith("after/")]
    return [n for n in dict.fromkeys([*first, *found]) if not (n.endswith("_se") and n.removesuffix("_se") in found)]


def run_summary(result: Mapping[str, Any], heading: str) -> Summary:
    """Before against after of one run, by the standard errors that its evaluations measured over rows."""
    changes = []
    for name in _names(result, result.get("summary_metrics", ())):
        before, after = result.get(f"before/{name}"), result.get(f"after/{name}")
        if _finite(before, after):
            ends = _normal(before, after, [result.get(f"{stage}/{name}_se") for stage in ("before", "after")])
            changes.append(Change(name, result.get("method"), before, after, *(ends or (None, None))))
    return Summary(heading, changes)


def _finished(results: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Setting → the values of its finished seeds."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for cell in results["cells"]:
        if cell["status"] == "finished" and cell.get("stage", "run") in (None, "run"):
            found.setdefault(cell_label(cell["settings"]), []).append(
                {"seed": cell["settings"].get("seed"), **cell["values"]}
            )
    return found


def sweep_summary(results: Mapping[str, Any]) -> list[Summary]:
    """Before against after of every setting, over its seeds; of a single seed as `run_summary`."""
    summaries = []
    for label, seeds in _finished(results).items():
        first = results.get("columns") or [plain_name(name) for name in results.get("table") or ()]
        if len(seeds) == 1:
            summaries.append(run_summary({"summary_metrics": first, **seeds[0]}, label))
            continue
        changes = []
        for name in _names(seeds[0], first):
            pairs = [(values.get(f"before/{name}"), values.get(f"after/{name}")) for values in seeds]
            pairs = [pair for pair in pairs if _finite(*pair)]
            if len(pairs) > 1:
                before, after = zip(*pairs, strict=True)
                ends = difference(before, after, paired=True)
                means = statistics.fmean(before), statistics.fmean(after)
                changes.append(Change(name, seeds[0].get("method"), *means, *(ends or (None, None))))
        summaries.append(Summary(label, changes))
    return summaries


def settings_summary(results: Mapping[str, Any], columns: Mapping[str, Better | None]) -> list[str]:
    """For every shown metric with a better way: the best setting, and those it is told apart from.

    Settings with the same seeds are compared seed by seed. Empty without two settings of two seeds each.

    Args:
        results: The content of `results.json`.
        columns: Metric → which way is better.
    """
    found = {label: seeds for label, seeds in _finished(results).items() if len(seeds) > 1}
    lines = []
    for name, wanted in columns.items():
        values = {label: {v["seed"]: v.get(staged(name)) for v in seeds} for label, seeds in found.items()}
        values = {label: seeds for label, seeds in values.items() if _finite(*seeds.values())}
        means = {label: statistics.fmean(seeds.values()) for label, seeds in values.items()}
        lines += _best_line(name, wanted, means, partial(_apart, values))
    return lines


def _apart(values: Mapping[str, Mapping[Any, float]], first: str, second: str) -> bool:
    one, two = values[first], values[second]
    paired = one.keys() == two.keys()
    ends = difference([one[seed] for seed in one], [two[seed] for seed in (one if paired else two)], paired)
    return ends is not None and (ends[0] > 0 or ends[1] < 0)


def runs_summary(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The same for single runs by name, by the standard errors that their evaluations measured over rows."""
    methods = {result.get("method") for result in results.values()}
    method = methods.pop() if len(methods) == 1 else None
    lines = []
    names = [name for result in results.values() for name in _names(result, result.get("summary_metrics", ()))]
    for name in dict.fromkeys(names):
        found = {label: (r.get(f"after/{name}"), r.get(f"after/{name}_se")) for label, r in results.items()}
        found = {label: pair for label, pair in found.items() if _finite(*pair)}

        def apart(first: str, second: str, found: Mapping[str, Any] = found) -> bool:
            ends = _normal(found[first][0], found[second][0], [found[first][1], found[second][1]])
            return ends is not None and (ends[0] > 0 or ends[1] < 0)

        means = {label: pair[0] for label, pair in found.items()}
        lines += _best_line(name, better(name, method), means, apart, method)
    return lines


def _best_line(
    name: str, wanted: Better | None, means: Mapping[str, float], apart: Callable[[str, str], bool],
    method: str | None = None,
) -> list[str]:  # fmt: skip
    """`NAME ↑: best under A (0.81), ahead of B beyond its error; not told apart from C`; none without two values."""
    if wanted is None or len(means) < 2:
        return []
    best = list(means)[min(best_of(list(means.values()), wanted), default=0)]
    others = {label: apart(label, best) for label in means if label != best}
    text = f"{marked(name, method, towards=wanted)}: best under {best} ({number(means[best])})"
    for words, value in ((", ahead of ", True), ("; not told apart from ", False)):
        labels = [label for label, told in others.items() if told is value]
        more = f" and {len(labels) - 6} others" if len(labels) > 6 else ""
        text += f"{words}{', '.join(labels[:6])}{more}{' beyond its error' if value else ''}" if labels else ""
    return [text]
