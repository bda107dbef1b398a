"""Command-line overrides (`--learning_rate 1e-5 --eval.batch_size 8 --no_bf16`) laid over a recipe's values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fdiv.errors import RecipeError
from fdiv.recipe.schema import CommandLineValue

__all__ = ["parse_overrides", "set_value"]

KeyPath = tuple[str, ...]


def parse_overrides(words: Sequence[str]) -> list[tuple[KeyPath, CommandLineValue]]:
    """`["--eval.batch_size", "8", "--bf16=false"]` → `[(("eval", "batch_size"), 8), (("bf16",), false)]`, unread.

    Raises:
        RecipeError: a word stands before the first `--key`.
    """
    overrides: list[tuple[KeyPath, CommandLineValue]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            path = tuple(name.replace("-", "_").split("."))
            overrides.append((path, CommandLineValue([value] if equals else [])))
        elif overrides:
            overrides[-1][1].words.append(word)
        else:
            raise RecipeError(f"command line: unexpected {word!r}; overrides are written --key value")
    return overrides


def set_value(values: dict[str, Any], path: KeyPath, value: Any, where: str) -> None:
    """Set one key, nested by `path`, in place. A list is indexed by number; a plain name (`divergence: alpha`) that
    gets a parameter becomes a mapping (`{name: alpha, alpha: 0.3}`).

    Raises:
        RecipeError: part of the path is not a mapping, or an index is outside its list.
    """
    node: Any = values
    for depth, name in enumerate(path[:-1]):
        child = _get(node, name, path[: depth + 1], where)
        if isinstance(child, CommandLineValue):
            child = child.read()
        if child is None:
            child = {}
        elif isinstance(child, str):
            child = {"name": child}
        elif not isinstance(child, (dict, list)):
            raise RecipeError(f"{where}: {'.'.join(path)!r}: {'.'.join(path[: depth + 1])!r} holds a value, no keys")
        _put(node, name, child)
        node = child
    _get(node, path[-1], path, where)
    _put(node, path[-1], value)


def _get(node: Any, name: str, path: KeyPath, where: str) -> Any:
    if isinstance(node, dict):
        return node.get(name)
    if not name.isdigit() or int(name) >= len(node):
        raise RecipeError(
            f"{where}: {'.'.join(path)!r}: the block is a list of {len(node)}; use a number from 0 to {len(node) - 1}"
        )
    return node[int(name)]


def _put(node: Any, name: str, value: Any) -> None:
    node[name if isinstance(node, dict) else int(name)] = value
