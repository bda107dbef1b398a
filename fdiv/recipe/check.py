"""Checks the keys and types of a recipe against the whole schema, and lists that schema."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from fdiv.catalog import EVALUATIONS, METHODS, TASKS, load
from fdiv.errors import RecipeError
from fdiv.named import shown
from fdiv.recipe.document import place_of
from fdiv.recipe.model import Block, Recipe, ReportKeys, RunKeys
from fdiv.recipe.overrides import KeyPath
from fdiv.recipe.schema import (
    CommandLineValue,
    Key,
    Section,
    coerce,
    method_config,
    nearest_key,
    read_words,
    section_of,
    trl_configs,
)
from fdiv.recipe.sweep import STRUCTURE, parse_sweep

__all__ = ["all_keys", "check_recipe", "top_section"]

BLOCKS = ("prepare", "eval", "report", "sweep")
_BUILDERS = {"prepare": TASKS, "eval": EVALUATIONS}
_BLOCK_HELP = {
    "prepare": "Builds the data (and model) of the run; `name` selects the builder.",
    "eval": "What is measured before and after training; `name` selects the evaluation; a list runs several.",
    "report": "Write report.html and plots at the end of the run.",
    "sweep": "Values of recipe keys that `fdiv sweep` combines (divergence, seed, …), and how it chooses and shows.",
}


def top_section(method: type) -> Section:
    """The keys at the top level of a recipe for `method`, the blocks among them."""
    keys: dict[str, Key] = dict(section_of(RunKeys).keys)
    for config in (method_config(method), *trl_configs()):
        for name, key in section_of(config).keys.items():
            keys.setdefault(name, key)
    for name in BLOCKS:
        keys[name] = Key(name, Any, None, _BLOCK_HELP[name], group="blocks")
    return Section("", keys)


def block_section(title: str, name: str, config: type) -> Section:
    """The keys of a `prepare:` or `eval:` block whose `name` selects `config`."""
    extra = {
        "name": Key("name", str, name, f"One of {', '.join(_BUILDERS[title])}; or module:attribute.", group=title)
    }
    if title == "eval":
        extra["require"] = Key("require", dict | None, None, "Metric → improved | increased | decreased.", group=title)
        extra["summary"] = Key("summary", list[str] | None, None, "Metrics of the tables, in order.", group=title)
        extra["before"] = Key("before", bool, True, "Measure before training too.", group=title)
    return Section(title, {**extra, **section_of(config, title).keys})


def all_keys(method: type) -> Iterator[tuple[str, Key]]:
    """Every valid key with its dotted path: the top level, the fields of every builder and evaluation, the blocks."""
    for name, key in top_section(method).keys.items():
        yield name, key
    for title, table in _BUILDERS.items():
        for name, target in table.items():
            for key in block_section(title, name, load(target)).keys.values():
                yield f"{title}.{key.name}", key
    for key in section_of(ReportKeys, "report").keys.values():
        yield f"report.{key.name}", key
    for name, key in STRUCTURE.items():
        yield f"sweep.{name}", key


def check_recipe(name: str, source: str, values: dict[str, Any], origins: dict[KeyPath, str]) -> Recipe:
    """Check every key and value of a merged recipe and return it as a `Recipe`.

    Raises:
        RecipeError: the first thing that is wrong, in one line.
    """
    checker = _Checker(METHODS.find(values["method"], error=RecipeError), values["method"], source, origins)
    section = top_section(checker.method)
    values = checker.switches(values, section)
    stated = checker.check(values, section, ())
    blocks = {title: _present(stated.pop(title, None)) for title in BLOCKS}
    prepare = checker.block("prepare", blocks["prepare"], ("prepare",)) if blocks["prepare"] else None
    report = None
    if blocks["report"] is not None:
        keys = section_of(ReportKeys, "report")
        report = ReportKeys(**checker.check(checker.mapping(blocks["report"], ("report",)), keys, ("report",)))
    return Recipe(
        name=name,
        source=source,
        method_name=stated.pop("method"),
        stated=MappingProxyType(stated),
        origins=MappingProxyType(checker.origins),
        prepare=prepare,
        evaluations=tuple(checker.evaluations(blocks["eval"])),
        report=report,
        sweep=checker.sweep(blocks["sweep"]),
        machine=MappingProxyType(machine_defaults(stated)),
    )


def machine_defaults(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Keys that follow from the machine where the recipe is silent. TRL turns bf16 on by default, which CPUs emulate
    slowly, so a run on CPU has it off."""
    import torch

    found: dict[str, Any] = {}
    on_cpu = stated.get("use_cpu", not torch.accelerator.is_available())
    if on_cpu and "use_cpu" not in stated:
        found["use_cpu"] = True
    if on_cpu and stated.get("bf16") is None and not stated.get("fp16"):
        found["bf16"] = False
    return found


