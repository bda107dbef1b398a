"""Damage to bytes, text and trees of plain values. Edits are plain values themselves; places are shares of the whole, so
that an edit fits whatever it is applied to."""

from __future__ import annotations

import copy
import random
from typing import Any

from tests.fuzz.case import Edit

__all__ = [
    "HOSTILE_TEXT",
    "NONSENSE",
    "byte_damage",
    "damage_bytes",
    "damage_tree",
    "misspelt",
    "paths_of",
    "tree_damage",
    "value_at",
]

NONSENSE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 0.5, -0.5, 1e300, -1e300, 1e-320, 2**31, 2**63, 2**64 + 1, 10**30),
    *(float("nan"), float("inf"), float("-inf"), "", " ", "x", "nan", "0x10", "1e-4", "null", "True", "-"),
    *([], [[]], [1], ["x", 2], [None], {}, {"x": 1}, {"name": "x"}, {"": {}}, [{"a": [{"b": 1}]}]),
    *(
        "a" * 5000,
        "\u202e\u0000",
        "é\U0001f600",
        "../..",
        "<img src=x onerror=alert(1)>",
        "${NOT_SET}",
        "a: b: c",
        "%s{0}",
    ),
)
"""Values that are wrong in most places."""

HOSTILE_TEXT: tuple[str, ...] = (
    *("", " ", "\n", "\t", "\x00", "\x1b[31m", "\ufeff", "\u202e", "\ud800", "\U0001f600", "é" * 300, "a" * 100_000),
    *("```a\n" * 2000, "<answer>" * 2000, "{" * 3000, "[" * 3000, "(" * 3000, "\\" * 2000, "{{ x }}", "%s %d {0}"),
    *("<|endoftext|>", "</s>", "<script>alert(1)</script>", "'; DROP TABLE x; --", "${HOME}", "$(touch canary)"),
)
"""Texts that break readers."""


def misspelt(word: str, rng: random.Random) -> str:
    """A letter doubled, left out, replaced or swapped with the next."""
    place = rng.randrange(max(len(word) - 1, 1))
    letter = rng.choice("abcdefghijklmnopqrstuvwxyz_")
    return rng.choice([
        word[:place] + word[place : place + 1] * 2 + word[place + 1 :],
        word[:place] + word[place + 1 :],
        word[:place] + letter + word[place + 1 :],
        word[:place] + word[place + 1 : place + 2] + word[place : place + 1] + word[place + 2 :],
    ])  # fmt: skip


def byte_damage(rng: random.Random) -> Edit:
    """One edit of some bytes."""
    place = rng.random()
    return rng.choice([
        ("flip a bit", place, rng.randrange(8)),
        ("flip a bit", place, rng.randrange(8)),
        ("flip a bit", place, rng.randrange(8)),
        ("cut after", place),
        ("leave out", place, rng.choice([1, 2, 16, 100])),
        ("repeat", place, rng.choice([1, 2, 16, 100])),
        ("zero", place, rng.choice([1, 4, 64, 4096])),
        ("insert", place, rng.choice(["00", "ff", "7b", "22", "0a", "efbbbf", "c3"])),
        ("empty",),
        ("append", rng.choice(["00", "0a", "7b7d0a", "deadbeef"])),
    ])  # fmt: skip


def damage_bytes(content: bytes, edit: Edit) -> bytes:
    """`content` after one edit of `byte_damage`."""
    name, *values = edit
    place = int(values[0] * len(content)) if values and isinstance(values[0], float) else 0
    if name == "flip a bit" and content:
        return content[:place] + bytes([content[place] ^ (1 << values[1])]) + content[place + 1 :]
    if name == "cut after":
        return content[:place]
    if name == "leave out":
        return content[:place] + content[place + values[1] :]
    if name == "repeat":
        return content[:place] + content[place : place + values[1]] * 2 + content[place + values[1] :]
    if name == "zero":
        return content[:place] + bytes(len(content[place : place + values[1]])) + content[place + values[1] :]
    if name == "insert":
        return content[:place] + bytes.fromhex(values[1]) + content[place:]
    if name == "append":
        return content + bytes.fromhex(values[0])
    return b""


def paths_of(tree: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside mappings and lists, outer ones first."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = []
    for name, value in inner:
        found.append((*before, name))
        found += paths_of(value, (*before, name))
    return found


def value_at(tree: Any, path: tuple[Any, ...]) -> Any:
    """The value at a path of `paths_of`; None where an earlier edit took it away."""
    for name in path:
        try:
            tree = tree[name]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def tree_damage(rng: random.Random, tree: Any, values: tuple[Any, ...] = NONSENSE) -> Edit:
    """One edit of a tree: a value replaced, left out, repeated, or under a misspelt name."""
    paths = paths_of(tree)
    path = rng.choice(paths)
    if rng.random() < 0.5:  # lists of many rows would hide everything else
        path = rng.choice([other for other in paths if len(other) <= 2])
    kind = rng.choice(["set", "set", "set", "delete", "rename"])
    if kind == "rename" and isinstance(path[-1], str):
        return ("rename", path, misspelt(path[-1], rng))
    return ("set", path, rng.choice(values)) if kind == "set" else ("delete", path)


def damage_tree(tree: Any, edit: Edit) -> Any:
    """A copy of the tree after one edit of `tree_damage`."""
    name, path, *value = edit
    tree = copy.deepcopy(tree)
    parent = value_at(tree, path[:-1])
    last = path[-1]
    inside = last in parent if isinstance(parent, dict) else isinstance(parent, list) and last < len(parent)
    if name == "set" and (inside or isinstance(parent, dict)):
        parent[last] = value[0]
    elif inside and name == "delete":
        del parent[last]
    elif inside and name == "rename" and isinstance(parent, dict):
        parent[value[0]] = parent.pop(last)
    return tree
