"""Unbiased Pass@k, pass^k, G-Pass@k, mean@n and maj@n of a model's samples, or of recorded ones."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import typing
from pathlib import Path
from typing import Any

from fdiv.errors import DataError
from fdiv.inference.encoding import add_encoding
from fdiv.inference.greedy import BACKENDS
from fdiv.models.dtypes import add_dtype

__all__ = ["add_arguments", "run"]

_OWN = ("k", "stop", "greedy", "allow_code_execution", "label", "dataset", "n", "sandbox", "numpy", "mode")
_ENCODING = ("system_prompt", "date_string", "chat_template_kwargs")
_MODEL_ONLY = ("adapter", "dataset", "data", "scorer", "databases", "stripped_prompt", "server_url", "server_model")
_DECODE = ("decode", "stripped_prompt", "contrast_gate", "contrast_threshold", "contrast_eta", "contrast_cutoff")
_CONTRAST = ("contrast_threshold", "contrast_eta", "contrast_cutoff")
_FREE = ("n", "k", "greedy", "unscored", "resamples", "label", "batch_size", "allow_code_execution",
         "min_used_fraction", "sandbox", "mode")  # fmt: skip
"""Settings that may change between two runs in one folder: no completion and no score depends on them."""


_SHOWN_FAULTS = 20
_MARK = "settings.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; those of `PassKEvalConfig` keep their names and defaults."""
    from fdiv.eval.pass_at_k.backends import add_server_arguments
    from fdiv.eval.pass_at_k.dry_run import add_plan_arguments
    from fdiv.eval.pass_at_k.evaluation import PassKEvalConfig

    parser.add_argument("--from_samples", metavar="FILE", help="score these recorded samples instead of a model")
    parser.add_argument("--base_samples", metavar="FILE", help="the base model's samples: keep and explore rates")
    parser.add_argument("--k", default="1,8,64", help="the k of pass@k, such as 1,10,100 (1,8,64)")
    parser.add_argument("--output", help="out.json, or a directory (always one with --model)")
    parser.add_argument(
        "--check_golds", action="store_true",
        help="no model: score each gold of --dataset against itself in several forms, and wrong answers beside it",
    )  # fmt: skip
    model = parser.add_argument_group("the model")
    model.add_argument("--model", help="directory or hub name")
    model.add_argument("--adapter", help="PEFT adapter on it")
    add_dtype(model)
    model.add_argument("--backend", choices=BACKENDS, default="transformers", help="what samples (transformers)")
    model.add_argument("--vllm_memory", type=float, default=0.5, help="share of GPU memory vLLM takes (0.5)")
    add_server_arguments(parser)
    add_plan_arguments(parser)
    how = parser.add_argument_group("tasks and sampling")
    how.add_argument("--dataset", metavar="NAME_OR_FILE", help="a benchmark by name, or a JSON-lines file")
    how.add_argument("--stop", action="append", metavar="TEXT", help="text that ends a completion; repeat it")
    how.add_argument("--greedy", action="store_true", help="also greedy accuracy: one more completion per task")
    how.add_argument("--allow_code_execution", action="store_true", help="run programs the model wrote (humaneval)")
    how.add_argument("--sandbox", choices=("bubblewrap", "none"), help="of these programs (bubblewrap)")
    how.add_argument("--numpy", action="store_true", help="these programs and their tests may import numpy")
    how.add_argument("--seed", type=int, default=0, help="of the samples and the bootstrap (0)")
    # Launchers such as torchrun take --n for a beginning of an option of their own, wherever it stands.
    size = PassKEvalConfig.n
    how.add_argument("--n", "--samples_per_task", type=int, default=size, dest="n", help=f"samples per task ({size})")
    hints = typing.get_type_hints(PassKEvalConfig)
    add_encoding(how, rows=False)
    kinds = {"max_new_tokens": int, "batch_size": int, "max_tasks": int, "skip_tasks": int, "resamples": int}
    kinds |= dict.fromkeys(("temperature", "top_p", "min_used_fraction", *_CONTRAST), float)
    for field in dataclasses.fields(PassKEvalConfig):
        if field.name not in (*_OWN, *_ENCODING):
            shown = "" if field.default is None else f"({field.default})"
            said = " ".join(filter(None, (field.metadata.get("help", ""), shown)))
            kind, choices = kinds.get(field.name, str), _choices(hints[field.name])
            how.add_argument(f"--{field.name}", type=kind, choices=choices, default=field.default, help=said or None)


