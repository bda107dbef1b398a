"""`--accelerate`: the same command again, in the processes that an accelerate configuration asks for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from fdiv.errors import RecipeError
from fdiv.methods import lookup
from fdiv.terminal import info

__all__ = ["accelerate_config", "launch", "launch_command"]

_OWN_OPTIONS = ("--accelerate", "--num_processes")


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


def launch_command(
    name: str, words: Sequence[str], num_processes: int | None = None, mixed_precision: str | None = None
) -> list[str]:
    """The command that starts `fdiv WORDS` under the configuration.

    `accelerate launch`; torchrun for CPU processes without DeepSpeed, which `accelerate launch` starts through mpirun
    only. On a machine without an accelerator `--use_cpu true` is added, unless the command says it either way: without
    it accelerate believes in one process. `num_processes` and `mixed_precision` win over the configuration's.

    Raises:
        RecipeError: no such configuration, one that is no mapping, or FSDP without an accelerator.
    """
    import torch
    import yaml

    config = accelerate_config(name)
    content: Any = yaml.safe_load(config.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise RecipeError(f"--accelerate {config}: not an accelerate configuration (a mapping)")
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
    count = content.get("num_processes", 1) if num_processes is None else num_processes
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

    SIGTERM and SIGINT go to all its processes: a launcher may end at the first without telling those it started, and
    they are to save and stop.
    """
    command = launch_command(name, words, num_processes, mixed_precision)
    with subprocess.Popen(command, start_new_session=True) as process:
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, lambda sent, _: os.killpg(process.pid, sent)) for number in numbers]
        try:
            return process.wait()
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


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
