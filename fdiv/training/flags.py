"""Command-line flags from a dataclass whose fields are `option`s: one a field, with its name, help and default."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Callable, Collection
from typing import Any

from fdiv.errors import RecipeError

__all__ = ["add_flags", "config_of"]


def add_flags(parser: argparse.ArgumentParser, config: type, required: Collection[str] = ()) -> None:
    """A flag for every field of `config`; what is not given is absent from the namespace, but for the required ones.

    A truth value is a switch, a list takes several words, a mapping is YAML, all else is a number or text.
    """
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        text, hint = field.metadata["help"], hints[field.name]
        if hint is bool:
            parser.add_argument(f"--{field.name}", action="store_true", help=text)
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        many = typing.get_origin(hint) is list
        words = " ".join(map(str, default)) if many else default
        shown = "" if field.name in required or words is None or words == "" else f" ({words})"
        parser.add_argument(
            f"--{field.name}",
            type=_reader(typing.get_args(hint)[0] if many else hint),
            nargs="+" if many else None,
            default=argparse.SUPPRESS,
            required=field.name in required,
            choices=field.metadata.get("choices"),
            help=text + shown,
        )


def config_of(config: type, args: argparse.Namespace) -> Any:
    """The config of the flags that were given.

    Raises:
        RecipeError: a value that it refuses.
    """
    names = {field.name for field in dataclasses.fields(config)}
    try:
        return config(**{name: value for name, value in vars(args).items() if name in names})
    except ValueError as error:
        first = str(error).split("=")[0].split(" ")[0]
        raise RecipeError(f"--{error}" if first in names else str(error)) from None


def _reader(hint: Any) -> Callable[[str], Any]:
    """How a word is read: numbers as numbers, mappings as YAML, all else as text."""
    from fdiv.recipe.document import parse_value

    options = typing.get_args(hint) or (hint,)
    if Any in options or any(typing.get_origin(option) is dict for option in options):
        return lambda word: parse_value(word) if word.lstrip().startswith("{") else word
    return next((kind for kind in (int, float) if kind in options and str not in options), str)
