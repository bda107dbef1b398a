"""Make a model forget rows of yours: check the rows, train an adapter with an evaluation after every epoch, stop by a
stated rule, and write an erasure report (`erasure.html`, `erasure.json`) beside the adapter."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fdiv.run.plan import RunPlan
    from fdiv.unlearning.request.recipe import Looked, Request

__all__ = ["EPILOG", "add_arguments", "unlearn"]

EPILOG = """\
Rows: question and answer; prompt and completion; messages; or text. Beside them `secret` (what must not come out) and
`paraphrase` (the same question in other words).

Every other key of the recipe can be set too: --num_train_epochs 3, --learning_rate 5e-4, --lora_r 8, --beta 0.1. The
recipe is in DIR/recipe_resolved.yaml, and `fdiv run` repeats it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    from fdiv.eval.unlearning.command import add_measure_arguments, add_row_arguments
    from fdiv.unlearning.request.defaults import DEFAULT_METHOD, unlearning_methods

    model = parser.add_argument_group("the model")
    model.add_argument("--model", required=True, help="directory, hub name, or a name that `fdiv models` lists")
    model.add_argument("--adapter", metavar="DIR", help="an adapter on it that knows the rows, to go on training")
    model.add_argument("--load_in_4bit", action="store_true", help="the base in 4 bits (needs fdiv[qlora])")
    model.add_argument(
        "--prompt_format", metavar="TEXT", help="prompt of a question, with {question}, without a template"
    )
    rows = parser.add_argument_group("the rows")
    add_row_arguments(rows)
    rows.add_argument(
        "--sample_retain", type=int, default=0, metavar="N", help="N answers of the model to neighbouring questions"
    )
    rows.add_argument("--retain_questions", metavar="FILE", help="the questions it answers (it is asked for some)")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--method", default=DEFAULT_METHOD, metavar="NAME", help=f"{', '.join(sorted(unlearning_methods()))} (npo)"
    )
    how.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    how.add_argument("--merge", action="store_true", help="also write DIR/merged, a model that needs no PEFT")
    how.add_argument("--resume", action="store_true", help="go on from the last checkpoint in DIR")
    how.add_argument("--overwrite", action="store_true", help="replace an earlier run in DIR")
    how.add_argument("--dry_run", "--dry-run", action="store_true", help="print the recipe, memory and time, and stop")
    add_measure_arguments(parser.add_argument_group("what is measured"))
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write")


def unlearn(args: argparse.Namespace, overrides: list[str], words: list[str]) -> int:
    """`fdiv unlearn …`: look, say, train, measure. Returns the exit code 0.

    Raises:
        RecipeError, DataError: anything that is wrong with the command or the rows, before the model is loaded.
        FdivError: see `fdiv.run.run.run_recipe`.
    """
    from fdiv.errors import FdivError

    try:
        return _unlearn(args, overrides, words)
    except (FdivError, KeyboardInterrupt) as error:
        error.args = (_in_own_words(str(error)), *error.args[1:])
        raise


def _unlearn(args: argparse.Namespace, overrides: list[str], words: list[str]) -> int:
    from fdiv.cli.verbs import memory_plan
    from fdiv.recipe.dump import resolved_yaml
    from fdiv.recipe.load import load_recipe
    from fdiv.run.directory import RunDirectory
    from fdiv.run.plan import plan_run
    from fdiv.unlearning.request.recipe import look, recipe_of

    request = _request(args)
    if not args.dry_run:
        directory = RunDirectory(Path(args.output))
        overrides = [*overrides, *_how_to_begin(args, directory)]
    looked = look(request)
    values = recipe_of(request, looked)
    path = _written(values, None if args.dry_run else Path(args.output) / "prepared")
    plan = plan_run(load_recipe(path, overrides))
    _say(request, looked, plan)
    if args.dry_run:
        sys.stdout.write(resolved_yaml(plan.recipe))
        sys.stdout.flush()
        memory_plan(plan, None, None)
    if args.dry_run or args.thorough:
        _time(request, looked, plan)
    return 0 if args.dry_run else _run(args, plan, words)


def _request(args: argparse.Namespace) -> Request:
    from fdiv.unlearning.request.recipe import Request

    names = ("forget", "retain", "neighbours", "holdout", "general", "paraphrases")
    rows = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    measures = {
        name: getattr(args, name) for name in ("samples", "leak_rows", "attacks", "paraphrase_model", "retrained")
    }
    measures = {name: value for name, value in measures.items() if value is not None}
    measures |= {"profile": "thorough" if args.thorough else "quick", "max_new_tokens": args.max_new_tokens}
    measures |= {"hide_texts": True} if args.hide_texts else {}
    return Request(
        model=args.model,
        rows=rows,
        output=args.output,
        method=args.method,
        adapter=args.adapter,
        bits=4 if args.load_in_4bit else None,
        prompt_format=args.prompt_format,
        seed=args.seed,
        sample_retain=args.sample_retain,
        questions=args.retain_questions,
        measures=measures,
    )


