"""`RunPlan`: a recipe resolved once. A run, a dry run and every cell of a sweep go on from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fdiv.errors import RecipeError
from fdiv.evaluation import inherit
from fdiv.files import one_line, plain
from fdiv.recipe.model import Block, Configs, Recipe
from fdiv.run.check import check_configs
from fdiv.run.directory import RunDirectory
from fdiv.sealed import read_record, write_record
from fdiv.terminal import info

__all__ = ["RunPlan", "check_blocks", "plan_run", "prepare"]

_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class RunPlan:
    """What follows from a recipe on this machine. Nothing has been loaded or written for it.

    Args:
        recipe: The checked recipe.
        configs: The dataclasses of its top-level keys.
        evaluations: Each `eval:` block and its instance.
        settled: Top-level keys that the `prepare:` step decided; a stated key wins over them.
        variables: `${NAME}` that are no environment variables. `${prepare}` stands for itself until `prepare` has run.
    """

    recipe: Recipe
    configs: Configs
    evaluations: tuple[tuple[Block, Any], ...]
    settled: Mapping[str, Any]
    variables: Mapping[str, str]

    @property
    def output_dir(self) -> Path:
        """Where the run writes."""
        return self.recipe.directory(self.variables)

    @property
    def directory(self) -> RunDirectory:
        """The run's directory, whether or not it exists."""
        return RunDirectory(self.output_dir)

    def value(self, key: str, default: Any = None) -> Any:
        """A top-level key as stated, else as `prepare:` set it, else `default`."""
        return self.recipe.stated.get(key, self.settled.get(key, default))

    def with_keys(self, **keys: Any) -> RunPlan:
        """The plan with other values of some keys of the configs; the recipe stays."""
        configs = self.recipe.configs(self.settled, self.variables, keys)
        return dataclasses.replace(self, configs=configs)


def plan_run(recipe: Recipe, variables: Mapping[str, str] = _NONE) -> RunPlan:
    """Resolve a recipe.

    Args:
        recipe: A checked recipe.
        variables: Values of `${NAME}` in place of the environment's.

    Raises:
        RecipeError: a config or a block refuses its values (an invalid divergence, α outside its domain); a variable
            that is not set.
    """
    return _resolved(recipe, _NONE, {**({"prepare": "${prepare}"} if recipe.prepare else {}), **variables})


def check_blocks(recipe: Recipe) -> None:
    """Of release 0.1; `plan_run` checks blocks and configs. It goes with release 0.3."""
    plan_run(recipe)


def _resolved(recipe: Recipe, settled: Mapping[str, Any], variables: Mapping[str, str]) -> RunPlan:
    configs = recipe.configs(settled, variables)
    recipe = _inheriting(recipe, configs.training)
    if recipe.prepare is not None:
        recipe.prepare.instance(variables)  # a value that it refuses ends the run here
    evaluations = tuple((block, block.instance(variables)) for block in recipe.evaluations)
    check_configs(recipe, configs, evaluations)
    return RunPlan(recipe, configs, evaluations, MappingProxyType({**settled}), MappingProxyType({**variables}))


def _inheriting(recipe: Recipe, training: Any) -> Recipe:
    """The recipe; where its `prepare:` and `eval:` blocks do not say, they encode rows as the run does."""

    def block(one: Block) -> Block:
        return dataclasses.replace(one, values=inherit(one.config, one.values, training))

    built = None if recipe.prepare is None else block(recipe.prepare)
    return dataclasses.replace(recipe, prepare=built, evaluations=tuple(map(block, recipe.evaluations)))


def prepare(plan: RunPlan, root: Path) -> RunPlan:
    """Build what the `prepare:` block describes, unless the same block was built under `root` before.

    Returns:
        The plan with the keys that the builder set, and with `${prepare}` known.
    """
    block = plan.recipe.prepare
    if block is None:
        return plan
    builder = block.instance(plan.variables)
    identity = json.dumps([block.name, plain(builder)], sort_keys=True)
    folder = root / f"{block.name.replace(':', '.')}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    marker = folder / "recipe_keys.json"
    if not marker.is_file():
        if folder.exists():
            shutil.rmtree(folder)  # a build that was cut off: the marker is written last
        folder.mkdir(parents=True)
        info(f"prepare: building {block.name} in {folder}")
        try:
            keys = builder.build(folder)
        except (ValueError, FileNotFoundError) as error:
            raise RecipeError(f"{block.where}: prepare ({block.name}): {one_line(error)}") from error
        relative = {key: _relative(value, folder) for key, value in keys.items()}
        write_record(marker, {"prepare": json.loads(identity), "keys": relative})
    else:
        info(f"prepare: {block.name} was built before: {folder}")
    built = read_record(marker, f"remove {folder}, so that it is built again")
    keys = {key: _absolute(value, folder) for key, value in built["keys"].items()}
    return _resolved(plan.recipe, keys, {**plan.variables, "prepare": str(folder)})


_HERE = "${prepare}"


def _relative(value: Any, folder: Path) -> Any:
    """A path inside the build without the place of the build, which may move."""
    if isinstance(value, (str, Path)) and str(value).startswith(str(folder)):
        return _HERE + str(value)[len(str(folder)) :]
    return value


def _absolute(value: Any, folder: Path) -> Any:
    return str(folder) + value[len(_HERE) :] if isinstance(value, str) and value.startswith(_HERE) else value