def _choices(hint: Any) -> list[Any] | None:
    """The values of an option whose type lists them; None where it is free."""
    literal = next(
        (part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is typing.Literal), None
    )
    return None if literal is None else list(typing.get_args(literal))


def run(args: argparse.Namespace) -> int:
    """Run, write `out.json`, show the table. Returns the exit code: 0; 1 where `--check_golds` finds faults.

    Raises:
        DataError: options that do not go together or are out of range; data, model or scorer that cannot be used;
            a folder with samples of other settings; a task with fewer scored samples than the largest k.
    """
    if args.check_golds:
        return _checked_golds(args)
    if args.probe is not None and not args.dry_run:
        raise DataError(f"--probe {args.probe} goes with --dry_run")
    if args.dry_run and (args.from_samples or not args.model):
        raise DataError("--dry_run plans the sampling of a model: give --model and --dataset, not --from_samples")
    if args.probe is not None and args.probe < 0:
        raise DataError(f"--probe {args.probe}: must be at least 0")
    if args.output is None and not args.dry_run:
        raise DataError("--output is missing: out.json, or a directory (always one with --model)")
    if bool(args.from_samples) == bool(args.model):
        raise DataError("give either --model (with --dataset) to sample, or --from_samples for recorded samples")
    if args.seed < 0:
        raise DataError(f"--seed {args.seed}: must be at least 0")
    return _recorded(args) if args.from_samples else _sampled(args)


def _checked_golds(args: argparse.Namespace) -> int:
    from fdiv.eval.pass_at_k.gold_check import check_golds
    from fdiv.files import write_json
    from fdiv.terminal import info, print_table

    for option in ("from_samples", "base_samples", "model", "adapter", "server_url", "dry_run"):
        if getattr(args, option):
            raise DataError(f"--{option} does not go with --check_golds: it asks for no answers but the golds")
    if not args.dataset:
        raise DataError("--check_golds needs --dataset: a benchmark by name, or a JSON-lines file")
    config = _config(args)
    loaded = config.load()
    scorer = config.make_scorer(loaded)
    try:
        found = check_golds(loaded, scorer)
    finally:
        scorer.close()
    rows = [("gold", name, f"{right} of {number}") for name, (right, number) in found.right.items()]
    rows += [("wrong", name, f"{right} of {number}") for name, (right, number) in found.wrong.items()]
    notes = [f"task {task}, {name}: {_score_words(score)}" for task, name, score in found.faults[:_SHOWN_FAULTS]]
    if len(found.faults) > len(notes):
        notes.append(f"and {len(found.faults) - len(notes)} more")
    title = f"Golds · {Path(args.dataset).name} · {found.tasks} tasks · scorer {scorer.name}"
    print_table(title, ("answer", "form", "score 1"), rows, notes)
    if args.output:
        path = Path(args.output)
        path = path if path.suffix == ".json" else path / "golds.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        faults = [{"task_id": task, "form": name, "score": score} for task, name, score in found.faults]
        write_json(path, {"tasks": found.tasks, "right": found.right, "wrong": found.wrong, "faults": faults})
        info(f"written: {path}")
    return 1 if found.faults else 0


def _score_words(score: float | None) -> str:
    return "not scored" if score is None else f"score {score:g}"


def _recorded(args: argparse.Namespace) -> int:
    from fdiv.eval.pass_at_k.aggregate import parse_k, summarise
    from fdiv.eval.pass_at_k.records import read_counts
    from fdiv.inference.processes import process_state

    for option in _MODEL_ONLY:
        if getattr(args, option):
            raise DataError(f"--{option} goes with --model, not with --from_samples")
    ks = parse_k(args.k)
    if args.resamples < 1:
        raise DataError(f"--resamples {args.resamples}: must be at least 1")
    counts = read_counts(args.from_samples, args.unscored)
    found = summarise(counts, ks, source=args.from_samples, resamples=args.resamples, seed=args.seed)
    if process_state().is_main_process:
        options = ("from_samples", "base_samples", "unscored", "resamples", "seed")
        about = {"settings": {name: getattr(args, name) for name in options} | {"k": ks}}
        _write(args, counts, found, ks, about, Path(args.from_samples).name)
    return 0


