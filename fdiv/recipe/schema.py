"""The keys a recipe may hold, their types, and what a value must look like to become one of that type.

A section of the schema is made from a dataclass; the blocks `prepare:` and `eval:` choose theirs by `name`. Values are
coerced from what YAML or a command line gives (`"1e-4"` is a number where a number is due) and refused in one line
where that is impossible.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union

from fdiv.errors import RecipeError
from fdiv.named import hint, nearest, shown
from fdiv.recipe.choices import fixed_choices
from fdiv.recipe.yaml_text import parse_value

__all__ = [
    "CommandLineValue",
    "Key",
    "Section",
    "coerce",
    "method_config",
    "nearest_key",
    "read_words",
    "section_of",
    "trl_configs",
    "type_name",
]

_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


_TOO_LARGE = 2**64  # for a whole number; seeds go up to it


@dataclass(frozen=True)
class Key:
    """One valid key: its type (a typing hint), default, help text, allowed values, and where it comes from."""

    name: str
    type: Any
    default: Any
    help: str = ""
    choices: tuple[Any, ...] | None = None
    group: str = ""
    own: bool = False  # declared with `option` (fdiv.training.config), so a key of ours and not of TRL
    why: str = ""  # why no other value: such an option may say so

    @property
    def required(self) -> bool:
        """Whether the key has no default."""
        return self.default is dataclasses.MISSING


@dataclass(frozen=True)
class Section:
    """The keys of the top level (`title` is empty) or of one block."""

    title: str
    keys: dict[str, Key]


@dataclass
class CommandLineValue:
    """The words that followed `--key`, not read yet: what they mean depends on the type of the key."""

    words: list[str] = field(default_factory=list)

    def read(self) -> Any:
        """The words as YAML values, without a type to go by."""
        if not self.words:
            return True
        return parse_value(self.words[0]) if len(self.words) == 1 else [parse_value(word) for word in self.words]


def read_words(value: Any) -> Any:
    """A value with the command-line words anywhere inside it read as YAML."""
    if isinstance(value, CommandLineValue):
        return value.read()
    if isinstance(value, dict):
        return {key: read_words(entry) for key, entry in value.items()}
    return [read_words(entry) for entry in value] if isinstance(value, list) else value


def section_of(config: type, title: str = "", skip: Iterable[str] = ()) -> Section:
    """The keys of a dataclass (those of its `__init__`), with types resolved."""
    hints = typing.get_type_hints(config)
    keys = {}
    for entry in dataclasses.fields(config):
        if not entry.init or entry.name in set(skip):
            continue
        default = entry.default
        if default is dataclasses.MISSING and entry.default_factory is not dataclasses.MISSING:
            default = entry.default_factory()
        choices = entry.metadata.get("choices") or fixed_choices(config, entry.name)
        keys[entry.name] = Key(
            name=entry.name,
            type=hints[entry.name],
            default=default,
            help=str(entry.metadata.get("help", "")),
            choices=tuple(choices) if choices else None,
            group=title or config.__name__,
            own=hasattr(entry.metadata.get("help"), "bounds"),
            why=getattr(entry.metadata.get("help"), "why", ""),
        )
    return Section(title, keys)


def nearest_key(name: str, section: Section, others: Callable[[], Iterator[tuple[str, Key]]]) -> str | None:
    """The valid key most like `name`: first in its own section, then in the whole schema, as a dotted path."""
    matches = nearest(name, section.keys, cutoff=0.7)
    prefix = f"{section.title}." if section.title else ""
    if matches:
        return prefix + matches[0]
    whole: dict[str, str] = {}
    for path, key in others():
        whole.setdefault(key.name, path)
        whole.setdefault(path, path)
    matches = nearest(name, whole)
    if matches:
        return whole[matches[0]]
    matches = nearest(name, section.keys)
    return prefix + matches[0] if matches else None


def type_name(hint: Any) -> str:
    """A type as a person would say it: `number`, `list of words`, `true or false`."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}
    if hint in names:
        return names[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_name(option) for option in _options(hint)))
    if origin is Literal:
        return " or ".join(str(argument) for argument in arguments)
    if hint is list or origin in (list, tuple):
        return "a list" if not arguments else f"a list of {type_name(arguments[0]).removeprefix('a ')}"
    if origin is dict:
        return "a mapping"
    if hint in (type(None), None):
        return "null"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return " or ".join(str(member.value) for member in hint)
    if isinstance(hint, type) and issubclass(hint, Path):
        return "a path"
    return getattr(hint, "__name__", str(hint))


