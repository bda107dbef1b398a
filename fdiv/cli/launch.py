"""`--accelerate`: the same command again, in the processes that an accelerate configuration asks for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from fdiv import lazy
from fdiv.cli.build_locks import remove_stale_locks
from fdiv.errors import RecipeError
from fdiv.memory.accelerate import process_count, read_accelerate_config
from fdiv.terminal import info

if TYPE_CHECKING:
    import psutil

__all__ = ["check_options", "descendants", "launch", "launch_command", "wait_until_gone"]

_OWN_OPTIONS = ("--accelerate", "--num_processes")
# torchrun, which accelerate uses too, kills its workers this long after SIGTERM; its default is 30, in which a
# long step or a large save does not end.
_SHUTDOWN_VARIABLE, _SHUTDOWN_SECONDS = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 3600


def check_options(accelerate: str | None, num_processes: int | None) -> None:
    """Refuse `--accelerate` and `--num_processes` that no run could start with.

    Raises:
        RecipeError: a number of processes alone or below 1, or what `read_accelerate_config` raises.
    """
    if accelerate is not None:
        config, content = read_accelerate_config(accelerate)
        process_count(content, config, num_processes)
    elif num_processes is not None:
        raise RecipeError(
            f"--num_processes {num_processes}: without --accelerate there is one process; name the configuration as "
            "well (`--accelerate multi_gpu`), or leave it out"
        )


def launch_command(
    name: str, words: Sequence[str], num_processes: int | None = None, mixed_precision: str | None = None
) -> list[str]:
    """The command that starts `fdiv WORDS` under the configuration.

    `accelerate launch`; torchrun for CPU processes without DeepSpeed, which `accelerate launch` starts through mpirun
    only. On a machine without an accelerator `--use_cpu true` is added, unless the command says it either way: without
    it accelerate believes in one process. `num_processes` and `mixed_precision` win over the configuration's.

    Raises:
        RecipeError: no such configuration, one that cannot be used, or FSDP without an accelerator.
    """
    import torch

    config, content = read_accelerate_config(name)
    count = process_count(content, config, num_processes)
    words = _without_own_options(words)
    stated = any(word.split("=")[0] in ("--use_cpu", "--no_use_cpu") for word in words)
    without_accelerator = not torch.accelerator.is_available()
    if without_accelerator and content.get("distributed_type") == "FSDP":
        raise RecipeError(
            f"--accelerate {name}: this machine has no accelerator, and accelerate leaves FSDP out on a CPU, silently "
            "(the run would be plain DDP): use cpu_zero3 to shard on CPU processes, or cpu_ddp"
        )
    if without_accelerator and not stated:
        info("--accelerate: this machine has no accelerator, so the run gets --use_cpu true")
        words += ["--use_cpu", "true"]
    if content.get("distributed_type") == "MULTI_CPU":
        single_machine = ["--standalone", "--nproc_per_node", str(count)]
        return [sys.executable, "-m", "torch.distributed.run", *single_machine, "-m", "fdiv", *words]
    # --quiet: the launcher's own traceback says nothing that the command has not said.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
    if mixed_precision is not None:
        launcher += ["--mixed_precision", mixed_precision]
    if num_processes is not None:
        launcher += ["--num_processes", str(num_processes)]
    return [*launcher, "-m", "fdiv", *words]


def launch(
    name: str, words: Sequence[str], num_processes: int | None = None, mixed_precision: str | None = None
) -> int:
    """Run `launch_command` and return its exit code.

    SIGTERM and SIGINT go to the launcher's process group: accelerate itself, which ends without telling the one
    process it started, and that process. torchrun passes them on to its workers, each of which has a group of its
    own, and `TORCH_ELASTIC_SHUTDOWN_TIMEOUT` gives them an hour to save, unless it is set. This returns when all of
    them have ended, also those that outlive the launcher. Where the launcher ended with an error after a signal, the
    code is the shell's for that signal, as without a launcher: 143 for SIGTERM. torchrun does so even if the workers
    ended well, so whether a checkpoint was saved is in their messages.
    """
    command = launch_command(name, words, num_processes, mixed_precision)
    if "accelerate.commands.launch" in command:  # perhaps with DeepSpeed, which compiles
        remove_stale_locks()
    child_environment = {_SHUTDOWN_VARIABLE: str(_SHUTDOWN_SECONDS), **os.environ}
    received: list[int] = []
    untold: list[int] = []
    started: set[psutil.Process] = set()
    running: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _: object) -> None:
        received.append(number)
        untold.append(number)
        tell()

    def tell() -> None:
        while running and untold:
            number = untold.pop(0)  # a signal may come in here, too: each is told once
            started.update(descendants(running[0].pid))
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(running[0].pid, number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, forward) for number in numbers]  # first: a signal while it starts reaches it, too
    try:
        with subprocess.Popen(command, start_new_session=True, env=child_environment) as process:
            running.append(process)
            tell()
            code = process.wait()
            if received:
                wait_until_gone(started, _SHUTDOWN_SECONDS)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    return 128 + received[-1] if received and code else code


def _without_own_options(words: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word in _OWN_OPTIONS:
            skip = True
        elif not word.startswith(tuple(f"{option}=" for option in _OWN_OPTIONS)):
            kept.append(word)
    return kept


def descendants(pid: int) -> set[psutil.Process]:
    """The children of a process, theirs, and so on; none when the process is not there."""
    import psutil

    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def wait_until_gone(processes: Iterable[psutil.Process], seconds: float) -> set[psutil.Process]:
    """Wait until the processes have ended, at most so long; those that have not.

    One that has ended and has not been collected counts as gone: its parent may be gone before it, and not every
    container has an init process that collects.
    """
    ends = time.monotonic() + seconds
    left = {process for process in processes if _runs(process)}
    while left and time.monotonic() < ends:
        time.sleep(0.05)
        left = {process for process in left if _runs(process)}
    return left


def _runs(process: psutil.Process) -> bool:
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# Names of release 0.1 that live elsewhere now.
__getattr__, __dir__ = lazy.attach(__name__, {"accelerate_config": "fdiv.memory.accelerate"})
