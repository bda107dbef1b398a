"""The resolved recipe: every key with its value, and the origin of each that is not the default. It runs again."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import Any

import yaml

import fdiv
from fdiv.files import plain
from fdiv.recipe.check import BLOCKS, top_section
from fdiv.recipe.model import Block, Recipe
from fdiv.recipe.schema import section_of
from fdiv.secrets import is_secret_name, is_setting, redacted, without_secrets

__all__ = ["resolved_yaml"]

_ONCE = (
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "force_resume",
)  # what was asked of one run is not asked of the next
_IF_THERE = ("dataset_test_split",)  # stated, the split has to be there


class _Dumper(yaml.SafeDumper):
    """Block mappings, flow lists, no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def resolved_yaml(recipe: Recipe, settled: Collection[str] = ()) -> str:
    """Every key of the recipe as YAML. A comment names the origin of each value that is not the default.

    `settled` names the keys that the `prepare:` step decides. `${NAME}` stays as written, so the file carries no path
    of this machine that the recipe did not carry; secrets are withheld, and of `env:` all but switches and numbers.
    """
    lines = [
        f"# {recipe.name}, resolved by fdiv {fdiv.__version__}: every key; a comment marks what is not the default.",
        "# Runs again with: fdiv run THIS_FILE --output_dir ANOTHER_DIRECTORY",
        f"method: {recipe.method_name}",
    ]
    group = ""
    for name, key in top_section(recipe.method).keys.items():
        if name in ("method", "extends") or name in BLOCKS:
            continue
        if key.group != group:
            group = key.group
            lines += ["", f"# --- {group} ---"]
        lines.append(_line(recipe, settled, name, plain(key.default)))
    lines += ["", "# --- steps ---"]
    if recipe.prepare:
        lines.append(_dump({"prepare": _block(recipe.prepare)}))
    if recipe.evaluations:
        blocks = [_block(block) for block in recipe.evaluations]
        lines.append(_dump({"eval": blocks[0] if len(blocks) == 1 else blocks}))
    if recipe.report:
        lines.append(_dump({"report": dataclasses.asdict(recipe.report)}))
    if recipe.sweep:
        lines.append(_dump({"sweep": recipe.sweep}))
    return redacted("\n".join(lines) + "\n")


def _line(recipe: Recipe, settled: Collection[str], name: str, default: Any) -> str:
    """One top-level key with the origin of its value."""
    if name in settled and name not in recipe.stated:
        return f"# {name}: set by prepare"
    if name in _ONCE:
        return _dump({name: default})
    if name in _IF_THERE and name not in recipe.stated:
        return f"# {name}: {default}, where the data have it"
    if name == "output_dir" and name not in recipe.stated:
        return _marked(name, str(recipe.output_dir), "the recipe's name")
    value = recipe.stated.get(name, recipe.machine.get(name, default))
    if value is not None and is_secret_name(name):
        return f"{name}: null  # withheld"
    if name == "env" and value:
        return _environment(value)
    value = without_secrets(plain(value))
    if plain(value) == default:
        return _dump({name: default})
    origin = recipe.origins.get((name,), "this machine has no accelerator" if name in recipe.machine else "")
    return _marked(name, plain(value), _short(origin, recipe.source))


def _environment(values: dict[str, Any]) -> str:
    """`env:` with switches and small numbers; of the other variables the names."""
    shown = {key: value for key, value in values.items() if is_setting(value) and not is_secret_name(key)}
    hidden = ", ".join(sorted(values.keys() - shown.keys()))
    return _dump({"env": shown or None}) + (f"  # withheld: {hidden}" if hidden else "")


def _marked(name: str, value: Any, origin: str) -> str:
    text = _dump({name: value})
    return f"{text}  # {origin}" if "\n" not in text else f"# {origin}\n{text}"


def _short(origin: str, source: str) -> str:
    """`path/to/x.yaml, line 12` → `recipe, line 12`, or `base, line 12` for a key of the recipe's base."""
    found = "recipe" if origin.startswith(f"{source}, ") else "base"
    return re.sub(r"^.*, line ", f"{found}, line ", origin)


def _block(block: Block) -> dict[str, Any]:
    """A block with all the keys of its dataclass."""
    section = section_of(block.config)
    stated = without_secrets(block.values)
    values = {name: plain(stated.get(name, key.default)) for name, key in section.keys.items()}
    required = {name for name, key in section.keys.items() if key.required and name not in block.values}
    result = {"name": block.name, **{name: value for name, value in values.items() if name not in required}}
    steps = {"require": dict(block.require), "summary": list(block.summary)}
    steps |= {} if block.before else {"before": False}
    return {**result, **{name: value for name, value in steps.items() if value or name == "before"}}


def _dump(values: dict[str, Any]) -> str:
    """YAML of one key: a block is written in block style, the value of a top-level key on its line."""
    (name, value), *_ = values.items()
    flow = None if isinstance(value, (dict, list)) and value and name not in BLOCKS else False
    text = yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=flow, width=10_000
    )
    return text.rstrip("\n")
