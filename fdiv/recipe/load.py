"""Finding a recipe, reading it, and laying the command line and the settings of a sweep over it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fdiv.catalog import METHODS
from fdiv.errors import RecipeError
from fdiv.named import lookup
from fdiv.recipe.document import Document, packaged_files, read_document
from fdiv.recipe.model import Recipe
from fdiv.recipe.overrides import KeyPath, parse_overrides, set_value
from fdiv.recipe.schema import CommandLineValue
from fdiv.recipe.variables import export_environment

__all__ = ["find_recipe", "is_base", "load_recipe", "packaged_recipes", "recipe_name"]


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
    path = Path(name)
    if path.is_file():
        return path
    plain = name.removeprefix("recipes/").removesuffix(".yaml")
    origin = f"no recipe file {name!r} and no packaged recipe of that name"
    try:
        return lookup(packaged_files(), plain, "recipe", origin)
    except RecipeError as error:
        raise RecipeError(f"{error} (list them with `fdiv recipes`)") from None


def recipe_name(path: Path) -> str:
    """`tiny/f_dpo` for a packaged recipe, the file's stem for another."""
    for name, file in packaged_files().items():
        if file.resolve() == path.resolve():
            return name
    return path.stem


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
    values = copy.deepcopy(document.values)
    origins = dict(document.places)
    layers = [(override, value, "command line") for override, value in parse_overrides(overrides)]
    layers += [(tuple(key.split(".")), value, "sweep") for key, value in (settings or {}).items()]
    for key, value, where in layers:
        set_value(values, key, value, where)
        origins.update({key[: depth + 1]: where for depth in range(len(key))})
    return _checked(recipe_name(path), document, values, origins)


def _checked(name: str, document: Document, values: dict[str, Any], origins: dict[KeyPath, str]) -> Recipe:
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
