"""A metric where another first reached a level: `when pass@1>=0.5/pass@64`.

Runs are compared at equal Pass@1, say, instead of at equal steps: a method that learns more slowly has also lost less
by the last step, which proves nothing.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fdiv.errors import RecipeError

__all__ = ["is_crossing", "never_together", "value_when"]

_FORM = re.compile(
    r"when (?P<metric>\S+?)\s*(?P<sign>>=|<=)\s*(?P<level>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)/(?P<wanted>.+)"
)
_REACHED = {">=": operator.ge, "<=": operator.le}


def is_crossing(name: str) -> bool:
    """Whether a metric's name has this form, or is meant to."""
    return name.startswith("when ")


def value_when(name: str, history: Iterable[Mapping[str, Any]]) -> float | None:
    """The value in the first log entry that holds both metrics and in which the condition is true; None without one.

    Args:
        name: `when METRIC>=LEVEL/WANTED` (or `<=`); metrics as logged, with or without `eval_`.
        history: the entries of `metrics.jsonl`, in order.

    Raises:
        RecipeError: another form.
    """
    match = _match(name)
    reached, level = _REACHED[match["sign"]], float(match["level"])
    return next((wanted for value, wanted in _pairs(match, history) if reached(value, level)), None)


def never_together(name: str, history: Iterable[Mapping[str, Any]]) -> bool:
    """Whether no log entry holds both metrics of `name`, so that nothing can be said of the level: a name that is
    written wrong, or one of the training's log beside one of the evaluation's.

    Args and errors: as `value_when`.
    """
    return next(_pairs(_match(name), history), None) is None


def _match(name: str) -> re.Match[str]:
    match = _FORM.fullmatch(name)
    if match is None:
        raise RecipeError(f"metric {name!r}: write `when pass@1>=0.5/pass@64`, a condition and what is shown there")
    return match


def _pairs(match: re.Match[str], history: Iterable[Mapping[str, Any]]) -> Iterator[tuple[float, float]]:
    """Both metrics, of the entries that hold both."""
    for entry in history:
        value, wanted = (_logged(entry, match[group]) for group in ("metric", "wanted"))
        if value is not None and wanted is not None:
            yield value, wanted


def _logged(entry: Mapping[str, Any], name: str) -> float | None:
    value = entry.get(name, entry.get(f"eval_{name}"))
    return value if isinstance(value, (int, float)) else None