def coerce(value: Any, key: Key, where: str) -> Any:
    """`value` as the type of `key`.

    Raises:
        RecipeError: it is not, and cannot be read as, that type; or it is none of the key's choices.
    """
    said = value
    if isinstance(value, CommandLineValue):
        said = " ".join(value.words) if value.words else "nothing"
        value = _read_command_line(value, key, where)
    matched, result = _convert(value, key.type)
    if not matched:
        members = _members(key.type)
        due = f"one of {len(members)} names; {hint(value, members)}" if members else type_name(key.type)
        raise RecipeError(f"{where}: {key.name!r} must be {due}, got {shown(said)}")
    entries = result if isinstance(result, list) else [result]
    if key.choices and any(entry is not None and entry not in key.choices for entry in entries):
        allowed = ", ".join(dict.fromkeys(str(choice) for choice in key.choices))
        why = f". {key.why}" if key.why else ""
        raise RecipeError(f"{where}: {key.name!r} must be one of {allowed}, got {shown(said)}{why}")
    return result


def _members(hint: Any) -> list[str]:
    """The values of an enum, alone or in a union; empty for another type."""
    kinds = [kind for kind in _options(hint) if isinstance(kind, type) and issubclass(kind, enum.Enum)]
    return [str(member.value) for kind in kinds for member in kind]


def _read_command_line(value: CommandLineValue, key: Key, where: str) -> Any:
    """Words to a value: raw text where text is due, YAML elsewhere; no word is `true` for a switch."""
    options = _options(key.type)
    if key.type is Any:
        return value.read()
    if not value.words:
        if bool in options:
            return True
        raise RecipeError(f"{where}: --{key.name} needs a value: {type_name(key.type)}")
    wants_list = any(option is list or typing.get_origin(option) in (list, tuple) for option in options)
    if len(value.words) > 1 and not wants_list:
        raise RecipeError(
            f"{where}: --{key.name} takes one value, got {shown(' '.join(value.words))}; quote a value that has spaces"
        )
    if wants_list and len(value.words) > 1:
        return [parse_value(word) for word in value.words]
    word = value.words[0]
    text_only = str in options and not any(_is_structured(option) for option in options)
    if text_only and not (type(None) in options and word in ("null", "~")):
        return word
    return parse_value(word)


def _is_structured(option: Any) -> bool:
    return option in (bool, int, float, dict, list) or typing.get_origin(option) in (dict, list, tuple)


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself. Text beside an enum is the text of one of its members."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    has_enum = any(isinstance(option, type) and issubclass(option, enum.Enum) for option in options)
    return tuple(option for option in options if option is not str) if has_enum else options


def _convert(value: Any, hint: Any) -> tuple[bool, Any]:
    """(whether it fits, the value as `hint`). In a union the exact type wins over a conversion, text comes last."""
    options = _options(hint)
    if len(options) == 1:
        return _convert_to(value, options[0])
    for option in options:
        if isinstance(option, type) and type(value) is option:
            return True, value
    for option in sorted(options, key=lambda option: option is str):
        matched, result = _convert_to(value, option)
        if matched:
            return True, result
    return False, value


def _convert_to(value: Any, hint: Any) -> tuple[bool, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True, value
    if hint in (type(None), None):
        return value is None, None
    if origin is Literal:
        return value in arguments, value
    if hint is bool:
        return _to_bool(value)
    if hint in (int, float):
        return _to_number(value, hint)
    if hint is str:
        return isinstance(value, str), value
    if hint is dict or origin is dict:
        return isinstance(value, dict), value
    if hint in (list, tuple) or origin in (list, tuple):
        return _to_sequence(value, hint if origin is None else origin, arguments)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        values = {member.value: member for member in hint}
        if isinstance(value, hint):
            return True, value.value
        return isinstance(value, str) and value in values, value  # TRL's configs make the member themselves
    if isinstance(hint, type) and issubclass(hint, Path):
        return isinstance(value, (str, Path)), Path(value) if isinstance(value, str) else value
    return True, value  # a class of its own (ParallelismConfig …): its constructor decides


def _to_bool(value: Any) -> tuple[bool, Any]:
    if isinstance(value, bool):
        return True, value
    text = str(value).lower() if isinstance(value, (str, int)) else ""
    return text in _BOOLEANS, _BOOLEANS.get(text)


def _to_number(value: Any, kind: type) -> tuple[bool, Any]:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False, value
    if kind is int and isinstance(value, int):
        return abs(value) < _TOO_LARGE, value
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return False, value
    if kind is float:
        return True, number
    whole = number.is_integer() and abs(number) < _TOO_LARGE
    return whole, int(number) if whole else value


def _to_sequence(value: Any, kind: type, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    """A list; a single value is a list of one, as in TRL (`loss_type: sigmoid`)."""
    if value is None or (isinstance(value, dict) and not (arguments and dataclasses.is_dataclass(arguments[0]))):
        return False, value
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if arguments and not dataclasses.is_dataclass(arguments[0]):
        converted = [_convert(item, arguments[0]) for item in items]
        if not all(matched for matched, _ in converted):
            return False, value
        items = [item for _, item in converted]
    return True, kind(items)


def trl_configs() -> tuple[type, type, type]:
    """TRL's `ScriptArguments`, `ModelConfig` and `DatasetMixtureConfig`."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    return ScriptArguments, ModelConfig, DatasetMixtureConfig


def method_config(method: type) -> type:
    """The config dataclass of a method."""
    return method.config_class
