"""The whole text of a recipe that extends a base: one YAML document with the comments of both files.

`fdiv recipes NAME` prints it and `--copy` writes it, so that what a user changes needs no other file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fdiv.errors import RecipeError
from fdiv.recipe.document import compose, is_replaced, merged_values, read_document, read_text

__all__ = ["whole_text"]


def whole_text(path: Path) -> str:
    """The recipe at `path` with the keys of its base written out; the file itself where it extends nothing.

    Order: the comments at the top of the recipe and of its base, the keys that only the recipe has, the base's keys.
    Each key keeps the comment above it in the file that its value comes from.
    """
    document = read_document(path)
    if document.base is None:
        return read_text(path)
    overlay_head, overlay = _read(path)
    base_head, base = _read(document.base)
    head = [*overlay_head, "#", *base_head, ""] if base_head else [*overlay_head, ""]
    lines = _merged(base, overlay)
    while lines and not lines[0].strip():
        lines.pop(0)
    text = "\n".join([*head, *lines]) + "\n"
    if not _says(text, document.values):  # the files use anchors
        text = "\n".join(head) + "\n" + yaml.safe_dump(document.values, sort_keys=False, allow_unicode=True)
    return text


def _says(text: str, values: dict[str, Any]) -> bool:
    """Whether a text is a document with these values."""
    try:
        return compose(text, "")[1] == values
    except RecipeError:
        return False


class _Mapping(NamedTuple):
    """A block mapping in a file: its node, its values, and its lines `first` to `last` (exclusive)."""

    node: yaml.MappingNode
    values: dict[str, Any]
    lines: list[str]
    first: int
    last: int


class _Part(NamedTuple):
    """One key of a mapping: `start` is the first comment or blank line above it, `line` its own, `end` exclusive."""

    value: yaml.Node
    lines: list[str]
    start: int
    line: int
    end: int

    def mapping(self, values: Any) -> _Mapping | None:
        """What is inside, if it is a block mapping."""
        if not isinstance(self.value, yaml.MappingNode) or self.value.flow_style:
            return None
        return _Mapping(self.value, values, self.lines, self.line + 1, self.end)


def _read(path: Path) -> tuple[list[str], _Mapping]:
    """The comment at the top of a file, and its mapping."""
    text = read_text(path)
    node, values, _ = compose(text, str(path))
    lines = [line.rstrip() for line in text.splitlines()]
    first = 0
    while lines[first].startswith("#"):
        first += 1
    return lines[:first], _Mapping(node, values, lines, first, len(lines))


def _parts(mapping: _Mapping) -> dict[str, _Part]:
    """The keys of a mapping with their lines."""
    keys = [(key.value, value, key.start_mark.line) for key, value in mapping.node.value]
    starts = []
    above = mapping.first
    for _, _, line in keys:
        start = line
        while start > above and (not mapping.lines[start - 1] or mapping.lines[start - 1].lstrip().startswith("#")):
            start -= 1
        starts.append(start)
        above = line + 1
    ends = [*starts[1:], mapping.last]
    return {
        name: _Part(value, mapping.lines, start, line, end)
        for (name, value, line), start, end in zip(keys, starts, ends, strict=True)
    }


def _merged(base: _Mapping, overlay: _Mapping) -> list[str]:
    """The lines of `merged_values(base, overlay)`, indented as in the base."""
    below, own = _parts(base), _parts(overlay)
    shift = base.node.start_mark.column - overlay.node.start_mark.column
    lines: list[str] = []
    for name, part in own.items():
        if name not in below and name != "extends":
            lines += _shifted(part.lines[part.start : part.end], shift)
    for name, part in below.items():
        if name not in own:
            lines += part.lines[part.start : part.end]
            continue
        values = base.values.get(name), overlay.values.get(name)
        inner = part.mapping(values[0]), own[name].mapping(values[1])
        if not is_replaced(*values):
            head = part.lines[part.start : part.line]
            if inner[0] and inner[1]:
                lines += [*head, part.lines[part.line], *_merged(*inner)]
            else:  # braces: the merged block without the comments inside
                block = yaml.safe_dump({name: merged_values(*values)}, sort_keys=False, allow_unicode=True)
                lines += [*head, *_shifted(block.splitlines(), base.node.start_mark.column)]
            continue
        stated = _shifted(own[name].lines[own[name].start : own[name].end], shift)
        spaced = "" in part.lines[part.start : part.line]  # a blank line stands above the key in the base
        lines += ([""] if spaced else []) + [line for line in stated if line]
    return lines


def _shifted(lines: list[str], by: int) -> list[str]:
    """The lines moved to the right by `by` columns, or to the left."""
    return [" " * by + line if by > 0 and line else line[-by if by < 0 else 0 :] for line in lines]
