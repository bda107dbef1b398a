"""`fdiv eval`: one evaluation, in this process or in several that share it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fdiv.cli import shared_processes
from fdiv.errors import RecipeError
from fdiv.lock import output_lock, refuse_locked

__all__ = ["GO_ON", "add_process_arguments", "evaluate"]

GO_ON = "run the same command again; a kind that keeps its items goes on from them"

_ONE_PROCESS = {
    "from_samples": "--from_samples reads recorded samples, which one process does",
    "from_logs": "--from_logs reads a log, which one process does",
    "check_golds": "--check_golds scores the golds, which one process does",
    "server_url": "--server_url: one process asks the servers, with as many requests at once as --batch_size says",
}
_OTHER_NAMES = {"--n": "--samples_per_task"}  # which torchrun and accelerate take for the beginning of their own


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """`--accelerate` and `--num_processes`.

    Raises:
        RecipeError: a kind of one's own has options of these names.
    """
    try:
        _add(parser)
    except argparse.ArgumentError as error:
        raise RecipeError(
            f"{parser.prog}: {error}: fdiv has this option for all kinds, rename that of yours"
        ) from None


def _add(parser: argparse.ArgumentParser) -> None:
    several = parser.add_argument_group("several processes")
    several.add_argument(
        "--accelerate", metavar="NAME_OR_FILE", help="share the rows over the processes of this configuration"
    )
    several.add_argument(
        "--num_processes", type=int, metavar="N", help="with --accelerate: processes, instead of the configuration's"
    )


def evaluate(command: Any, args: argparse.Namespace, words: Sequence[str]) -> int:
    """Run an evaluation as `args` say. Returns the exit code.

    Args:
        command: the module of the kind. args: its options and those of `add_process_arguments`, which are taken out.
        words: the command line after `fdiv`.

    Raises:
        RecipeError: processes for what one process does, or a configuration that cannot be used.
    """
    accelerate, number = args.accelerate, args.num_processes
    del args.accelerate, args.num_processes
    dry_run = bool(vars(args).get("dry_run"))
    count, environment = 1, {}
    if accelerate is not None:
        count, environment = shared_processes.processes_asked_for(accelerate, number)
    elif number is not None:
        raise RecipeError(
            f"--num_processes {number}: without --accelerate there is one process; name the configuration as well "
            "(`--accelerate multi_gpu`, on a CPU `cpu_ddp`), or leave it out"
        )
    if max(count, int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        _check_shared(command, args)
    if dry_run:
        args.processes = count
        return command.run(args)
    if count > 1:
        if vars(args).get("output"):
            refuse_locked(Path(args.output))
        return shared_processes.run_together(_without(words), count, environment, GO_ON)
    os.environ.update(environment)
    shared_processes.join()
    with output_lock(Path(args.output)) if vars(args).get("output") else nullcontext():
        return command.run(args)


def _check_shared(command: Any, args: argparse.Namespace) -> None:
    """Refuse, before anything is loaded, what several processes cannot share.

    Raises:
        RecipeError: with the reason.
    """
    options = vars(args)
    reason = next((reason for name, reason in _ONE_PROCESS.items() if options.get(name)), None)
    if options.get("backend") == "vllm":
        reason = "--backend vllm runs in one process, and vLLM uses the other GPUs by itself"
    if reason is None and hasattr(command, "one_process"):
        reason = command.one_process(args)
    if reason is not None:
        raise RecipeError(f"{reason}: leave --accelerate and other launchers out")


def _without(words: Sequence[str]) -> list[str]:
    """The words without `--accelerate` and `--num_processes`, names in a form that no launcher takes for its own."""
    kept: list[str] = []
    skip = False
    for word in words:
        name, equals, value = word.partition("=")
        if skip:
            skip = False
        elif name in ("--accelerate", "--num_processes"):
            skip = not equals
        else:
            kept.append(f"{_OTHER_NAMES.get(name, name)}{equals}{value}" if word.startswith("--") else word)
    return kept