def _present(block: Any) -> Any:
    """A block, or None for `--eval null`."""
    return None if isinstance(block, CommandLineValue) and block.read() is None else block


class _Checker:
    """The checks of one recipe; holds what every error message needs."""

    def __init__(self, method: type, method_name: str, source: str, origins: dict[KeyPath, str]):
        self.method, self.method_name, self.source, self.origins = method, method_name, source, origins

    def where(self, path: KeyPath) -> str:
        """The place of a key: a line of the recipe, or the command line."""
        return place_of(path, self.origins, self.source)

    def switches(self, values: dict[str, Any], section: Section) -> dict[str, Any]:
        """`--no_bf16` becomes `bf16: false`."""
        result = {}
        for name, value in values.items():
            positive = name.removeprefix("no_") if isinstance(name, str) else name
            if name not in section.keys and positive != name and positive in section.keys:
                if isinstance(value, CommandLineValue) and not value.words:
                    result[positive] = False
                    self.origins[(positive,)] = self.where((name,))
                    continue
            result[name] = value
        return result

    def check(self, values: dict[str, Any], section: Section, path: KeyPath) -> dict[str, Any]:
        """Refuse unknown keys; coerce the rest; look into the mappings whose keys are known."""
        result = {}
        for name, value in values.items():
            here = (*path, str(name))
            if name not in section.keys:
                raise self.unknown(here, section)
            key = section.keys[name]
            if name == "trust_remote_code" and coerce(value, key, self.where(here)):
                raise RecipeError(
                    f"{self.where(here)}: trust_remote_code is refused: it runs code from the model's repository; "
                    "save the model with a class of transformers and give its path"
                )
            result[name] = value if key.group == "blocks" else self.nested(value, key, here, values)
        for key in section.keys.values():
            if key.required and key.name not in result:
                raise RecipeError(
                    f"{self.where(path)}: `{'.'.join((*path, key.name))}` is missing; {key.help}".rstrip()
                )
        return result

    def unknown(self, path: KeyPath, section: Section) -> RecipeError:
        """The error for an unknown key, with the nearest valid one of the whole schema."""
        name, where = path[-1], self.where(path)
        nearest = nearest_key(name, section, lambda: all_keys(self.method))
        dash = "--" if where == "command line" else ""
        inside = f" in `{'.'.join(path[:-1])}`" if len(path) > 1 and not dash else ""
        hint = (
            f"did you mean {dash + nearest!r}?"
            if nearest
            else f"list the keys with `fdiv recipes --keys {self.method_name}`"
        )
        shown = dash + ".".join(path) if dash else name
        return RecipeError(f"{where}: unknown key {shown!r}{inside}; {hint}")

    def nested(self, value: Any, key: Key, path: KeyPath, values: Mapping[str, Any]) -> Any:
        """Coerce one value; check inside a mapping of TRL or transformers whose keys a class or function fixes."""
        value = coerce(value, key, self.where(path))
        if isinstance(value, str) and key.name.endswith("_kwargs") and not value.lstrip().startswith("{"):
            raise RecipeError(f"{self.where(path)}: {key.name!r} must be a mapping, got {shown(value)}")
        if isinstance(value, dict) and len(path) == 1:
            section = _nested_section(key.name, str(read_words(values.get("lr_scheduler_type", "linear"))))
            return self.check(value, section, path) if section else read_words(value)
        if isinstance(value, list) and key.name == "datasets":
            section = section_of(load("trl.scripts.utils:DatasetConfig"), "datasets")
            return [self.check(self.mapping(v, path), section, (*path, str(i))) for i, v in enumerate(value)]
        return read_words(value)

    def mapping(self, value: Any, path: KeyPath) -> dict[str, Any]:
        """`value` if it is a mapping."""
        value = value.read() if isinstance(value, CommandLineValue) else value
        if not isinstance(value, dict):
            raise RecipeError(f"{self.where(path)}: `{'.'.join(path)}:` must be a mapping of keys, got {shown(value)}")
        return value

    def block(self, title: str, value: Any, path: KeyPath) -> Block:
        """One `prepare:` or `eval:` block."""
        values = self.mapping(value, path)
        table = _BUILDERS[title]
        if "name" not in values:
            raise RecipeError(f"{self.where(path)}: `{title}:` needs a `name`: one of {', '.join(sorted(table))}")
        name = read_words(values["name"])
        config = table.find(name, self.where((*path, "name")), what=f"`{title}.name`", error=RecipeError)
        checked = self.check(values, block_section(title, name, config), path)
        checked.pop("name")
        require = checked.pop("require", None) or {}
        summary = checked.pop("summary", None) or []
        before = checked.pop("before", True)
        if require and not before:
            raise RecipeError(
                f"{self.where((*path, 'before'))}: `require` compares with the start: leave out `before`"
            )
        return Block(title, name, config, checked, self.where(path), self.requirements(require, path), summary, before)

    def requirements(self, require: dict[str, Any], path: KeyPath) -> dict[str, str]:
        """`require:` of an evaluation: metric → improved, increased or decreased."""
        for metric, direction in require.items():
            if direction not in ("improved", "increased", "decreased"):
                raise RecipeError(
                    f"{self.where((*path, 'require', metric))}: `{'.'.join(path)}.require.{metric}` must be improved, "
                    f"increased or decreased, got {shown(direction)}"
                )
        return require

    def evaluations(self, value: Any) -> list[Block]:
        """`eval:` as one block or a list of them."""
        value = value.read() if isinstance(value, CommandLineValue) else value
        if not value:
            return []
        if isinstance(value, list):
            return [self.block("eval", entry, ("eval", str(index))) for index, entry in enumerate(value)]
        return [self.block("eval", value, ("eval",))]

    def sweep(self, value: Any) -> dict[str, Any] | None:
        """`sweep:`, its parts and the names of its axes checked."""
        if value is None:
            return None
        values = read_words(self.mapping(value, ("sweep",)))
        block = parse_sweep(values, self.where)
        axes = {name: key for name, key in top_section(self.method).keys.items() if name not in BLOCKS}
        section = Section("sweep", {**STRUCTURE, **axes})
        for name in block.axes:
            if name not in section.keys and str(name).split(".")[0] not in ("eval", "prepare", "divergence"):
                raise self.unknown(("sweep", str(name)), section)
        return values


@cache
def _nested_section(name: str, scheduler: str) -> Section | None:
    """The keys of a mapping-valued training argument, where they are fixed; None where anything goes."""
    if name == "accelerator_config":
        return section_of(load("transformers.trainer_pt_utils:AcceleratorConfig"), name)
    if name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        return _section_of_function(load("torch.utils.checkpoint:checkpoint"), name, ("function",))
    if name == "lr_scheduler_kwargs":
        functions = {kind.value: f for kind, f in load("transformers.optimization:TYPE_TO_SCHEDULER_FUNCTION").items()}
        fixed = ("optimizer", "num_warmup_steps", "num_training_steps")
        return _section_of_function(functions[scheduler], name, fixed) if scheduler in functions else None
    return None


def _section_of_function(function: Any, title: str, skip: tuple[str, ...]) -> Section:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    keys = {p.name: Key(p.name, Any, None, group=title) for p in parameters if p.kind in named and p.name not in skip}
    return Section(title, keys)