def _sampled(args: argparse.Namespace) -> int:
    from fdiv.eval.benchmark.output import output_paths
    from fdiv.eval.pass_at_k.evaluation import write_samples
    from fdiv.inference.processes import process_state
    from fdiv.rows.report import records_of

    if not args.dataset:
        raise DataError("--model needs --dataset: a benchmark by name, or a JSON-lines file with prompt and answer")
    folder = None if args.output is None else output_paths(args.output)[0]
    if folder is None and args.output is not None:
        raise DataError(f"--output {args.output}: the evaluation of a model writes a directory, not one file")
    config = _config(args)
    loaded = config.load()
    if args.dry_run:
        from fdiv.eval.pass_at_k.dry_run import plan_run

        return plan_run(args, config, loaded, folder, settings_of, check_folder)
    assert folder is not None
    began = time.monotonic()
    state = process_state()
    rows, settings, backend = _draw(args, config, loaded, folder)
    made_with = settings["made_with"]
    if state.is_main_process:
        write_samples(folder / "samples.jsonl", rows, made_with)
        report = config.report(loaded, rows)
        report.show()
        report.check(config.min_used_fraction)
        source = str(folder / "samples.jsonl")
        counts = dataclasses.replace(config.counts(rows, source), made_with=made_with)
        found = config.metrics(rows, counts, args.seed, source)
        lengths = [row["tokens"] for row in rows]
        reasons = [row["finish_reason"] for row in rows]
        about: dict[str, Any] = {
            "rows": records_of([report]),
            "mean_tokens": sum(lengths) / len(lengths),
            "finish_reasons": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
            "seconds": round(time.monotonic() - began, 1),
            "model": args.model,
            "settings": settings,
            **backend.about,
        }
        _write(args, counts, found, config.k, about, f"{Path(args.dataset).name} · {Path(args.model).name}")
    state.wait_for_everyone()
    return 0


def _config(args: argparse.Namespace) -> Any:
    from fdiv.eval.pass_at_k.aggregate import parse_k
    from fdiv.eval.pass_at_k.evaluation import PassKEvalConfig
    from fdiv.recipe.yaml_text import parse_value

    names = {field.name for field in dataclasses.fields(PassKEvalConfig)} - {"k"}
    options = {name: value for name, value in vars(args).items() if name in names}
    ks = parse_k(args.k)
    options["contrast_gate"] = parse_value(options["contrast_gate"])  # a name, or a mapping
    try:
        return PassKEvalConfig(**options, k=ks)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"--{error}") from None


def _draw(args: argparse.Namespace, config: Any, loaded: Any, folder: Path) -> tuple[list[dict], dict[str, Any], Any]:
    """Rows of `samples.jsonl`, the settings of the command, and what sampled."""
    from fdiv.eval.pass_at_k.backends import make_backend
    from fdiv.eval.pass_at_k.records import compare_made_with, read_counts
    from fdiv.models.loading import load_tokenizer

    # Base samples that cannot be read are found before the sampling.
    base = read_counts(args.base_samples, args.unscored) if args.base_samples else None
    tokenizer = load_tokenizer(args.model, args.adapter)
    backend = make_backend(args, config, loaded, tokenizer)
    settings = settings_of(args, config, loaded, tokenizer, backend)
    if base is not None:
        compare_made_with(settings["made_with"], base, args.base_samples)
    _open_folder(folder, settings)
    identity = [backend.name, args.dtype, backend.weights]
    rows = config.samples(
        loaded,
        tokenizer,
        backend.draw,
        backend.stop_ids,
        seed=args.seed,
        cache_dir=folder / "cache",
        identity=identity,
    )
    return rows, settings, backend


