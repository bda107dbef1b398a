"""Evaluate a model on a benchmark of one's own: a folder of files and a benchmark.yaml, or a packaged layout
(muse, pistol, rwku, tofu, wmdp_bio, wmdp_cyber)."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_arguments", "one_process", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    from fdiv.eval.benchmark.options import add_shared_arguments
    from fdiv.eval.tofu.evaluation import TofuEvalConfig

    parser.add_argument("--source", help="local folder or hub dataset in place of the one the layout names")
    parser.add_argument("--variables", metavar="YAML", help="values of the layout's variables: '{subject: …}'")
    parser.add_argument("--max_length", type=int, help="tokens kept of a text (MUSE's kind: 2048)")
    add_shared_arguments(parser, TofuEvalConfig)
    # What is not said is the layout's.
    unstated = dict.fromkeys(("question_format", "answer_format", "chat_template", "preset"))
    parser.set_defaults(**unstated)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write the output, show the table. Returns the exit code 0.

    Raises:
        DataError: a benchmark, model, data set or log that cannot be used, with the remedy.
    """
    from fdiv.eval.benchmark.options import evaluate_model, reaggregate

    config = _config(args)
    if args.from_logs:
        return reaggregate(args, config.evaluation_class.benchmark, _aggregate(config), config.summary_metrics)
    if not config.layout.sets:
        return _run_tasks(args, config)
    return evaluate_model(args, config.evaluation_class, config, config.summary_metrics, _put_tasks)


def one_process(args: argparse.Namespace) -> str | None:
    """Why several processes cannot share it; None: they can."""
    tasks = _config(args).layout.tasks
    return f"its tasks of lm-eval ({', '.join(tasks)}) run in one process" if tasks else None


def _config(args: argparse.Namespace) -> Any:
    from fdiv.errors import DataError
    from fdiv.eval.benchmark.options import settings_from
    from fdiv.eval.layouts.evaluation import BenchmarkEvalConfig
    from fdiv.recipe.yaml_text import parse_value

    if args.variables is not None:
        variables = parse_value(args.variables)
        if not isinstance(variables, dict):
            raise DataError(f"--variables {variables!r}: write a mapping, '{{name: value}}'")
        args = argparse.Namespace(**{**vars(args), "variables": variables})
    return settings_from(args, BenchmarkEvalConfig)


def _aggregate(config: Any) -> Any:
    from functools import partial

    from fdiv.eval.muse.aggregate import aggregate_muse
    from fdiv.eval.tofu.aggregate import aggregate_tofu

    return partial(aggregate_muse, corpus=config.corpus) if config.layout.kind == "texts" else aggregate_tofu


def _put_tasks(evaluation: Any, model: Any, result: Any) -> None:
    """lm-eval's values of the layout's tasks, beside those of its sets."""
    for name, value in evaluation.config.task_values(model, evaluation.tokenizer).items():
        result.put(name, value)


def _run_tasks(args: argparse.Namespace, config: Any) -> int:
    """A layout of tasks alone is a call of `fdiv eval lm_eval`."""
    from fdiv.errors import DataError
    from fdiv.eval.lm_eval import command

    if not args.model:
        raise DataError("give --model (a directory or hub name)")
    shared = {name: getattr(args, name) for name in ("model", "adapter", "dtype", "batch_size", "output")}
    rest = {name: getattr(args, name) for name in ("system_prompt", "date_string", "chat_template_kwargs")}
    return command.run(
        argparse.Namespace(
            **shared, **rest, tasks=list(config.layout.tasks), num_fewshot=None, limit=args.max_items,
            apply_chat_template=args.chat_template == "always", seed=config.attack_seed,
        )
    )  # fmt: skip
