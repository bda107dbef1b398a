"""`fdiv run` and `fdiv sweep`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fdiv.cli.launch import check_options, launch
from fdiv.errors import FdivError, RecipeError, RequirementError
from fdiv.files import one_line
from fdiv.provenance import command_line
from fdiv.recipe.document import parse_value
from fdiv.recipe.load import load_recipe
from fdiv.recipe.model import Recipe
from fdiv.report.table import run_table
from fdiv.run.plan import RunPlan
from fdiv.terminal import binary_size, error, info, is_main_process, print_table
from fdiv.training.merge import merge_adapter, trained_rounding

__all__ = ["memory_plan", "merge", "run", "sweep"]


def run(args: argparse.Namespace, overrides: list[str], words: list[str]) -> int:
    """`fdiv run RECIPE …`."""
    check_options(args.accelerate, args.num_processes)
    recipe = load_recipe(args.recipe, overrides)
    if args.dry_run:
        return _dry_run(recipe, args.recipe, overrides, args.accelerate, args.num_processes)
    if args.accelerate is not None:
        return launch(args.accelerate, words, args.num_processes, _mixed_precision(recipe))
    from fdiv.run.run import plan_run, run_plan

    plan = plan_run(recipe)
    result = run_plan(plan, command_line(words))
    run_table(result, plan.output_dir)
    if result["unmet_requirements"]:
        raise RequirementError("eval.require: " + "; ".join(result["unmet_requirements"]))
    return 0


def _mixed_precision(recipe: Recipe) -> str | None:
    """What the recipe, the command line or this machine says, in accelerate's words; None: the configuration's own.

    DeepSpeed refuses a configuration that says something else than the run.
    """
    known = {**recipe.machine, **recipe.stated}
    if known.get("fp16"):
        return "fp16"
    return None if known.get("bf16") is None else "bf16" if known["bf16"] else "no"


def _dry_run(
    recipe: Recipe, source: str, overrides: list[str], accelerate: str | None, num_processes: int | None
) -> int:
    """The resolved recipe on stdout and the memory plan on stderr.

    A `${NAME}` that is not set is left standing: the check needs no data.
    """
    from fdiv.recipe.dump import resolved_yaml
    from fdiv.run.run import plan_run

    unset = recipe.unset_variables()
    for name in unset:
        info(f"note: the environment variable {name} is not set; the run needs it")
    variables = {name: f"${{{name}}}" for name in unset}
    plan = plan_run(recipe, variables)
    if recipe.sweep:
        from fdiv.run.cells import check_axes

        check_axes(recipe, source, overrides, variables)
    if is_main_process():
        sys.stdout.write(resolved_yaml(plan.recipe))
        sys.stdout.flush()
        memory_plan(plan, accelerate, num_processes)
    return 0


def memory_plan(run: RunPlan, accelerate: str | None, num_processes: int | None) -> None:
    """The memory plan as a table on stderr, or one line that says why there is none."""
    from fdiv.memory.placement import read_placement
    from fdiv.memory.plan import plan_memory

    try:
        placement = read_placement(run.configs.training, accelerate, num_processes)
        plan = plan_memory(run.recipe, run.configs, placement)
    except RecipeError:
        raise
    except FdivError as error:
        info(f"memory plan: unknown: {one_line(error)}")
        return
    rows = [(part, binary_size(size), "") for part, size in plan.device.items()]
    rows += [(part, "", binary_size(size)) for part, size in plan.host.items()]
    rows.append(("sum", binary_size(plan.total), binary_size(sum(plan.host.values())) if plan.host else ""))
    processes = f"{placement.processes} process{'es' if placement.processes > 1 else ''}"
    title = f"memory plan, each device: {placement.name}, {processes}"
    apart = [f"not in the sum: {name}: {binary_size(size)}" for name, size in plan.apart.items()]
    print_table(title, ("part", "device", "host"), rows, [*plan.assumptions, *apart], on_stderr=True)


def sweep(args: argparse.Namespace, overrides: list[str], words: list[str]) -> int:
    """`fdiv sweep RECIPE …`."""
    check_options(args.accelerate, args.num_processes)
    from fdiv.run.sweep import collect, plan_sweep, print_cells, run_sweep

    results = None if args.results is None else Path(args.results)
    if args.minutes is not None and not 0 <= args.minutes < float("inf"):
        raise RecipeError(f"--minutes {args.minutes}: must be a number from 0")
    if args.collect:
        info(f"table and plots: {collect(args.recipe, results)}")
        return 0
    axes = {}
    if args.divergences:
        axes["divergence"] = [parse_value(word) for word in args.divergences]
    if args.seeds:
        axes["seed"] = args.seeds
    plan = plan_sweep(args.recipe, overrides, axes, args.methods)
    if args.dry_run:
        print_cells(plan, args.minutes)
        return 0
    if args.accelerate is not None:
        first = plan.plan(next(plan.cells())).recipe
        return launch(args.accelerate, words, args.num_processes, _mixed_precision(first))
    failures = run_sweep(plan, command_line(words), args.minutes, results)
    for failure in failures:
        error(failure)
    return 1 if failures else 0


def merge(args: argparse.Namespace) -> int:
    """Merge as the command line says; tell which base the adapter was added to."""
    quantization, dtype = None, args.dtype
    rounding = trained_rounding(args.adapter)
    if rounding is not None and args.base_weights == "as_trained":
        quantization, dtype = rounding[0], rounding[1] if args.dtype == "auto" else args.dtype
        bits = 4 if "load_in_4bit" in quantization else 8
        info(f"merge: the run trained on a base in {bits} bits, so the base is rounded in the same way first")
    elif rounding is not None:
        info("merge: the run trained on a rounded base; the base as stored differs from it by rounding errors")
    output = merge_adapter(args.adapter, args.output, base=args.base, dtype=dtype, quantization=quantization)
    info(f"merged model: {output}")
    return 0
