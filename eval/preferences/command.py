"""Evaluate a model on preference pairs: accuracy, calibration, divergence from a reference, entropy."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fdiv.divergences.saturation import TRAINING_MAX_EXPONENT
from fdiv.errors import DataError
from fdiv.files import DATA_FORMATS
from fdiv.inference.encoding import Encoding, add_encoding
from fdiv.models.dtypes import add_dtype
from fdiv.rows.loading import read_file

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; those of `PreferencesEvalConfig` keep their names and defaults."""
    from fdiv.eval.preferences.evaluation import PreferencesEvalConfig

    parser.add_argument("--model", required=True, help="directory or hub name of the policy")
    parser.add_argument("--adapter", help="PEFT adapter on it")
    parser.add_argument("--reference", help="directory or hub name of the reference; an adapter is its own")
    parser.add_argument("--dataset", required=True, metavar="FILE", help="rows with chosen, rejected and prompt")
    parser.add_argument("--divergence", required=True, help="a name, or '{name: alpha, alpha: 0.3}'")
    parser.add_argument("--beta", type=float, required=True, help="weight of the divergence in the reward")
    parser.add_argument(
        "--max_exponent", type=float, default=TRAINING_MAX_EXPONENT, help="overflow cap of the score, as in training"
    )
    parser.add_argument("--normalized", action="store_true", help="divide f by f''(1), as in training")
    parser.add_argument("--max_length", type=int, help="cut prompt + completion to this many tokens")
    add_encoding(parser)
    add_dtype(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    parser.add_argument("--output", required=True, metavar="DIR", help="where preferences_eval.json is written")
    for field in dataclasses.fields(PreferencesEvalConfig):
        if field.name != "split":
            parser.add_argument(
                f"--{field.name}", type=_kind(field.name), default=field.default, help=f"({field.default})"
            )


def _kind(name: str) -> Any:
    from fdiv.recipe.document import parse_value

    return {"temperature": float, "min_used_fraction": float, "scorer": parse_value}.get(name, int)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, write `preferences_eval.json`. Returns the exit code 0.

    Raises:
        DataError: a model or file that cannot be loaded, rows that are no preferences.
        ValueError: an unknown divergence, or an option outside its range.
    """
    from fdiv.eval.preferences.evaluation import PreferencesEvalConfig
    from fdiv.evaluation import EvalContext
    from fdiv.inference.processes import process_state
    from fdiv.models.loading import load_model, load_tokenizer
    from fdiv.provenance import command_line, environment
    from fdiv.report.metrics import marked, meanings
    from fdiv.rows.report import records_of
    from fdiv.sealed import write_record
    from fdiv.terminal import info, number, print_table

    state = process_state()
    try:
        settings = _settings(args)
    except (TypeError, ValueError) as error:
        raise DataError(f"fdiv eval preferences: {error}") from None
    options = {f.name: getattr(args, f.name) for f in dataclasses.fields(PreferencesEvalConfig) if f.name != "split"}
    try:
        evaluation = PreferencesEvalConfig(split="data", **options)
    except ValueError as error:
        raise DataError(f"--{error}") from None
    rows = _read(Path(args.dataset))
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(args.model, args.adapter)
    model = load_model(args.model, args.adapter, args.dtype)
    reference = load_model(args.reference, dtype=args.dtype) if args.reference else None
    context = EvalContext(settings, output, reference_model=reference, seed=args.seed, stage="standalone")
    metrics = evaluation.evaluate(model, tokenizer, {"data": rows}, context)
    if state.is_main_process:
        stated = {key: value for key, value in vars(args).items() if key != "debug"}
        counts = records_of(context.row_reports)
        result = {
            "metrics": metrics,
            "rows": counts,
            "arguments": stated,
            "environment": environment(command_line(), args.seed),
        }
        write_record(output / "preferences_eval.json", result)
        shown = [(marked(name), number(value)) for name, value in metrics.items()]
        print_table(f"preferences of {args.model}", ("metric", "value"), shown, meanings(metrics))
        info(f"written: {output / 'preferences_eval.json'}")
    return 0


def _settings(args: argparse.Namespace) -> Any:
    """What the evaluation reads of an `FDPOConfig`, without its training options."""
    import torch

    from fdiv.alignment.f_dpo.loss import f_dpo_rewards
    from fdiv.divergences import get_divergence
    from fdiv.recipe.document import parse_value

    spec = parse_value(args.divergence)
    divergence = get_divergence(spec)
    used = divergence.normalized() if args.normalized else divergence
    f_dpo_rewards(torch.zeros(1), used, args.beta, max_exponent=args.max_exponent)  # refuses what has no reward
    return SimpleNamespace(
        divergence=spec,
        resolve_divergence=lambda: used,
        beta=args.beta,
        max_exponent=args.max_exponent,
        max_length=args.max_length,
        encoding=lambda: Encoding(args.system_prompt, args.date_string, args.chat_template_kwargs, args.end_token),
    )


def _read(path: Path) -> Any:
    if not path.is_file() or path.suffix not in DATA_FORMATS:
        raise DataError(f"--dataset {path}: give an existing file ending in {', '.join(DATA_FORMATS)}")
    return read_file(path)


command = PreferencesCommand = sys.modules[__name__]  # names of release 0.1
