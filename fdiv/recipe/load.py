"""Finding a recipe, reading it, and laying the command line and the settings of a sweep over it."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fdiv.catalog import METHODS
from fdiv.errors import RecipeError
from fdiv.named import lookup, shown
from fdiv.recipe.document import Document, packaged_files, place_of, read_document
from fdiv.recipe.model import Recipe
from fdiv.recipe.overrides import KeyPath, parse_overrides, set_value
from fdiv.recipe.schema import CommandLineValue, read_words
from fdiv.recipe.sweep import SweepBlock, parse_sweep
from fdiv.recipe.variables import export_environment
from fdiv.secrets import learn

__all__ = ["find_recipe", "is_base", "load_cell", "load_recipe", "packaged_recipes", "read_sweep", "recipe_name"]


def packaged_recipes() -> dict[str, Path]:
    """Name → file of the recipes that are installed with the package (`tiny/f_dpo`), the bases left out."""
    return {name: file for name, file in packaged_files().items() if not is_base(name)}


def is_base(name: str) -> bool:
    """Whether a packaged file is a base, which recipes extend, and no run by itself: `tofu/base`, `tofu/mini_base`."""
    return name == "base" or name.endswith(("/base", "_base"))


def find_recipe(name: str) -> Path:
    """The file of a recipe given as a path or as the name of a packaged one.

    Raises:
        RecipeError: it is neither; the message names the nearest packaged recipe.
    """
    if os.path.isfile(name):
        return Path(name)
    if os.path.exists(name) and name not in packaged_files():
        kind = "a directory" if os.path.isdir(name) else "no regular file"
        raise RecipeError(f"the recipe {shown(name)} is {kind}; give a YAML file, or the name of a packaged recipe")
    plain = name.removeprefix("recipes/").removesuffix(".yaml")
    origin = f"no recipe file {shown(name)} and no packaged recipe of that name"
    try:
        return lookup(packaged_files(), plain, "recipe", origin)
    except RecipeError as error:
        raise RecipeError(f"{error} (list them with `fdiv recipes`)") from None


def recipe_name(path: Path) -> str:
    """`tiny/f_dpo` for a packaged recipe, the file's stem for another, the folder's name for an `experiment.yaml`."""
    for name, file in packaged_files().items():
        if file.resolve() == path.resolve():
            return name
    return path.resolve().parent.name if path.stem == "experiment" else path.stem


def load_recipe(
    source: str | Path, overrides: Sequence[str] = (), settings: Mapping[str, Any] | None = None
) -> Recipe:
    """Read and check a recipe.

    Args:
        source: A path, or the name of a packaged recipe.
        overrides: Command-line words, `["--learning_rate", "1e-5", "--eval.batch_size", "8"]`.
        settings: Values that win over both, by dotted key (a cell of a sweep).

    Raises:
        RecipeError: anything that is wrong with them, in one line that names the key, its place and the remedy.
    """
    path = find_recipe(str(source))
    document = read_document(path)
    return _laid_over(recipe_name(path), document, overrides, settings or {})


def load_cell(
    source: str | Path,
    base: str | None,
    overrides: Sequence[str],
    settings: Mapping[str, Any],
    places: Mapping[str, str],
) -> Recipe:
    """`load_recipe` of one cell of a sweep.

    Args:
        source: The recipe with the `sweep:` block, which the cell does not get.
        base: The recipe that the cell's row extends; None: that of `source`.
        overrides: Command-line words.
        settings: Values of the cell, by dotted key.
        places: Where a setting stands, for those that stand in a file.
    """
    path = find_recipe(str(source))
    document = read_document(path, base)
    values = {key: value for key, value in document.values.items() if key not in ("sweep", "report")}
    kept = [word for option in _options(overrides) if not option[0].startswith("--sweep") for word in option]
    return _laid_over(recipe_name(path), dataclasses.replace(document, values=values), kept, settings, places)


def read_sweep(source: str | Path, overrides: Sequence[str] = ()) -> tuple[str, dict[str, Any], SweepBlock]:
    """What a file says to a sweep, whether or not it is a run by itself.

    Returns:
        The recipe's name; its values, the command line laid over; the `sweep:` block.
    """
    path = find_recipe(str(source))
    document = read_document(path)
    values, origins = _layers(document, overrides, {})
    block = read_words(values.get("sweep"))
    if block is not None and not isinstance(block, dict):
        raise RecipeError(f"{document.where(('sweep',))}: `sweep:` must be a mapping of keys, got {shown(block)}")
    return recipe_name(path), values, parse_sweep(block or {}, lambda key: place_of(key, origins, document.source))


def _options(words: Sequence[str]) -> list[list[str]]:
    """`["--a", "1", "2", "--b"]` → `[["--a", "1", "2"], ["--b"]]`."""
    options: list[list[str]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            options.append([word])
        elif options:
            options[-1].append(word)
    return options


def _layers(
    document: Document, overrides: Sequence[str], settings: Mapping[str, Any], places: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """The document's values with the command line and the settings laid over, and where each key stands."""
    values = copy.deepcopy(document.values)
    origins = dict(document.places)
    layers = [(override, value, "command line") for override, value in parse_overrides(overrides)]
    where = places or {}
    layers += [(tuple(key.split(".")), value, where.get(key, "sweep")) for key, value in settings.items()]
    for key, value, origin in layers:
        set_value(values, key, value, origin)
        origins.update({key[: depth + 1]: origin for depth in range(len(key))})
    return values, origins


def _laid_over(
    name: str,
    document: Document,
    overrides: Sequence[str],
    settings: Mapping[str, Any],
    places: Mapping[str, str] | None = None,
) -> Recipe:
    values, origins = _layers(document, overrides, settings, places)
    learn(read_words(values))
    export_environment(values.get("env"), document.source)
    if "extends" in values:
        raise RecipeError(f"{origins[('extends',)]}: `extends` is a key of a recipe file; write it there")
    where = origins.get(("method",), document.source)
    if "method" not in values:
        raise RecipeError(
            f"{document.source}: no `method:`; it is one of {', '.join(sorted(METHODS))}; a base without one runs "
            "through a recipe that `extends:` it"
        )
    if isinstance(values["method"], CommandLineValue):
        values["method"] = values["method"].read()
    METHODS.find(values["method"], where, error=RecipeError)

    from fdiv.recipe.check import check_recipe  # imports the method's config, hence TRL

    return check_recipe(name, document.source, values, origins)
