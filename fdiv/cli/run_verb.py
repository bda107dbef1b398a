"""`fdiv run` and `fdiv sweep`."""

from __future__ import annotations

import argparse
import sys

from fdiv.cli.launch import launch
from fdiv.errors import RequirementError
from fdiv.provenance import command_line
from fdiv.recipe import Recipe, load_recipe
from fdiv.recipe_yaml import parse_value
from fdiv.terminal import complain, info, is_main_process, run_table

__all__ = ["run", "sweep"]


def run(args: argparse.Namespace, overrides: list[str], words: list[str]) -> int:
    """`fdiv run RECIPE …`."""
    recipe = load_recipe(args.recipe, overrides)
    if args.dry_run:
        return _dry_run(recipe)
    if args.accelerate:
        return launch(args.accelerate, words, args.num_processes)
    from fdiv.run import run_recipe

    result = run_recipe(recipe, command_line(words))
    run_table(result, recipe.output_dir)
    if result["unmet_requirements"]:
        raise RequirementError("eval.require: " + "; ".join(result["unmet_requirements"]))
    return 0


def _dry_run(recipe: Recipe) -> int:
    """Print the resolved recipe. A `${NAME}` that is not set is left standing: the check needs no data."""
    from fdiv.recipe_dump import resolved_yaml
    from fdiv.run import check_blocks

    for name in recipe.unset_variables():
        info(f"note: the environment variable {name} is not set; the run needs it")
        recipe.variables[name] = f"${{{name}}}"
    if recipe.prepare:
        recipe.variables["prepare"] = "${prepare}"
    recipe.configs()
    check_blocks(recipe)
    if is_main_process():
        sys.stdout.write(resolved_yaml(recipe))
    return 0


def sweep(args: argparse.Namespace, overrides: list[str], words: list[str]) -> int:
    """`fdiv sweep RECIPE …`."""
    from fdiv.sweep import print_cells, run_sweep, sweep_cells

    axes = {}
    if args.divergences:
        axes["divergence"] = [parse_value(word) for word in args.divergences]
    if args.seeds:
        axes["seed"] = args.seeds
    plan = sweep_cells(args.recipe, overrides, axes)
    if args.dry_run:
        print_cells(plan)
        return 0
    if args.accelerate:
        return launch(args.accelerate, words, args.num_processes)
    failures = run_sweep(plan, command_line(words))
    for failure in failures:
        complain(failure)
    return 1 if failures else 0
