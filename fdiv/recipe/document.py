"""Reading a recipe file: its values, line numbers, no duplicate keys, and the base that it `extends:`.

`extends: NAME` takes every key of a base recipe that the file does not state itself. NAME is a file, relative to the
folder of the one that names it, or a packaged recipe (`tofu/mini_base`). `merged_values` says how blocks merge.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from fdiv.errors import RecipeError
from fdiv.named import lookup, shown
from fdiv.recipe.yaml_text import load_yaml, parse_value

__all__ = [
    "Document",
    "compose",
    "is_replaced",
    "merged_values",
    "packaged_files",
    "parse_value",
    "place_of",
    "read_document",
    "read_text",
]

KeyPath = tuple[str, ...]
_MOST_BYTES = 1_000_000


@dataclass(frozen=True)
class Document:
    """A recipe file as read, its base merged in: the mapping, and where each key stands.

    `places` maps `("eval", "batch_size")` to `FILE, line 12`, FILE being the recipe or its base.
    """

    source: str
    values: dict[str, Any]
    places: dict[KeyPath, str]
    base: Path | None = None

    def where(self, path: KeyPath) -> str:
        """`FILE, line N` of a key, or of the nearest enclosing key that stands in a file."""
        return place_of(path, self.places, self.source)


def place_of(path: KeyPath, places: Mapping[KeyPath, str], source: str) -> str:
    """The place of a key, else of the nearest enclosing one that has a place, else the file."""
    for length in range(len(path), 0, -1):
        if path[:length] in places:
            return places[path[:length]]
    return source


def read_document(path: Path, base: str | None = None) -> Document:
    """Read a recipe file and merge the base that it `extends:`.

    Args:
        path: The file.
        base: The recipe to extend in place of the one that the file names (a row of a sweep). It may have a base too.

    Raises:
        RecipeError: not readable, not YAML, more than one document, not a mapping, a key twice; no such base, or a
            base that has a base.
    """
    document = _read_file(path)
    values = {key: value for key, value in document.values.items() if key != "extends"}
    places = {key: place for key, place in document.places.items() if key[0] != "extends"}
    name = base or document.values.get("extends")
    if name is None:
        return Document(document.source, values, places)
    file = _base(name, path, document.where(("extends",)))
    below = read_document(file) if base else _read_file(file)
    if below.values.get("extends") is not None:
        raise RecipeError(
            f"{below.where(('extends',))}: the base of {document.source} itself extends {below.values['extends']!r}; "
            "one level is allowed: write the keys out in one of the two"
        )
    # A `sweep:` block is one design: its parts are not taken from two files.
    left = {key: value for key, value in below.values.items() if key not in values or key != "sweep"}
    replaced = [key for key in places if key[0] == "sweep" or is_replaced(_at(left, key), _at(values, key))]
    kept = {
        key: place
        for key, place in below.places.items()
        if key[0] != "extends" and not any(key[: len(other)] == other for other in replaced)
    }
    return Document(document.source, merged_values(left, values), {**kept, **places}, file)


def merged_values(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of both mappings; the overlay's win.

    Two mappings under one key (`prepare:`, `eval:`) merge key by key in the same way, unless their `name` differs:
    another builder, evaluation or divergence has other keys, so the overlay's mapping stands alone. A list, a plain
    value and null replace what the base says; `eval: null` removes the block.
    """
    merged = {key: value for key, value in base.items() if key != "extends"}
    for key, value in overlay.items():
        merged[key] = value if is_replaced(merged.get(key), value) else merged_values(merged[key], value)
    return merged


def is_replaced(below: Any, value: Any) -> bool:
    """Whether an overlay's value takes the place of the base's, rather than being merged with it."""
    if not (isinstance(below, dict) and isinstance(value, dict)):
        return True
    return "name" in value and below.get("name") != value["name"]


def _at(values: Any, path: KeyPath) -> Any:
    """The value at a path; None where there is none."""
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _base(name: Any, path: Path, where: str) -> Path:
    """The file that `extends:` names: relative to the recipe's folder, else a packaged one."""
    if not isinstance(name, str):
        raise RecipeError(f"{where}: `extends` must be the name or file of one recipe, got {shown(name)}")
    for file in (path.parent / name, path.parent / f"{name}.yaml"):
        if os.path.isfile(file) and file.resolve() != path.resolve():
            return file
    return lookup(packaged_files(), name.removesuffix(".yaml"), "base of `extends`", where)


def packaged_files() -> dict[str, Path]:
    """Name → file of the recipes and bases that are installed with the package (`tiny/f_dpo`, `tofu/mini_base`)."""
    root = Path(str(resources.files("fdiv.recipes")))
    files = (file.relative_to(root) for file in sorted(root.rglob("*.yaml")))
    return {file.with_suffix("").as_posix(): root / file for file in files if file.parts[0] != "accelerate"}


def _read_file(path: Path) -> Document:
    """One file alone, `extends` among its values."""
    source, text = str(path), read_text(path)
    _, values, lines = compose(text, source)
    return Document(source, values, {key: f"{source}, line {line}" for key, line in lines.items()})


def read_text(path: Path) -> str:
    """The text of a recipe file.

    Raises:
        RecipeError: it cannot be read, is not UTF-8, or is far longer than a recipe.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise RecipeError(f"{path} has {path.stat().st_size} bytes: it is no recipe; data stands in other files")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"cannot read the recipe {path}: not UTF-8 text ({error.reason}); save it as UTF-8"
        ) from error


def compose(text: str, source: str) -> tuple[yaml.MappingNode, dict[str, Any], dict[KeyPath, int]]:
    """The node tree of a document, its mapping, and the line of every key.

    Raises:
        RecipeError: not YAML, more than one document, empty, not a mapping, a key twice.
    """
    lines: dict[KeyPath, int] = {}
    node, values = load_yaml(text, source, look=lambda node: _collect_lines(node, (), source, lines))
    if node is None:
        raise RecipeError(f"{source} is empty: a recipe is a mapping with at least `method:`")
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{source} must be a mapping of keys to values at the top level")
    return node, values, lines


def _collect_lines(node: yaml.Node, path: KeyPath, source: str, lines: dict[KeyPath, int]) -> None:
    """Fill `lines`; refuse duplicate and non-text keys."""
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _collect_lines(child, (*path, str(index)), source, lines)
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"{source}, line {line}: a key must be a word")
        here = (*path, key_node.value)
        if here in lines:
            raise RecipeError(
                f"{source}, line {line}: duplicate key {'.'.join(here)!r} "
                f"(first on line {lines[here]}); keep one of them"
            )
        if key_node.tag != "tag:yaml.org,2002:merge":
            lines[here] = line
        _collect_lines(value_node, here, source, lines)
