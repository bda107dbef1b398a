"""Bounds of options, declared once, and the check of a dataclass against them.

A key of ours is declared where it stands, with `option` (`fdiv.training.config`); the keys that a config inherits from
transformers, TRL and PEFT are declared in `fdiv.bounds.inherited`. Without a declaration a number still has to be one:
no NaN, no infinity, nothing that float32 or a 64-bit integer cannot hold, no truth value.
"""

from __future__ import annotations

import operator
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any

from fdiv import errors, named

__all__ = ["Declaration", "check_fields", "declare", "fault"]

_HOLDS = {"above": operator.gt, "least": operator.ge, "below": operator.lt, "most": operator.le}
_WORDS = {"above": "above", "least": "at least", "below": "below", "most": "at most"}
_LARGEST_FLOAT, _LARGEST_INT = 3.4e38, 2**63 - 1


class Declaration(str):
    """The help text of an option, with its bounds: argparse takes every other metadata key for one of its own."""

    bounds: Mapping[str, float]
    choices: tuple[Any, ...]
    also: tuple[Any, ...]
    null: bool
    file: bool
    why: str

    @property
    def allowed(self) -> str:
        """The bounds in words: `above 0 and at most 1`."""
        if self.choices:
            return ("one of " if len(self.choices) > 1 else "") + ", ".join(map(str, self.choices))
        words = " and ".join(f"{_WORDS[name]} {limit:g}" for name, limit in self.bounds.items())
        return " or ".join([words, *map(str, self.also)])


def declare(
    help: str = "",
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    choices: Sequence[Any] | None = None,
    also: Sequence[Any] = (),
    null: bool = True,
    file: bool = False,
    why: str = "",
) -> Declaration:
    """A help text with its bounds.

    Args:
        help: what the option is, in a line, without a full stop; the bounds are added.
        above, least, below, most: bounds on a number: > above, ≥ least, < below, ≤ most.
        choices: the values it may have.
        also: values beside those within the bounds.
        null: whether None may stand where the type has it.
        file: a text is the name of a JSON file that exists, or JSON itself.
        why: a sentence for the error: why a value outside is refused, or what to do instead.
    """
    limits = {"above": above, "least": least, "below": below, "most": most}
    bounds = {name: limit for name, limit in limits.items() if limit is not None}
    plain = Declaration("")
    plain.bounds, plain.choices, plain.also = bounds, (), tuple(also)
    text = help.replace("%", "%%") + (f"; {plain.allowed}" if bounds else "") + "."
    declaration = Declaration(text)
    declaration.bounds, declaration.choices, declaration.also = bounds, tuple(choices or ()), tuple(also)
    declaration.null, declaration.file, declaration.why = null, file, why
    return declaration


_UNDECLARED = declare()


def check_fields(config: Any, inherited: Mapping[str, Declaration] | None = None) -> None:
    """Refuse every value of a dataclass that lies outside its declaration.

    None passes where the type allows it. A number must be finite, no bool and no text, and whole where the type is.

    Args:
        config: the dataclass.
        inherited: declarations of fields that do not carry one themselves.

    Raises:
        OptionError: `beta=-1.0: must be above 0`, for the first such key.
    """
    hints = _hints(type(config))
    for entry in fields(config):
        declared = entry.metadata.get("help")
        if not isinstance(declared, Declaration):
            declared = (inherited or {}).get(entry.name, _UNDECLARED)
        wrong = fault(getattr(config, entry.name, None), hints[entry.name], declared)
        if wrong:
            why = f". {declared.why}" if declared.why else ""
            raise errors.OptionError(
                f"{entry.name}={named.shown(getattr(config, entry.name))}: must be {wrong}{why}", key=entry.name
            )


@cache
def _hints(config: type) -> dict[str, tuple[type, ...]]:
    """The types that each field may have, a union taken apart."""
    return {
        name: typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
        for name, hint in typing.get_type_hints(config).items()
    }


def fault(value: Any, kinds: tuple[type, ...], declared: Declaration) -> str | None:
    """What `value` must be and is not; None where it is right.

    Args:
        value: of the option, as given. kinds: the types its annotation allows.
        declared: its bounds, choices and whether it may be null.
    """
    if value is None and NoneType in kinds:
        return None if declared.null else f"a number {declared.allowed}"
    if not isinstance(value, bool) and value in declared.also:
        return None
    if declared.choices:
        given = value if isinstance(value, (list, tuple)) else [value]
        return None if all(entry in declared.choices for entry in given) else declared.allowed
    if isinstance(value, (dict, list)) and not _finite_inside(value):
        return "without NaN and infinities"
    if declared.file and isinstance(value, str):
        known = value.lstrip().startswith("{") or value.startswith("${") or os.path.isfile(value)
        return None if known else "a mapping, or the name of an existing JSON file"
    numeric = int in kinds or float in kinds
    if numeric and isinstance(value, str) and str in kinds:
        readable = not declared.bounds or value.isdecimal() or value.lower() in ("none", "null")
        return None if readable else declared.allowed
    if not numeric:
        return None
    noun, kind = ("a finite number", Real) if float in kinds else ("a whole number", Integral)
    largest = _LARGEST_FLOAT if float in kinds else _LARGEST_INT
    if isinstance(value, bool) or not isinstance(value, kind) or not -largest <= value <= largest:
        return f"{noun} {declared.allowed}".rstrip()
    return None if all(_HOLDS[name](value, limit) for name, limit in declared.bounds.items()) else declared.allowed


def _finite_inside(value: Any) -> bool:
    """Whether every number in a nested value is one that float32 can hold."""
    if isinstance(value, (dict, list, tuple)):
        return all(map(_finite_inside, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or -_LARGEST_FLOAT <= value <= _LARGEST_FLOAT
