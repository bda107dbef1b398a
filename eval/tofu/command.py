"""Evaluate a model on TOFU (forget quality, model utility, memorisation, membership attacks), or re-aggregate a
log."""

from __future__ import annotations

import argparse
import sys

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    from fdiv.eval.benchmark.options import add_shared_arguments
    from fdiv.eval.tofu.evaluation import TofuEvalConfig

    parser.add_argument(
        "--split", help="forget01, forget05, forget10, or a set NAME_perturbed or NAME of your own (forget10)"
    )
    parser.add_argument("--holdout", help="holdout set, or file, of the membership attacks (the split's own)")
    parser.add_argument("--retain_data", help="retain set, or file (retain_perturbed, else retain)")
    add_shared_arguments(parser, TofuEvalConfig)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write the output, show the table. Returns the exit code 0.

    Raises:
        DataError: a model, data set or log that cannot be used, with the remedy.
    """
    from fdiv.eval.benchmark.options import evaluate_model, reaggregate, settings_from
    from fdiv.eval.tofu.aggregate import aggregate_tofu
    from fdiv.eval.tofu.evaluation import TofuEvalConfig, TofuEvaluation

    if args.from_logs:
        return reaggregate(args, "tofu", aggregate_tofu, TofuEvalConfig.summary_metrics)
    config = settings_from(args, TofuEvalConfig)
    return evaluate_model(args, TofuEvaluation, config, config.summary_metrics)


command = TofuCommand = sys.modules[__name__]  # names of release 0.1
