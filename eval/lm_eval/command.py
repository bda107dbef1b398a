"""Evaluate a model on tasks of lm-evaluation-harness (wmdp, mmlu, gsm8k, …) or on local task files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fdiv.errors import DataError
from fdiv.inference.encoding import Encoding, add_encoding
from fdiv.inference.processes import process_state
from fdiv.models.dtypes import add_dtype

__all__ = ["add_arguments", "one_process", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--model", required=True, help="directory or hub name")
    parser.add_argument("--adapter", help="PEFT adapter on it")
    parser.add_argument("--tasks", nargs="+", required=True, help="task or group names, or task files (*.yaml)")
    parser.add_argument("--num_fewshot", type=int, help="examples in the prompt (the task's own)")
    parser.add_argument("--limit", type=int, help="only the first N items of every task")
    parser.add_argument("--batch_size", type=_rows, default=8, help="rows of a forward, or auto (8)")
    add_dtype(parser)
    parser.add_argument("--apply_chat_template", action="store_true", help="ask through the chat template")
    add_encoding(parser, rows=False)
    parser.add_argument("--seed", type=int, default=0, help="of few-shot choices and bootstrap (0)")
    parser.add_argument("--output", required=True, metavar="DIR", help="where out.json and samples.jsonl go")


def _rows(word: str) -> int | str:
    if word == "auto" or (word.isdecimal() and int(word) > 0):
        return word if word == "auto" else int(word)
    raise argparse.ArgumentTypeError(f"{word!r} is neither auto nor a number above 0")


def one_process(args: argparse.Namespace) -> str | None:
    """Why several processes cannot share it; None: they can."""
    import torch

    alone = "each of several CPU processes would do all tasks: lm-eval shares them over accelerators only"
    return None if torch.accelerator.is_available() else alone


def run(args: argparse.Namespace) -> int:
    """Evaluate, write `out.json` and `samples.jsonl`, show the table. Returns the exit code 0.

    Raises:
        DataError: lm-eval is not installed, or a model, task or task file cannot be used.
    """
    from fdiv.eval.benchmark.output import output_paths
    from fdiv.provenance import command_line, environment
    from fdiv.report.metrics import marked, meanings
    from fdiv.sealed import listed, write_record
    from fdiv.terminal import info, is_main_process, number, print_table

    folder, path = output_paths(args.output)
    if folder is None:
        raise DataError(f"--output {args.output}: name a directory, not a file")
    results = _evaluate(args)
    if results is None or not is_main_process():
        return 0
    values, errors = summarise(results)
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"benchmark": "lm_eval", "model": args.model, **values}
    content |= {"standard_errors": errors, "task_versions": results["versions"]}
    content |= {"items": {task: n["effective"] for task, n in results.get("n-samples", {}).items()}}
    content |= {"settings": {k: v for k, v in vars(args).items() if k != "debug"}}
    write_record(path, content | {"environment": environment(command_line(), args.seed)})
    with listed(folder / "samples.jsonl"):
        _write_samples(folder / "samples.jsonl", results.get("samples", {}))
    rows = [(marked(name), number(value), number(errors.get(name))) for name, value in values.items()]
    print_table(f"lm-eval · {args.model}", ("task/metric", "value", "s.e."), rows, meanings(values))
    info(f"written: {path}")
    return 0


def _evaluate(args: argparse.Namespace) -> dict[str, Any] | None:
    from fdiv.eval.lm_eval.harness import find_tasks, imported, run_tasks
    from fdiv.models.fetch import find_model
    from fdiv.models.loading import base_and_adapter, check_causal, load_model, load_tokenizer

    lm_eval = imported()
    manager, tasks = find_tasks(args.tasks)
    model, adapter = base_and_adapter(args.model, args.adapter)
    load_tokenizer(model, adapter)  # a wrong path is one clear line here
    check_causal(model)
    device = process_state().device
    dtype = "float32" if args.dtype == "auto" and device.type == "cpu" else args.dtype
    options: dict[str, Any] = {"dtype": dtype, "device": str(device), "batch_size": args.batch_size}
    if adapter is not None and process_state().num_processes == 1:  # lm-eval would not give new tokens their rows
        options |= {"pretrained": load_model(model, adapter, dtype), "tokenizer": load_tokenizer(model, adapter)}
    else:
        options |= {"pretrained": find_model(model), "peft": adapter}
    encoding = Encoding(args.system_prompt, args.date_string, args.chat_template_kwargs)
    lm = lm_eval.models.huggingface.HFLM(**options, chat_template_args=encoding.template_variables())
    return run_tasks(
        lm,
        manager,
        tasks,
        encoding=encoding,
        seed=args.seed,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        apply_chat_template=args.apply_chat_template,
    )


def summarise(results: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Values and standard errors by `task/metric` from lm-eval's results; the filter's name is kept unless it is
    `none`."""
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    for task, metrics in {**results["results"], **results.get("groups", {})}.items():
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not filtered:
                continue
            name = f"{task}/{metric.removesuffix('_stderr')}" + ("" if filtered == "none" else f",{filtered}")
            (errors if metric.endswith("_stderr") else values)[name] = float(value)
    return values, errors


def _write_samples(path: Path, samples: dict[str, list[dict[str, Any]]]) -> None:
    import json

    with path.open("w", encoding="utf-8") as file:
        for task, rows in samples.items():
            for row in rows:
                line = {"task": task, "doc_id": row.get("doc_id"), "target": row.get("target")}
                line |= {"answers": row.get("filtered_resps"), "metrics": {m: row[m] for m in row.get("metrics", [])}}
                file.write(json.dumps(line, default=str) + "\n")


command = LmEvalCommand = sys.modules[__name__]  # names of release 0.1
