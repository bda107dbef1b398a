"""Reading one YAML document: the YAML 1.2 core types, line numbers, and no duplicate keys.

PyYAML reads YAML 1.1, where `1e-4` is a string, `no` is False and `2024-01-01` is a date. A recipe means a number, the
word and the word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fdiv.errors import RecipeError

__all__ = ["Document", "parse_value", "read_document"]

KeyPath = tuple[str, ...]


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with the implicit types of the YAML 1.2 core schema."""

    yaml_implicit_resolvers: dict[str, list] = {}


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9]*)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


@dataclass(frozen=True)
class Document:
    """A recipe file as read: its mapping, and the line of every key (`("eval", "batch_size")` → 12)."""

    source: str
    values: dict[str, Any]
    lines: dict[KeyPath, int]

    def where(self, path: KeyPath) -> str:
        """`FILE, line N` of a key, or of the nearest enclosing key that stands in the file."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return f"{self.source}, line {self.lines[path[:length]]}"
        return self.source


def read_document(path: Path) -> Document:
    """Read a recipe file.

    Raises:
        RecipeError: not readable, not YAML, more than one document, not a mapping, a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    source = str(path)
    loader = _CoreLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise RecipeError(f"{source} is empty: a recipe is a mapping with at least `method:`")
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError(f"{source} must be a mapping of keys to values at the top level")
        lines: dict[KeyPath, int] = {}
        _collect_lines(node, (), source, lines)
        return Document(source, loader.construct_document(node), lines)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark else source
        raise RecipeError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    finally:
        loader.dispose()


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


def parse_value(text: str) -> Any:
    """One value given as text, as on the command line: `1e-4`, `true`, `[1, 2]`, `{name: alpha, alpha: 0.3}`, a word.

    Text that is not YAML (such as a prompt with a colon) is itself.
    """
    loader = _CoreLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return text
        if isinstance(node, yaml.MappingNode) and not node.flow_style:
            return text  # `a: b` on a command line is a sentence; a mapping is written with braces
        return loader.construct_document(node)
    except yaml.YAMLError:
        return text
    finally:
        loader.dispose()
