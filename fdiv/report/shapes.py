"""What the records of runs and sweeps hold, as far as a report reads it: a wrong value is named by its place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from fdiv.errors import DataError

__all__ = ["ENVIRONMENT", "RESULT", "RESULTS", "check_result", "check_results", "check_shape"]

_NUMBER = (int, float, NoneType)
_TEXT, _ANY = (str, NoneType), (object,)
_GIT = {"revision": (str,), "dirty": (bool,)}

# A shape is a tuple of types; a mapping of names to shapes (`name?` may be absent or null, further names are not
# looked at); or a list of one shape for every entry of a list, a list of "*" and one for every value of a mapping.
ENVIRONMENT = {"command?": _TEXT, "versions?": ["*", _TEXT], "git?": _GIT, "device?": _TEXT, "date?": _TEXT}
RESULT = {
    "recipe": (str,),
    "method": (str,),
    "divergence": (str, dict, NoneType),
    "seed": (int,),
    "steps": (int,),
    "train_seconds": (int, float),
    "notes?": ["*", (str,)],
    "encoding?": (dict,),
    "summary_metrics?": [(str,)],
    "unmet_requirements?": [(str,)],
}
_METRICS = ["*", {"mean": _NUMBER, "se": _NUMBER}]
_CELL_VALUES = {"notes?": ["*", (str,)], "method?": _TEXT}
_CELL = {
    **{"name": (str,), "settings": (dict,), "status": (str,), "stage?": _TEXT, "error?": _TEXT},
    "values?": _CELL_VALUES,
}
_GROUP = {"label": (str,), "settings": (dict,), "n": (int,), "metrics": _METRICS}
RESULTS = {
    **ENVIRONMENT,
    "recipe": (str,),
    "command": (str,),
    "cells": [_CELL],
    "aggregate": [_GROUP],
    "seeds": [_ANY],
    "columns?": [(str,)],
    "axes?": ["*", _TEXT],
    "table?": ["*", (dict,)],
    "screen?": (dict,),
    "chosen?": [{"settings": (dict,), "at_least_reached?": (bool,)}],
    "start?": {"label": (str,), "values": (dict,)},
}


def check_shape(value: Any, shape: Any, file: Path, remedy: str, place: str = "") -> None:
    """Compare a record with a shape.

    Raises:
        DataError: the first value of another type, by its place in the file, or a name that is missing.
    """
    if isinstance(shape, tuple):
        fits = isinstance(value, shape) and not (isinstance(value, bool) and int in shape and bool not in shape)
        fits = fits and not (isinstance(value, int) and abs(value) >= 2**63)  # more than a plot can show
        kind = " or ".join("null" if kind is NoneType else kind.__name__ for kind in shape)
    elif isinstance(shape, list) and shape[0] != "*":
        fits, kind = isinstance(value, list), "a list"
    else:
        fits, kind = isinstance(value, Mapping), "an object of named values"
    if not fits:
        raise DataError(f"{file}: `{place}` is {str(value)[:40]!r}, not {kind}; {remedy}")
    for name, inner, part in _inside(value, shape, file, remedy, place):
        check_shape(inner, part, file, remedy, f"{place}.{name}" if place else str(name))


def _inside(value: Any, shape: Any, file: Path, remedy: str, place: str) -> list[tuple[Any, Any, Any]]:
    """(name, value, shape) of what is to be compared below a value."""
    if isinstance(shape, tuple):
        return []
    if isinstance(shape, list):
        entries = value.items() if shape[0] == "*" else enumerate(value)
        return [(name, inner, shape[-1]) for name, inner in entries]
    found = []
    for name, part in shape.items():
        name, optional = name.removesuffix("?"), name.endswith("?")
        if value.get(name) is None and optional:
            continue
        if name not in value:
            raise DataError(f"{file} has no `{f'{place}.{name}' if place else name}`; {remedy}")
        found.append((name, value[name], part))
    return found


def check_result(result: Mapping[str, Any], file: Path, remedy: str) -> None:
    """Compare `result.json` with `RESULT`; every metric is a number or null.

    Raises:
        DataError: see `check_shape`.
    """
    check_shape(result, {**RESULT, **_metrics(result)}, file, remedy)


def check_results(results: Any, file: Path, remedy: str) -> None:
    """Compare `results.json` with `RESULTS`; every metric of a cell is a number or null.

    Raises:
        DataError: see `check_shape`.
    """
    check_shape(results, RESULTS, file, remedy)
    for number, cell in enumerate(results["cells"]):
        values = cell.get("values") or {}
        check_shape(values, _metrics(values), file, remedy, f"cells.{number}.values")
    if not results.get("table"):
        check_shape(results, {"columns": [(str,)]}, file, remedy)


def _metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _NUMBER for name in values if name.partition("/")[0] in ("before", "after", "train", "late")}
