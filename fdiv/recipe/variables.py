"""Environment variables in recipes: `${NAME}` at the start of a path, and the `env:` mapping."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from fdiv.errors import RecipeError
from fdiv.recipe.schema import CommandLineValue

__all__ = ["VARIABLE", "export_environment", "interpolate", "texts"]

VARIABLE = re.compile(r"^\$\{(\w+)\}")


def export_environment(variables: Any, source: str) -> None:
    """Set the `env:` mapping of a recipe, as TRL does; before TRL is imported, so that the libraries see it."""
    if variables is None:
        return
    if not isinstance(variables, dict):
        raise RecipeError(f"{source}: `env` must be a mapping of environment variables to values")
    for name, value in variables.items():
        os.environ[str(name)] = str(value.read() if isinstance(value, CommandLineValue) else value)


def interpolate(values: Any, variables: Mapping[str, str], prefix: str, source: str) -> Any:
    """Replace a leading `${NAME}` in every text of a nested value, by `variables` first, then by the environment.

    Raises:
        RecipeError: the variable is not set; the message names it and the flag that can be given instead.
    """
    if isinstance(values, dict):
        return {key: interpolate(value, variables, f"{prefix}{key}.", source) for key, value in values.items()}
    if isinstance(values, list):
        return [interpolate(value, variables, prefix, source) for value in values]
    match = VARIABLE.match(values) if isinstance(values, str) else None
    if not match:
        return values
    name, key = match.group(1), prefix.rstrip(".")
    if name in variables:
        return variables[name] + values[match.end() :]
    if name == "prepare":
        raise RecipeError(f"{source}: {key!r} uses ${{prepare}}, but the recipe has no `prepare:` block")
    if name not in os.environ:
        raise RecipeError(
            f"{source}: {key!r} uses ${{{name}}}, an environment variable that is not set; export {name}=DIRECTORY, "
            f"or give --{key} PATH"
        )
    return os.environ[name] + values[match.end() :]


def texts(values: Any) -> list[str]:
    """Every text inside a nested value."""
    if isinstance(values, str):
        return [values]
    inner = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
    return [text for value in inner for text in texts(value)]
