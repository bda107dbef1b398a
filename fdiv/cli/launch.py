"""`--accelerate`: the same command again, in the processes that an accelerate configuration asks for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdiv.child_processes import descendants, wait_until_gone
from fdiv.errors import RecipeError
from fdiv.methods import lookup
from fdiv.terminal import info

if TYPE_CHECKING:
    import psutil

__all__ = ["accelerate_config", "check_options", "launch", "launch_command", "process_count", "read_accelerate_config"]

_OWN_OPTIONS = ("--accelerate", "--num_processes")
# torchrun, which accelerate uses too, kills its workers so many seconds after SIGTERM; its default is 30, in which a
# long step or a large save does not end.
_SHUTDOWN_VARIABLE, _SHUTDOWN_SECONDS = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 3600


def accelerate_config(name: str) -> Path:
    """The file of an accelerate configuration: a path, or the name of a packaged one.

    Raises:
        RecipeError: neither; the message lists the packaged names.
    """
    if Path(name).is_file():
        return Path(name)
    folder = Path(str(resources.files("fdiv.recipes"))) / "accelerate"
    packaged = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    return lookup(packaged, name, "accelerate configuration", "--accelerate (neither a file nor packaged)")


def read_accelerate_config(name: str) -> tuple[Path, dict[str, Any]]:
    """The file of an accelerate configuration, and what it says.

    Raises:
        RecipeError: no such configuration, a file that cannot be read or is not YAML, or no mapping, at the top or in
            the blocks for DeepSpeed and FSDP.
    """
    import yaml

    config = accelerate_config(name)
    remedy = "give a file that `accelerate config` wrote, or the name of a packaged configuration"
    try:
        content: Any = yaml.safe_load(config.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{config}, line {mark.line + 1}" if mark else str(config)
        problem = getattr(error, "problem", None) or error
        raise RecipeError(f"--accelerate {where}: not valid YAML: {problem}; {remedy}") from error
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a date that is none
        raise RecipeError(f"--accelerate {config}: cannot be read: {error}; {remedy}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"--accelerate {config}: not an accelerate configuration (a mapping); {remedy}")
    for key in ("deepspeed_config", "fsdp_config"):
        if not isinstance(content.get(key) or {}, dict):
            raise RecipeError(f"--accelerate {config}: {key}: {content[key]!r} is not a mapping; {remedy}")
    return config, content


def process_count(content: Mapping[str, Any], origin: object, num_processes: int | None = None) -> int:
    """How many processes a configuration asks for, one where it does not say; `num_processes` wins.

    Args:
        content: of the configuration. origin: its file or name, for the message.

    Raises:
        RecipeError: not a whole number from 1 on.
    """
    count = content.get("num_processes", 1) if num_processes is None else num_processes
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        stated = f"--accelerate {origin}: num_processes: {count!r}"
        what = stated if num_processes is None else f"--num_processes {count}"
        raise RecipeError(f"{what}: must be a whole number, 1 or more")
    return count


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
    child_environment = {_SHUTDOWN_VARIABLE: str(_SHUTDOWN_SECONDS), **os.environ}
    received: list[int] = []
    started: set[psutil.Process] = set()
    with subprocess.Popen(command, start_new_session=True, env=child_environment) as process:

        def forward(number: int, _: object) -> None:
            received.append(number)
            started.update(descendants(process.pid))
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, number)

        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, forward) for number in numbers]
        try:
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
