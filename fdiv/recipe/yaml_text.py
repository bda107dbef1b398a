"""YAML as recipes use it: the core types of YAML 1.2, within bounds that no recipe meets and a hostile file does.

PyYAML reads YAML 1.1, where `1e-4` is a string, `no` is False and `2024-01-01` is a date. A recipe means a number, the
word and the word. Aliases are counted at every place that they stand for, so that nine lines cannot mean a billion
values; whatever is refused is refused in one line, before a value is made.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from fdiv.errors import RecipeError

__all__ = ["CoreLoader", "load_yaml", "parse_value"]

_MOST_CHARACTERS, _MOST_VALUES, _MOST_LEVELS, _MOST_DIGITS = 100_000, 50_000, 60, 40
_NO_TEXT = re.compile("[\\0\\ud800-\\udfff]")  # no file name and no UTF-8 file can hold them
_TAG = "tag:yaml.org,2002:"


class CoreLoader(yaml.SafeLoader):
    """SafeLoader with the implicit types of the YAML 1.2 core schema."""

    yaml_implicit_resolvers: dict[str, list] = {}


for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9]*)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
):
    CoreLoader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))


def load_yaml(
    text: str,
    source: str,
    loader_class: type[yaml.SafeLoader] = CoreLoader,
    look: Callable[[yaml.Node], None] = lambda node: None,
) -> tuple[yaml.Node | None, Any]:
    """The node tree of one YAML document and its value; (None, None) where it is empty.

    Args:
        text: The document.
        source: Its file, for errors.
        loader_class: YAML 1.2's core types, or `yaml.SafeLoader` for the files of other tools.
        look: Called with the node tree before values are made, which writes out the `<<` in it.

    Raises:
        RecipeError: not YAML, more than one document, a tag, a control character, an alias inside what it stands for;
            or larger than a recipe is (characters, values with the aliases written out, levels, digits of a number).
    """
    if len(text) > _MOST_CHARACTERS:
        raise RecipeError(
            f"{source} has {len(text)} characters, and a recipe at most {_MOST_CHARACTERS}: keep data and long texts "
            "in files of their own"
        )
    try:
        loader = loader_class(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, None
            _Limits(loader, source).check(node)
            look(node)
            return node, loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise RecipeError(f"{source}: nested too deeply: a recipe has at most {_MOST_LEVELS} levels") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"{source}, line {line}: not valid YAML: the control character #x{error.character:02x}; remove it"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark else source
        raise RecipeError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error


class _Limits:
    """Counts a node tree, each node once, and refuses what is out of bounds."""

    def __init__(self, loader: yaml.SafeLoader, source: str) -> None:
        self.loader, self.source = loader, source
        self.counted: dict[int, tuple[int, int]] = {}  # node → values below it, levels; None while it is being counted
        self.open: set[int] = set()

    def check(self, node: yaml.Node) -> tuple[int, int]:
        """(values, levels) of a node with its aliases written out."""
        if id(node) in self.open:
            raise self._refusal(node, "an alias stands inside the value that it names, which has no end")
        if id(node) in self.counted:
            return self.counted[id(node)]
        if isinstance(node, yaml.ScalarNode):
            self._check_scalar(node)
            return 1, 0
        expected = "map" if isinstance(node, yaml.MappingNode) else "seq"
        if node.tag != _TAG + expected:
            raise self._tag_refused(node)
        self.open.add(id(node))
        children = [part for pair in node.value for part in pair] if expected == "map" else node.value
        found = [self.check(child) for child in children]
        self.open.discard(id(node))
        values, levels = 1 + sum(count for count, _ in found), 1 + max((depth for _, depth in found), default=0)
        if values > _MOST_VALUES:
            raise self._refusal(node, f"more than {_MOST_VALUES} values, with its aliases written out")
        if levels > _MOST_LEVELS:
            raise self._refusal(node, f"nested too deeply: a recipe has at most {_MOST_LEVELS} levels")
        self.counted[id(node)] = values, levels
        return values, levels

    def _check_scalar(self, node: yaml.ScalarNode) -> None:
        """A word or number without a tag (`!!str` may stand), and not longer than numbers are."""
        plain = node.style is None
        if node.tag not in (_TAG + "str", self.loader.resolve(yaml.ScalarNode, node.value, (plain, not plain))):
            raise self._tag_refused(node)
        if wrong := _NO_TEXT.search(node.value):
            raise self._refusal(node, f"the character #x{ord(wrong.group()):02x} in a text; remove it")
        if node.tag == _TAG + "int" and len(node.value) > _MOST_DIGITS:
            raise self._refusal(node, f"a number of {len(node.value)} digits")

    def _tag_refused(self, node: yaml.Node) -> RecipeError:
        shown = node.tag.replace(_TAG, "!!")[:80]
        return self._refusal(node, f"the tag {shown} is refused; write the value without a tag")

    def _refusal(self, node: yaml.Node, reason: str) -> RecipeError:
        return RecipeError(f"{self.source}, line {node.start_mark.line + 1}: not valid YAML in a recipe: {reason}")


def parse_value(text: str) -> Any:
    """One value given as text, as on the command line: `1e-4`, `true`, `[1, 2]`, `{name: alpha, alpha: 0.3}`, a word.

    Text that is not YAML (such as a prompt with a colon) is itself.
    """
    try:
        node, value = load_yaml(text, "command line")
    except RecipeError:
        return text
    if node is None or (isinstance(node, yaml.MappingNode) and not node.flow_style):
        return text  # `a: b` on a command line is a sentence; a mapping is written with braces
    return value
