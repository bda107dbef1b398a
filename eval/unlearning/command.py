"""Measure what is left of rows of your own after an unlearning: before and after, in other words, on neighbours,
sampled, and under attack; writes the erasure report (`erasure.html`, `erasure.json`)."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from fdiv.errors import DataError

__all__ = ["add_arguments", "add_measure_arguments", "add_row_arguments", "run"]


def add_row_arguments(parser: Any) -> None:
    """The files of rows, which `fdiv unlearn` takes too."""
    parser.add_argument(
        "--forget", required=True, metavar="FILE", help="rows to forget: JSON lines, JSON, parquet, CSV or text"
    )
    parser.add_argument("--retain", metavar="FILE", help="rows to keep")
    parser.add_argument("--neighbours", metavar="FILE", help="rows near the forget rows, measured and not trained on")
    parser.add_argument(
        "--holdout", metavar="FILE", help="rows of the same kind that the model has never seen (membership scores)"
    )
    parser.add_argument("--general", metavar="FILE", help="rows or texts of general knowledge (some of fdiv's own)")
    parser.add_argument("--paraphrases", metavar="FILE", help="other wordings of the forget rows, in their order")
    parser.add_argument("--paraphrase_model", metavar="MODEL", help="a model that writes them, instead of templates")


def add_measure_arguments(parser: Any) -> None:
    """How much is measured, which `fdiv unlearn` takes too."""
    from fdiv.eval.benchmark.options import attack_word

    parser.add_argument("--retrained", metavar="MODEL", help="a model that never saw the forget rows, measured beside")
    parser.add_argument("--thorough", action="store_true", help="64 samples a row and every attack: hours on a CPU")
    parser.add_argument("--samples", type=int, metavar="N", help="answers sampled of each row (8; thorough: 64)")
    parser.add_argument("--leak_rows", type=int, metavar="N", help="rows that are sampled, evenly spaced (all)")
    parser.add_argument(
        "--attacks",
        nargs="+",
        type=attack_word,
        metavar="ATTACK",
        help="names or '{name: relearn, steps: [1, 5, 20]}', in place of the usual",
    )
    parser.add_argument("--max_new_tokens", type=int, default=128, metavar="N", help="bound on an answer (128)")
    parser.add_argument(
        "--hide_texts", action="store_true", help="the report shows digests in place of rows and answers"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    from fdiv.inference.encoding import add_encoding
    from fdiv.models.dtypes import add_dtype

    model = parser.add_argument_group("the models")
    model.add_argument("--model", required=True, help="the unlearned model: a directory or hub name, or an adapter")
    model.add_argument("--adapter", help="PEFT adapter on it")
    model.add_argument("--base", help="the model before unlearning (of an adapter: the base it names)")
    add_dtype(model)
    add_row_arguments(parser.add_argument_group("the rows"))
    how = parser.add_argument_group("how")
    add_measure_arguments(how)
    how.add_argument("--max_items", type=int, metavar="N", help="only this many evenly spaced rows of each set")
    how.add_argument("--batch_size", type=int, default=32, help="of scoring (32)")
    how.add_argument("--generation_batch_size", type=int, default=64, help="of generating (64)")
    how.add_argument("--seed", type=int, default=0, help="of samples and attacks (0)")
    how.add_argument(
        "--prompt_format", metavar="TEXT", help="prompt of a question, with {question}, without a template"
    )
    add_encoding(how)
    parser.add_argument("--output", required=True, metavar="DIR", help="a directory")


def _config(args: argparse.Namespace) -> Any:
    from fdiv.eval.unlearning.evaluation import UnlearningEvalConfig

    names = ("forget", "retain", "neighbours", "holdout", "general", "paraphrases", "paraphrase_model", "retrained")
    names += ("samples", "leak_rows", "max_new_tokens", "hide_texts", "max_items", "batch_size")
    names += ("generation_batch_size", "system_prompt", "date_string", "chat_template_kwargs", "end_token")
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.prompt_format is not None:
        settings |= {"chat_template": "never", "question_format": args.prompt_format}
    profile = "thorough" if args.thorough else "quick"
    settings["cache"] = str(Path(args.output) / "cache")
    return UnlearningEvalConfig(**settings, profile=profile, attacks=args.attacks)


def run(args: argparse.Namespace) -> int:
    """Measure both models, write the report, show the table. Returns the exit code 0.

    Raises:
        DataError: a model or rows that cannot be used, with the remedy; an adapter of another base.
    """
    from fdiv.eval.unlearning.data import repeated_line
    from fdiv.eval.unlearning.evaluation import UnlearningEvaluation
    from fdiv.evaluation import EvalContext
    from fdiv.inference.processes import process_state
    from fdiv.models.adapters import base_and_adapter, check_base
    from fdiv.models.loading import check_vocabulary, context_of, load_model, load_tokenizer
    from fdiv.terminal import info

    folder = Path(args.output)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--output {folder} is a file: name a directory")
    config, began = _config(args), time.monotonic()
    if args.base is not None and args.adapter is None and base_and_adapter(args.model)[1] is not None:
        check_base(args.model, args.base)
        args.model, args.adapter = args.base, args.model
    elif args.adapter is not None:
        check_base(args.adapter, args.model)
    model_name, adapter = base_and_adapter(args.model, args.adapter)
    base = args.base or (model_name if adapter is not None else None)
    if base is None:
        raise DataError("give --base, the model before unlearning: there is nothing to compare with")
    tokenizer = load_tokenizer(model_name, adapter)
    check_vocabulary(base, tokenizer, "--base")
    folder.mkdir(parents=True, exist_ok=True)
    context = EvalContext(None, folder, seed=args.seed, stage="standalone")
    evaluation = UnlearningEvaluation(config, tokenizer, context)
    for report in evaluation.row_reports(context_of(base)):
        report.show()
        report.check(config.min_used_fraction)
    repeated = repeated_line(evaluation.sets.forget, "forget")
    if repeated is not None:
        info(f"note: {repeated}")
    before = _measured(evaluation, load_model(base, dtype=args.dtype), None)
    after = _measured(evaluation, load_model(model_name, adapter, args.dtype), before)
    retrained = evaluation.retrained(before, args.dtype)
    if process_state().is_main_process:
        _write(args, evaluation, before, after, retrained, base, time.monotonic() - began)
    process_state().wait_for_everyone()
    return 0


def _measured(evaluation: Any, model: Any, before: Any) -> Any:
    """One model: of the first, what it does not know; then everything."""
    measured = evaluation.measurement.likelihoods(model, None if before is None else before.chance)
    if before is None:
        evaluation.say_unknown(measured)
    evaluation.measure_more(model, measured, attacked=before is not None)
    return measured


def _write(
    args: argparse.Namespace, evaluation: Any, before: Any, after: Any, retrained: Any, base: str, seconds: float
) -> None:
    from fdiv.eval.unlearning.report import About, content_of, settings_of, show_table, write_report
    from fdiv.provenance import command_line, environment
    from fdiv.sealed import write_record
    from fdiv.terminal import info

    folder = Path(args.output)
    command = command_line()
    about = About(
        model=args.model if args.adapter is None else f"{args.model} with the adapter {args.adapter}",
        base=base,
        settings=settings_of(evaluation.config) | {"seed": args.seed, "dtype": args.dtype},
        command=command,
        environment=environment(command, args.seed) | {"seconds": round(seconds, 1)},
        hide_texts=args.hide_texts,
    )
    content = content_of(evaluation.sets, before, after, about, retrained)
    page = write_report(folder, content)
    values = {
        f"{when}_{name}": entry[when] for name, entry in content["measured"].items() for when in ("before", "after")
    }
    write_record(folder / "out.json", {**values, "notes": content["notes"], "settings": about.settings})
    show_table(content)
    info(f"written: {page}")
