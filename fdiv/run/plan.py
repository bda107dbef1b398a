"""`RunPlan`: a recipe resolved once. A run, a dry run and every cell of a sweep go on from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fdiv.errors import RecipeError
from fdiv.evaluation import inherit
from fdiv.files import one_line
from fdiv.recipe.model import Block, Configs, Recipe
from fdiv.run.build import build
from fdiv.run.check import check_configs
from fdiv.run.directory import RunDirectory

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
        replay: The `fdiv.run.replay.Replay` that this run is, or None.
    """

    recipe: Recipe
    configs: Configs
    evaluations: tuple[tuple[Block, Any], ...]
    settled: Mapping[str, Any]
    variables: Mapping[str, str]
    replay: Any = None

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
    """Of release 0.1; `plan_run` checks blocks and configs. It goes with release 0.3.

    Args:
        recipe: the recipe to check.
    """
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

    Args:
        plan: the run. root: where builds are kept.

    Raises:
        RecipeError: the builder failed.
    """
    block = plan.recipe.prepare
    if block is None:
        return plan
    try:
        folder, keys = build(block.name, block.instance(plan.variables), root)
    except (ValueError, FileNotFoundError) as error:
        raise RecipeError(f"{block.where}: prepare ({block.name}): {one_line(error)}") from error
    made = _resolved(plan.recipe, keys, {**plan.variables, "prepare": str(folder)})
    return dataclasses.replace(made, replay=plan.replay)
