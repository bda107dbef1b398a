"""What `fdiv eval passk --dry_run` does: the checks of the run, the plan, a probe. It writes nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fdiv.errors import DataError
from fdiv.eval.pass_at_k.backends import Backend, end_tokens, make_backend
from fdiv.eval.pass_at_k.data import LoadedTasks
from fdiv.eval.pass_at_k.evaluation import PassKEvalConfig, SamplingPass
from fdiv.eval.pass_at_k.plan import SamplingPlan, Speed, make_plan, plan_rows
from fdiv.eval.pass_at_k.probe import measure
from fdiv.inference.cache import kept_keys

__all__ = ["add_plan_arguments", "plan_run"]

_REQUESTS = 8


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """`--dry_run` and `--probe`."""
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--dry_run", "--dry-run", action="store_true",
        help="print what would be sampled, memory and time, refuse what the run would, and stop",
    )  # fmt: skip
    group.add_argument(
        "--probe", type=int, nargs="?", const=_REQUESTS, metavar="N",
        help=f"with --dry_run: measure N requests of the servers ({_REQUESTS}; not set: none); 0: load no model",
    )  # fmt: skip


def plan_run(
    args: argparse.Namespace,
    config: PassKEvalConfig,
    loaded: LoadedTasks,
    folder: Path | None,
    settings_of: Any,
    check_folder: Any,
) -> int:
    """Print the plan of a run. Returns the exit code 0.

    Args:
        args, config, loaded: of the command. folder: its output; None: none was given.
        settings_of, check_folder: what the run records, and compares with its folder.

    Raises:
        DataError: what the run would raise before its first sample.
    """
    from fdiv.eval.pass_at_k.records import compare_made_with, read_counts
    from fdiv.memory.generation import memory_there
    from fdiv.models.loading import load_tokenizer
    from fdiv.terminal import print_table

    machine = memory_there()  # before a model is loaded
    base = read_counts(args.base_samples, args.unscored) if args.base_samples else None
    scorer = config.make_scorer(loaded)
    try:
        tokenizer = load_tokenizer(args.model, args.adapter)
        theirs = _recorded(folder)
        backend = _backend(args, config, loaded, tokenizer, theirs)
        settings = settings_of(args, config, loaded, tokenizer, backend)
        if base is not None:
            compare_made_with(settings["made_with"], base, args.base_samples)
        if folder is not None:
            check_folder(folder, settings)
        identity = [backend.name, args.dtype, backend.weights]
        passes = config.passes(loaded, tokenizer, backend.stop_ids, seed=args.seed, identity=identity)
        _check_context(passes, backend)
        plan = _plan(args, config, loaded, passes, backend, folder)
        speed = _speed(args, config, loaded, passes[0], backend, scorer) if plan.there < plan.total else Speed()
    finally:
        scorer.close()
    memory, there = _memory(args, plan, machine) if backend.name == "transformers" else (None, None)
    rows = plan_rows(plan, memory, there, speed)
    name = f"{Path(args.dataset).name} · {Path(args.model).name} · {backend.name} · scorer {scorer.name}"
    print_table(
        f"Plan of Pass@k · {name}", ("what", "number", "note"), rows, _notes(args, loaded, plan, theirs), (0, 2)
    )
    return 0


def _recorded(folder: Path | None) -> dict[str, Any] | None:
    """`settings.json` of the folder; None where there is none."""
    from fdiv.sealed import read_record

    mark = None if folder is None else folder / "settings.json"
    return None if mark is None or not mark.is_file() else read_record(mark, "choose another --output")


def _backend(
    args: argparse.Namespace, config: PassKEvalConfig, loaded: LoadedTasks, tokenizer: Any, theirs: Any
) -> Backend:
    """The back end of the run; with `--probe 0` a model is not loaded, and taken for the one that the folder knows."""
    from fdiv.eval.pass_at_k.backends import backend_name
    from fdiv.inference.greedy import stop_token_ids
    from fdiv.models.loading import context_of

    if args.probe != 0 or backend_name(args) != "transformers":
        return make_backend(args, config, loaded, tokenizer)
    context = context_of(args.model)
    stop_ids = end_tokens(args.model) | stop_token_ids(None, tokenizer)
    weights, made = (theirs or {}).get("weights"), (theirs or {}).get("made_with") or {}
    return Backend("transformers", lambda *_: {}, stop_ids, made.get("dtype", str(_dtype(args))), weights, context)


def _check_context(passes: Sequence[SamplingPass], backend: Backend) -> None:
    for request in passes[0].requests:
        prompt = max(len(request.prompt_ids), len(request.stripped_ids))
        if backend.context is not None and prompt + request.max_new_tokens > backend.context:
            raise DataError(
                f"{request.key}: a prompt of {prompt} tokens and max_new_tokens={request.max_new_tokens} exceed the "
                f"context of {backend.context}: lower max_new_tokens, or leave such prompts out"
            )


def _plan(
    args: argparse.Namespace, config: PassKEvalConfig, loaded: LoadedTasks, passes: Sequence[SamplingPass],
    backend: Backend, folder: Path | None,
) -> SamplingPlan:  # fmt: skip
    from fdiv.inference.padding import safe_batch_size

    size = config.batch_size if backend.model is None else safe_batch_size(backend.model, config.batch_size)
    cache = None if folder is None else folder / "cache"
    return make_plan(
        passes,
        [kept_keys(cache, one.kind, one.digest) for one in passes],
        tasks=len(loaded.tasks),
        samples=config.n,
        batch_size=size,
        processes=getattr(args, "processes", 1),
        servers=0 if backend.servers is None else len(backend.servers.living()),
    )


def _speed(
    args: argparse.Namespace, config: PassKEvalConfig, loaded: LoadedTasks, one: SamplingPass, backend: Backend,
    scorer: Any,
) -> Speed | None:  # fmt: skip
    wanted = args.probe if args.probe is not None else 0 if backend.servers is not None else _REQUESTS
    if not wanted:
        return None
    return measure(backend, one, loaded, scorer, batch_size=config.batch_size, requests=wanted)


def _dtype(args: argparse.Namespace) -> torch.dtype:
    """The number type a model is loaded in here."""
    from fdiv.models.dtypes import dtype_name

    name = dtype_name(args.dtype)
    if name != "auto":
        return getattr(torch, name)
    stored = getattr(_model_config(args), "dtype", None)
    return torch.float32 if not torch.accelerator.is_available() or stored is None else stored


def _model_config(args: argparse.Namespace) -> Any:
    from transformers import AutoConfig

    from fdiv.models.fetch import find_model
    from fdiv.models.loading import base_and_adapter

    return AutoConfig.from_pretrained(find_model(base_and_adapter(args.model, args.adapter)[0]))


def _memory(
    args: argparse.Namespace, plan: SamplingPlan, machine: tuple[str, int]
) -> tuple[Any, tuple[str, int] | None]:
    from fdiv.memory.generation import generation_memory

    if not plan.batches:
        return None, None
    rows = max(batch.rows for batch in plan.batches)
    memory = generation_memory(_model_config(args), _dtype(args), rows, plan.longest)
    place, free = machine
    if not torch.cuda.is_available():  # the processes share it
        free //= max(1, len(plan.shares))
        place = place if len(plan.shares) == 1 else f"a process's share of {place}"
    return memory, (place, free)


def _notes(args: argparse.Namespace, loaded: LoadedTasks, plan: SamplingPlan, theirs: Any) -> list[str]:
    notes = []
    if loaded.read is not None and loaded.read != len(loaded.tasks):
        notes.append(f"{len(loaded.tasks)} of the {loaded.read} problems of the data set: skip_tasks, max_tasks")
    if len(plan.shares) > 1:
        idle = sum(not share for share in plan.shares)
        notes.append("the times take each process for as fast as one alone; on a CPU they share its cores")
        if idle:
            notes.append(
                f"{idle} of {len(plan.shares)} processes have nothing to do: a smaller --batch_size shares more"
            )
    if args.probe == 0 and theirs is not None and not args.server_url:
        notes.append(
            "the model was not loaded: its weights were not compared with those of the samples that are there"
        )
    return notes
