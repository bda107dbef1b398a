"""What `fdiv eval tofu` and `fdiv eval muse` have in common: options, the run on a model, the reading of logs."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fdiv.catalog import ATTACKS
from fdiv.errors import DataError
from fdiv.eval.benchmark.aggregation import Aggregates
from fdiv.eval.benchmark.settings import EvaluationSettings
from fdiv.inference.encoding import add_encoding
from fdiv.inference.greedy import BACKENDS
from fdiv.inference.processes import process_state
from fdiv.models.dtypes import add_dtype
from fdiv.training.config import add_min_used_fraction

__all__ = ["add_shared_arguments", "attack_word", "evaluate_model", "reaggregate", "settings_from"]

Settings = TypeVar("Settings", bound=EvaluationSettings)


def add_shared_arguments(parser: argparse.ArgumentParser, config: type[EvaluationSettings]) -> None:
    """Options of both benchmarks; those of the settings class keep their names and defaults."""
    model = parser.add_argument_group("the model")
    model.add_argument("--model", help="directory or hub name")
    model.add_argument("--adapter", help="PEFT adapter on it")
    add_dtype(model)
    model.add_argument("--backend", choices=BACKENDS, default="transformers", help="what generates (transformers)")
    model.add_argument("--vllm_memory", type=float, default=0.5, help="share of GPU memory vLLM takes (0.5)")
    compare = parser.add_argument_group("what it is compared with")
    compare.add_argument(
        "--retain_logs", metavar="FILE", help="*_EVAL.json of the retain model, ours or a published one"
    )
    compare.add_argument("--retain_model", help="a retain model to score instead")
    compare.add_argument("--reference_model", help="model of the Reference attack (the retain model)")
    how = parser.add_argument_group("how")
    how.add_argument("--data", help="hub dataset or local folder; for tofu also a file of forget rows")
    how.add_argument(
        "--preset", metavar="NAME", help=f"metric definitions: {', '.join(config.presets)}, or module:attribute"
    )
    how.add_argument("--batch_size", type=int, default=config.batch_size, help=f"of scoring ({config.batch_size})")
    size = config.generation_batch_size
    how.add_argument("--generation_batch_size", type=int, default=size, help=f"of generating ({size})")
    how.add_argument("--padding_side", choices=("right", "left"), default="right", help="of scoring (right)")
    how.add_argument("--max_items", type=int, help="only this many evenly spaced rows of every set")
    add_min_used_fraction(how)
    how.add_argument("--no_generate", dest="generate", action="store_false", help="skip generation: no ROUGE")
    how.add_argument("--no_gradnorm", dest="gradnorm", action="store_false", help="skip the GradNorm attack")
    how.add_argument(
        "--attacks",
        nargs="+",
        type=attack_word,
        metavar="ATTACK",
        help=f"measure again after each: {', '.join(ATTACKS)}, module:attribute; with parameters '{{name: int4, …}}'",
    )
    how.add_argument("--attack_seed", type=int, default=config.attack_seed, help="of what is random in them (0)")
    how.add_argument("--fluency_classifier", default="auto", help="auto (if in the hub cache), none, a path or name")
    how.add_argument("--chat_template", choices=("auto", "always", "never"), default="auto", help="(auto)")
    how.add_argument("--question_format", default=config.question_format, help="prompt without a chat template")
    how.add_argument("--answer_format", default=config.answer_format, help="answer without a chat template")
    add_encoding(how)
    logs = parser.add_argument_group("published logs")
    logs.add_argument("--from_logs", metavar="FILE", help="re-aggregate this log instead of running a model")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="a directory; FILE.json writes the values alone"
    )


def attack_word(word: str) -> Any:
    """An attack on the command line: a name, or a mapping in YAML."""
    from fdiv.recipe.yaml_text import parse_value

    return parse_value(word)


def settings_from(args: argparse.Namespace, config: type[Settings]) -> Settings:
    """The settings object of the parsed options; options that were not given take the class's defaults."""
    names = {field.name for field in dataclasses.fields(config)}
    return config(**{name: value for name, value in vars(args).items() if name in names and value is not None})


