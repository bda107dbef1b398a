"""Processes of their own, forked from one that has imported the trainers: a start takes a second instead of eleven."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdiv.cli.launch import descendants
from fdiv.cli.shared_processes import reserved_port

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:  # pytest imports the tests without it; the new processes take it over
    sys.path.append(ROOT)


@dataclass(frozen=True)
class Ended:
    """Exit code of each process (negative: the signal that killed it) and what each wrote."""

    codes: list[int]
    stdout: list[str]
    stderr: list[str]


def run(function: Callable[..., Any], *arguments: Any, processes: int = 1, timeout: float = 560) -> Ended:
    """Call `function(*arguments)` in a process, or in several that find each other as torchrun's do (gloo, on the CPU).

    The function has to be importable and its arguments are pickled. The environment is that of the caller.
    """
    # A server without threads of torch's, which every fork would lack.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preload"])
    with tempfile.TemporaryDirectory() as folder, reserved_port() as port:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if processes > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        started = [
            context.Process(target=_call, args=(folder, rank, environment, os.getcwd(), function, arguments))
            for rank in range(processes)
        ]
        for process in started:
            process.start()
        _wait(started, timeout)
        texts = {
            name: [(Path(folder) / f"{rank}.{name}").read_text(errors="replace") for rank in range(processes)]
            for name in ("stdout", "stderr")
        }
        return Ended([process.exitcode for process in started], **texts)


def run_well(function: Callable[..., Any], *arguments: Any, processes: int = 1, timeout: float = 560) -> Ended:
    """As `run`; every process has to end with 0."""
    ended = run(function, *arguments, processes=processes, timeout=timeout)
    assert not any(ended.codes), f"exit codes {ended.codes}: " + "\n".join(text[-3000:] for text in ended.stderr)
    return ended


def end_with_group(command: Sequence[str], timeout: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with captured text; when the time is up, what the command has started is killed, too.

    Processes that a launcher left would hold the pipes, the cores and the locks of builds. A script that calls
    `faulthandler.dump_traceback_later` has written by then where it stands.
    """
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            left = {process.pid, *(child.pid for child in descendants(process.pid))}
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
            raise AssertionError(f"not ended after {timeout} s: {command}\n{stderr[-8000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def wait_for_step(
    process: subprocess.Popen[Any], metrics: Path, step: int, seconds: float = 240, look: float = 0.2
) -> None:
    """Until `metrics.jsonl`, which `process` is writing, has a whole line of that step."""
    stop = time.monotonic() + seconds
    while time.monotonic() < stop and process.poll() is None:
        lines = metrics.read_text().rpartition("\n")[0].splitlines() if metrics.is_file() else ()
        if any(json.loads(line).get("step", 0) >= step for line in lines):
            return
        time.sleep(look)
    process.kill()
    raise AssertionError(f"no step {step}: {process.communicate()[1][-2000:]}")


def run_script(script: Path, folder: Path) -> None:
    """For `run`: what `python SCRIPT` does in a folder."""
    os.chdir(folder)
    sys.argv = [str(script)]  # not pytest's
    runpy.run_path(str(script), run_name="__main__")


def _wait(started: list[Any], timeout: float) -> None:
    """Until all have ended; when one fails or the time is up, the others are killed: they would wait for it."""
    stop = time.monotonic() + timeout
    while any(process.is_alive() for process in started):
        failed = any(process.exitcode for process in started)
        if failed or time.monotonic() > stop:
            for process in started:
                process.join(5 if failed else 0)
                process.kill()
        for process in started:
            process.join(0.05)


def _call(folder: str, rank: int, environment: dict[str, str], cwd: str, function: Any, arguments: Any) -> None:
    """What each process does. Its output goes to files, also what a library writes below Python."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder) / f"{rank}.{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    if "WORLD_SIZE" in environment:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    os.chdir(cwd)
    import torch

    torch.set_num_threads(1)
    function(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
