"""`fdiv methods`, `fdiv divergences` and `fdiv recipes`."""

from __future__ import annotations

import inspect
import json
import math
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from fdiv.catalog import METHODS
from fdiv.errors import RecipeError
from fdiv.recipe.document import packaged_files, parse_value, read_document
from fdiv.recipe.load import find_recipe, is_base, packaged_recipes
from fdiv.recipe.whole import whole_text
from fdiv.terminal import number, print_table

__all__ = ["computed_tables", "divergences", "methods", "recipes"]

_RATIOS, _MORE_RATIOS = (0.1, 10.0), (0.01, 0.1, 1.0, 10.0, 100.0)  # density ratios whose weight t·f''(t) is shown
_EXAMPLE = 0.5  # any value inside (0, 1): limits that depend on the parameter are shown as formulas by `NAME`


def methods() -> int:
    """Every method with its title, its paper and the divergences that it is defined for."""
    notes = [
        f"Divergences with a parameter are checked at {_EXAMPLE}. `fdiv divergences NAME` says why one is refused.",
        "A method of your own: `method: module:TrainerClass` in a recipe.",
    ]
    columns = ("name", "title", "paper", "divergences")
    print_table("Methods", columns, _written("methods"), notes, text_columns=(0, 1, 2, 3))
    return 0


def divergences(spec: str | None) -> int:
    """The registry as a table, or one entry in full."""
    if spec is not None:
        from fdiv.divergences import get_distance

        try:
            return _one_divergence(get_distance(_with_example(parse_value(spec))))
        except (ValueError, TypeError) as error:
            raise RecipeError(str(error)) from error
    weights = [f"t·f'' at {t:g}" for t in _RATIOS]
    columns = ("name", "parameters", "f''(1)", "f'(0)", "f'(inf)", *weights, "aliases")
    notes = [
        f"Limits that depend on a parameter are those at {_EXAMPLE}. `fdiv divergences NAME` shows one in full, with "
        "the methods that refuse it and why; `fdiv methods` says for every method which it takes.",
        "t·f''(t) is the weight of a sample with density ratio t = policy/reference: which samples f listens to.",
        "cauchy_schwarz and gated have no f: they compare whole next-token distributions (f_distill, to_teacher).",
    ]
    rows = _written("divergences")
    print_table("Divergences D_f(policy ‖ reference)", columns, rows, notes, text_columns=(0, 1, 5 + len(_RATIOS)))
    return 0


def _written(table: str) -> list[list[str]]:
    """The rows of a table from `tables.json`: computing them imports torch, and TRL for the methods."""
    return json.loads(resources.files("fdiv.cli").joinpath("tables.json").read_text(encoding="utf-8"))[table]


def computed_tables() -> dict[str, list[list[str]]]:
    """The rows of `fdiv methods` and `fdiv divergences`, from the classes; `make tables` writes them down."""
    from fdiv.divergences import get_distance, get_divergence, list_distances, list_divergences
    from fdiv.divergences.registry import EXAMPLES, aliases_of, distance_parameters, parameters_of

    entries = {
        name: get_divergence({"name": name, **dict.fromkeys(parameters_of(name), _EXAMPLE)})
        for name in list_divergences()
    }
    rows: dict[str, list[list[str]]] = {"methods": [], "divergences": []}
    for name in METHODS:
        method = METHODS.find(name)
        refused = [other for other, entry in entries.items() if _refusal(method, entry)]
        valid = "–" if method.check_divergence is None else "all" if not refused else f"all but {', '.join(refused)}"
        without_f = [other for other in list_distances() if not _refusal(method, get_distance(EXAMPLES[other]))]
        if method.check_divergence is not None and without_f:
            valid += f", and {', '.join(without_f)}"
        rows["methods"].append([name, method.title, method.paper, valid])
    for name, entry in entries.items():
        limits = (_curvature(entry), entry.derivative_at_zero, entry.slope_at_infinity)
        weights = [_density_weight(entry, t) for t in _RATIOS]
        shown = [_limit_or_dash(limit) for limit in (*limits, *weights)]
        rows["divergences"].append([name, ", ".join(parameters_of(name)), *shown, ", ".join(aliases_of(name))])
    for name in list_distances():
        dashes = ["–"] * (3 + len(_RATIOS))
        rows["divergences"].append([name, ", ".join(distance_parameters(name)), *dashes, ""])
    return rows


def _with_example(spec: Any) -> Any:
    """A bare name with parameters gets example values, so that it can be shown."""
    from fdiv.divergences import list_divergences
    from fdiv.divergences.registry import EXAMPLES, parameters_of

    if isinstance(spec, str) and spec in EXAMPLES:
        return EXAMPLES[spec]
    if isinstance(spec, str) and spec in list_divergences():
        return {"name": spec, **dict.fromkeys(parameters_of(spec), _EXAMPLE)}
    return spec


