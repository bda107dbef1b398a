"""Evaluate a model on MUSE (VerbMem, KnowMem, PrivLeak, extraction strength, utility over folds), or
re-aggregate a log."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

__all__ = ["add_arguments", "run"]

CURVES = ("sustainability", "scalability")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    from fdiv.eval.benchmark.options import add_shared_arguments
    from fdiv.eval.muse.evaluation import MuseEvalConfig

    parser.add_argument("--corpus", default="News", help="News, Books, or the name of your own (News)")
    parser.add_argument("--max_length", type=int, default=MuseEvalConfig.max_length, help="tokens kept of a text")
    add_shared_arguments(parser, MuseEvalConfig)
    folds = parser.add_argument_group("utility over folds (--model is then the model before unlearning)")
    what = {"sustainability": "after request 1, 2, …", "scalability": "unlearned on forget sets of growing size"}
    for curve in CURVES:
        folds.add_argument(f"--{curve}", nargs="+", metavar="MODEL", help=f"models {what[curve]}")


def run(args: argparse.Namespace) -> int:
    """Evaluate, write the output, show the table. Returns the exit code 0.

    Raises:
        DataError: a model, data set or log that cannot be used, with the remedy.
    """
    from fdiv.eval.benchmark.options import evaluate_model, reaggregate, settings_from
    from fdiv.eval.muse.aggregate import aggregate_muse
    from fdiv.eval.muse.evaluation import MuseEvalConfig, MuseEvaluation

    if args.from_logs:
        aggregate = partial(aggregate_muse, corpus=args.corpus)
        return reaggregate(args, "muse", aggregate, MuseEvalConfig.summary_metrics)
    config = settings_from(args, MuseEvalConfig)
    curves = partial(_put_curves, args)
    return evaluate_model(args, MuseEvaluation, config, config.summary_metrics, curves)


def _put_curves(args: argparse.Namespace, evaluation: Any, model: Any, result: Any) -> None:
    """Retain KnowMem of every fold's model, and what it keeps of the evaluated model's."""
    from fdiv.errors import DataError
    from fdiv.eval.muse.aggregate import utility_curve
    from fdiv.models.loading import load_model

    for curve in CURVES:
        models = getattr(args, curve)
        if not models:
            continue
        before = result.values["retain_knowmem_ROUGE"]
        if not before:
            raise DataError(f"--{curve} compares with --model's retain KnowMem, which is {before}")
        values = [evaluation.retain_knowmem(load_model(name, dtype=args.dtype), name) for name in models]
        if None in values:
            raise DataError(f"--{curve} {models[values.index(None)]}: its retain KnowMem is not defined")
        for name, value in utility_curve(values, before).items():
            result.put(curve if name == "kept" else f"{curve}_{name}", value)


command = MuseCommand = sys.modules[__name__]  # names of release 0.1