def _how_to_begin(args: argparse.Namespace, directory: Any) -> list[str]:
    """The recipe keys of `--resume` and `--overwrite`; a run without a checkpoint yet begins again.

    Raises:
        FdivError: the folder holds something that must not be touched.
    """
    from fdiv.errors import FdivError
    from fdiv.terminal import info

    resume = bool(args.resume and directory.checkpoints())
    if args.resume and directory.finished:
        raise FdivError(
            f"{directory.path} holds a finished run: there is nothing to go on with; --overwrite replaces it"
        )
    if args.resume and not resume:
        info(f"resume: {directory.path} holds no checkpoint yet; begun again, with what is in its cache")
    directory.check(args.overwrite or args.resume, resume)
    begin = ["--overwrite_output_dir", "true"] if args.overwrite or (args.resume and not resume) else []
    return [*begin, *(["--resume_from_checkpoint", "true"] if resume else [])]


_OWN_WORDS = {
    "--overwrite_output_dir true": "--overwrite",
    "--resume_from_checkpoint true": "--resume",
    "--output_dir": "--output",
    "output_dir": "--output",
}


def _in_own_words(line: str) -> str:
    """A line of `fdiv run` with the options of `fdiv unlearn`."""
    from fdiv.run.directory import AFTER_TRAINING

    in_turn = {AFTER_TRAINING: "go on with --resume, or train again with --overwrite", **_OWN_WORDS}
    for theirs, own in in_turn.items():
        line = re.sub(rf"(?<![\w/.-]){re.escape(theirs)}(?![\w/.-])", own, line)
    return line


def _written(values: dict[str, Any], folder: Path | None) -> Path:
    """The recipe as a file, in `folder` or, for a dry run and beside the main process, in a folder of its own."""
    import tempfile

    import yaml

    from fdiv.files import write_text
    from fdiv.terminal import is_main_process

    if folder is None or not is_main_process():
        folder = Path(tempfile.mkdtemp(prefix="fdiv-unlearn-"))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "unlearn.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    return folder / "unlearn.yaml"


def _say(request: Request, looked: Looked, plan: RunPlan) -> None:
    """What will be done, how it ends, and what is lost without retain rows, in a few lines."""
    from fdiv.eval.unlearning.data import repeated_line
    from fdiv.eval.unlearning.report import stopping_rule
    from fdiv.terminal import info
    from fdiv.unlearning.request.builder import held_out
    from fdiv.unlearning.request.defaults import DEFAULT_METHOD, REASON

    for name, rows in looked.sets.items():
        if rows:
            info(f"{name}: {len(rows)} rows, longest {looked.longest(name)} tokens")
    repeated = repeated_line(looked.sets["forget"], "forget")
    if repeated is not None:
        info(f"note: {repeated}")
    why = f": {REASON}" if plan.recipe.method_name == DEFAULT_METHOD else ""
    info(f"method: {plan.recipe.method_name}{why}")
    rule = stopping_rule(plan.configs.training)
    if rule is not None:
        info(f"rule: {rule}")
    if not looked.retain_rows and not request.sample_retain:
        info(
            "note: without retain rows nothing holds what lies near the forget rows: expect answers to similar "
            "questions to suffer, and read the neighbours of the report (give --neighbours). Better: --retain FILE, "
            "or --sample_retain N for N answers of the model itself"
        )
    if "neighbours" in request.rows:
        return
    apart = held_out(looked.retain_rows + request.sample_retain) if request.sample_retain else 0
    apart = apart or len(looked.sets["neighbours"])
    if apart:
        most = "up to " if request.sample_retain else ""
        info(f"neighbours: {most}{apart} of the retain rows are not trained on, and measured")


def _time(request: Request, looked: Looked, plan: RunPlan) -> None:
    """The time plan, on stderr."""
    from fdiv.terminal import print_table
    from fdiv.unlearning.request.estimate import estimate, measured_speed, parameter_count

    epochs = float(plan.configs.training.num_train_epochs)
    found = estimate(request, looked, measured_speed(), parameter_count(request.model), epochs)
    rows = [(part, _duration(seconds)) for part, seconds in found.items()]
    notes = ["counted operations over this machine's measured speed; training stops earlier where its rule says so"]
    print_table("time plan", ("part", "about"), rows, notes, on_stderr=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _run(args: argparse.Namespace, plan: RunPlan, words: list[str]) -> int:
    from fdiv.provenance import command_line
    from fdiv.report.table import run_table
    from fdiv.run.run import run_plan
    from fdiv.terminal import info

    result = run_plan(plan, command_line(words))
    run_table(result, plan.output_dir)
    if args.merge:
        from fdiv.cli.verbs import merge

        merge(
            argparse.Namespace(
                adapter=str(plan.output_dir),
                output=str(plan.output_dir / "merged"),
                base=plan.configs.model.model_name_or_path,
                base_weights="as_trained",
                dtype="auto",
            )
        )
    info(f"adapter: {plan.output_dir}; report: {plan.output_dir / 'erasure.html'}")
    return 0