def reaggregate(
    args: argparse.Namespace, benchmark: str, aggregate: Callable[..., Aggregates], first: Sequence[str]
) -> int:
    """`--from_logs`: read the log(s), aggregate, write `out.json`, show the table."""
    from fdiv.eval.benchmark.log import read_eval_log
    from fdiv.eval.benchmark.output import output_paths, show_table, write_result
    from fdiv.eval.benchmark.presets import get_preset
    from fdiv.terminal import info

    for option in ("model", "adapter", "retain_model", "reference_model"):
        if getattr(args, option):
            raise DataError(f"--{option} runs a model and does not go with --from_logs")
    _, path = output_paths(args.output)
    log = read_eval_log(args.from_logs, benchmark)
    found, wanted = log.split(), getattr(args, "split", None)
    if wanted and found and wanted != found:
        raise DataError(f"{args.from_logs}: made on split {found}, --split says {wanted}")
    retain = read_eval_log(args.retain_logs, benchmark) if args.retain_logs else None
    result = aggregate(log, get_preset(args.preset or log.preset), retain)
    if log.preset != result.preset.name:
        result.notes["preset"] = (
            f"the log was made with preset {log.preset}: prompts, generations and per-token scores are its own, only "
            f"their aggregation follows {result.preset.name}"
        )
    about = {"settings": {"from_logs": args.from_logs, "retain_logs": args.retain_logs, "made_with": log.preset}}
    write_result(path, result, about)
    show_table(f"{benchmark.upper()} · {Path(args.from_logs).name}", result, first)
    info(f"written: {path}")
    return 0


def evaluate_model(
    args: argparse.Namespace,
    evaluation_class: type,
    config: EvaluationSettings,
    first: Sequence[str],
    more: Callable[[Any, Any, Aggregates], None] | None = None,
) -> int:
    """Run a model: score, generate, aggregate, write the directory, show the table.

    Args:
        args: the parsed options.
        evaluation_class: subclass of `ModelEvaluation`.
        config: its settings.
        first: metrics at the head of the table.
        more: called as `more(evaluation, model, result)` for values that need further models.
    """
    from fdiv.eval.benchmark.output import output_paths, show_table, write_evaluation
    from fdiv.models.loading import load_model, load_tokenizer
    from fdiv.provenance import command_line, environment
    from fdiv.rows.report import records_of
    from fdiv.terminal import info

    if not args.model:
        raise DataError("give --model (a directory or hub name) to run one, or --from_logs to re-aggregate a log")
    folder, path = output_paths(args.output)
    if folder is None:
        raise DataError(f"--output {args.output}: the evaluation of a model writes a directory, not one file")
    began = time.monotonic()
    tokenizer = load_tokenizer(args.model, args.adapter)
    evaluation = evaluation_class(config, tokenizer, cache_dir=folder / "cache")
    retain = evaluation.retain_log()
    model = load_model(args.model, args.adapter, args.dtype)
    reports = evaluation.row_reports(model)
    for report in reports:
        report.show()
        report.check(config.min_used_fraction)
    generator = _vllm_generator(args, tokenizer, model, folder) if args.backend == "vllm" else None
    log = evaluation.run(model, reference_model=evaluation.load_reference(), generator=generator)
    result = evaluation.aggregate(log)
    if more is not None:
        more(evaluation, model, result)
    if process_state().is_main_process:
        about: Mapping[str, Any] = {
            "model": args.model,
            "settings": dataclasses.asdict(config) | {k: getattr(args, k) for k in ("adapter", "dtype", "backend")},
            "rows": records_of(reports),
            "environment": environment(command_line()) | {"seconds": round(time.monotonic() - began, 1)},
        }
        write_evaluation(folder, result, retain, about)
        show_table(f"{log.benchmark.upper()} · {log.split()} · {args.model}", result, first)
        info(f"written: {path}")
    process_state().wait_for_everyone()
    return 0


def _vllm_generator(args: argparse.Namespace, tokenizer: Any, model: Any, folder: Path) -> Any:
    from fdiv.inference.greedy import VLLMSource, generate_with_vllm
    from fdiv.models.fingerprints import weights_fingerprint
    from fdiv.models.loading import base_and_adapter

    source = VLLMSource(*base_and_adapter(args.model, args.adapter), args.dtype, args.vllm_memory)
    digest = weights_fingerprint(model)
    return partial(_generate, generate_with_vllm, source, tokenizer, folder / "cache", digest)


def _generate(generate: Any, source: Any, tokenizer: Any, cache_dir: Path, digest: str, requests: Any) -> Any:
    return generate(source, tokenizer, requests, cache_dir=cache_dir, model_digest=digest)