def _one_divergence(entry: Any) -> int:
    from fdiv.divergences import Divergence, list_divergences
    from fdiv.divergences.registry import aliases_of

    if not isinstance(entry, Divergence):
        return _show(entry, [("f(t)", "– (a value for whole distributions)"), ("valid for", _valid_for(entry))])
    at_zero, curvature = entry.at_zero, _curvature(entry)
    rows = [
        ("f''(1)", "– (total variation has a corner there)" if curvature is None else _limit(curvature)),
        ("f(0)", _limit(at_zero)),
        ("f'(0)", _limit(entry.derivative_at_zero)),
        ("f'(inf)", _limit(entry.slope_at_infinity)),
        ("t·f''(t)", ", ".join(f"{_limit_or_dash(_density_weight(entry, t))} at t = {t:g}" for t in _MORE_RATIOS)),
        ("conjugate domain", " to ".join(_limit(bound) for bound in entry.conjugate_domain)),
        ("valid for", _valid_for(entry)),
    ]
    if entry.name in list_divergences():
        rows.append(("aliases", ", ".join(aliases_of(entry.name)) or "–"))
    return _show(entry, rows)


def _show(entry: Any, rows: list[tuple[str, str]]) -> int:
    """The table of one member, with the methods that refuse it, and its docstring."""
    for name in METHODS:
        reason = _refusal(METHODS.find(name), entry)
        if reason:
            rows.append((f"not for {name}", reason))
    print_table(entry.label, ("", ""), rows, text_columns=(0, 1))
    sys.stdout.write((inspect.getdoc(entry) or "") + "\n")
    return 0


def _curvature(entry: Any) -> float | None:
    try:
        return float(entry.curvature)
    except ValueError:  # total variation: the second derivative does not exist
        return None


def _density_weight(entry: Any, t: float) -> float | None:
    import torch

    try:
        return entry.density_weight(torch.tensor(math.log(t), dtype=torch.float64)).item()
    except ValueError:  # total variation
        return None


def _limit_or_dash(value: float | None) -> str:
    return "–" if value is None else _limit(value)


def _limit(value: Any) -> str:
    value = float(value)
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return number(value)


def _refusal(method: Any, entry: Any) -> str | None:
    """Why a method refuses a divergence; None where it does not."""
    if method.check_divergence is None:
        return None
    try:
        method.check_divergence(entry)
    except ValueError as error:
        return str(error)
    return None


def _valid_for(entry: Any) -> str:
    found = {name: METHODS.find(name) for name in METHODS}
    valid = [name for name, method in found.items() if method.check_divergence and not _refusal(method, entry)]
    return ", ".join(valid) or "–"


def recipes(name: str | None, copy_to: str | None, method: str | None) -> int:
    """List the packaged recipes; show or copy one; list the valid keys."""
    if method is not None:
        return _keys(method)
    if name is None:
        if copy_to is not None:
            raise RecipeError("--copy needs the name of a recipe: fdiv recipes NAME --copy TO")
        rows = [(name, *_headline(path)) for name, path in packaged_recipes().items()]
        bases = ", ".join(base for base in packaged_files() if is_base(base))
        notes = ["Run one: fdiv run NAME", f"Bases, which a recipe of yours may extend too (`extends: NAME`): {bases}"]
        print_table("Packaged recipes", ("name", "method", "what it does"), rows, notes, text_columns=(0, 1, 2))
        return 0
    path = find_recipe(name)
    if copy_to is None:
        sys.stdout.write(whole_text(path))
        return 0
    target = Path(copy_to)
    target = target / path.name if target.is_dir() else target
    if target.exists():
        raise RecipeError(f"{target} exists and is left alone; give another --copy")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(whole_text(path), encoding="utf-8")
    sys.stdout.write(f"{target}\n")
    return 0


def _headline(path: Path) -> tuple[str, str]:
    """The method, and the first comment line of a recipe."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    headline = first.lstrip("# ").rstrip() if first.startswith("#") else ""
    return str(read_document(path).values.get("method", "–")), headline


def _keys(name: str) -> int:
    """Every key of a recipe for a method, its own first, by group: type, choices, default, help and bounds."""
    from fdiv.files import plain
    from fdiv.recipe.check import all_keys
    from fdiv.recipe.schema import type_name

    method = METHODS.find(name, "--keys", error=RecipeError)
    group = None
    for path, key in sorted(all_keys(method), key=lambda entry: not entry[1].own):  # stable: the groups stay together
        heading = f"{key.group}, the method's own keys" if key.own else key.group
        if heading != group:
            group = heading
            sys.stdout.write(f"\n# {group}\n")
        default = "required" if key.required else plain(key.default)
        text = " ".join(key.help.replace("%%", "%").split())
        choices = f", one of {', '.join(map(str, key.choices))}" if key.choices else ""
        sys.stdout.write(f"{path}: {type_name(key.type)}{choices}; default {default!r}. {text}\n")
    return 0