def settings_of(args: argparse.Namespace, config: Any, loaded: Any, tokenizer: Any, backend: Any) -> dict[str, Any]:
    """What `settings.json` of a folder holds, `made_with` (the stamp of the samples) among it."""
    from fdiv.secrets import without_secrets

    settings = dataclasses.asdict(config) | {"stop": list(loaded.stop), "scorer": without_secrets(loaded.scorer)}
    if config.decode == "standard":  # folders from before there was another
        settings = {name: value for name, value in settings.items() if name not in _DECODE}
    settings |= {name: getattr(args, name) for name in ("model", "adapter", "dtype", "seed")}
    settings |= {"backend": backend.name, "weights": backend.weights}
    settings["made_with"] = config.made_with(
        loaded, tokenizer, backend.stop_ids, seed=args.seed, dtype=backend.dtype, backend=backend.name
    )
    return settings


def _open_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Claim `folder` for samples of these settings; call it on all processes.

    Raises:
        DataError: it holds samples of other settings; names the first that differs.
    """
    from fdiv.inference.processes import process_state
    from fdiv.sealed import write_record

    mine = check_folder(folder, settings)
    state = process_state()
    state.wait_for_everyone()  # everybody has looked before anybody writes
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_record(folder / _MARK, mine)
    state.wait_for_everyone()


def check_folder(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Compare what a folder holds with these settings; returns those that samples depend on.

    Raises:
        DataError: it holds samples of other settings; names the first that differs.
    """
    from fdiv.sealed import read_record
    from fdiv.secrets import without_secrets
    from fdiv.stamps import compare_stamps
    from fdiv.terminal import info

    mine = without_secrets({name: value for name, value in settings.items() if name not in _FREE})
    mark = folder / _MARK
    if mark.is_file():
        theirs = read_record(mark, "choose another --output")
        remedy = "choose another --output, or repeat the settings in its settings.json"
        for name in mine:
            if name != "made_with" and theirs.get(name) != mine[name]:
                raise DataError(
                    f"{folder} holds samples made with {name}: {theirs.get(name)!r}, not {mine[name]!r}: {remedy}"
                )
        for line in compare_stamps(mine["made_with"], theirs.get("made_with"), f"what {folder} holds", remedy):
            info(line)
    return mine


def _write(
    args: argparse.Namespace, counts: Any, found: dict[str, Any], ks: list[int], about: dict[str, Any], title: str
) -> None:
    """`out.json`, the plot where a directory was asked for, and the table."""
    from fdiv.eval.benchmark.output import output_paths
    from fdiv.eval.pass_at_k.aggregate import compare_with_base, describe_counts
    from fdiv.eval.pass_at_k.plot import plot_pass_at_k
    from fdiv.eval.pass_at_k.records import compare_made_with, read_counts
    from fdiv.provenance import command_line, environment
    from fdiv.report.metrics import marked, meanings
    from fdiv.sealed import write_record
    from fdiv.terminal import info, number, print_table

    folder, path = output_paths(args.output)
    curves, said = {"model": counts}, {}
    if args.base_samples:
        base = read_counts(args.base_samples, args.unscored)
        compared = compare_made_with(counts.made_with, base, args.base_samples)
        said = {"base_samples": "; ".join(compared)} if compared else {}
        found = found | compare_with_base(
            counts, base, ks, source=args.from_samples or args.output, base_source=args.base_samples,
            resamples=args.resamples, seed=args.seed,
        )  # fmt: skip
        curves["base"] = base
    described = describe_counts(counts)
    content = found | described | about | {"notes": said, "environment": environment(command_line(), args.seed)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_record(path, content)
    if folder is not None:
        plot_pass_at_k(folder / "pass_at_k.png", curves, resamples=args.resamples, seed=args.seed)
    rows = [(marked(name), number(entry["value"]), number(entry["se"])) for name, entry in found.items()]
    notes = [*meanings(found), f"{described['tasks']} tasks; samples per task {described['samples_per_task']}"]
    if described["unscored_samples"]:
        notes.append(
            f"{described['unscored_samples']} samples of {described['tasks_with_unscored_samples']} tasks could not "
            f"be scored: --unscored {args.unscored}"
        )
    notes += said.values()
    print_table(f"Pass@k · {title}", ("metric", "value", "s.e."), rows, notes)
    info(f"written: {path}")


command = PassKCommand = sys.modules[__name__]  # names of release 0.1
