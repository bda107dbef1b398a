"""Several processes that share one evaluation: started here, ended together, their errors shown as one line."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from fdiv import terminal
from fdiv.errors import RecipeError
from fdiv.memory.accelerate import process_count, read_accelerate_config
from fdiv.secrets import redacted

__all__ = ["join", "processes_asked_for", "reserved_port", "run_together"]

_ERRORS = "FDIV_EVAL_ERRORS"  # the folder where `fdiv.terminal.error` leaves the errors of these processes
_GRACE = 5.0  # seconds between SIGTERM and SIGKILL: a process in a collective call hears only the second
_LOOK = 0.05
_MOMENT = 1.0
_LATE = 3.0  # seconds that a traceback waits: most are of a process whose partner has just ended
_SHOWN = 20_000  # characters of what a process said before it ended without a reason
_PR_SET_PDEATHSIG = 1
_MODELS = "every process of an evaluation holds the whole model, and DeepSpeed and FSDP shard it"


def processes_asked_for(name: str, num_processes: int | None) -> tuple[int, dict[str, str]]:
    """How many processes an accelerate configuration asks for, and the environment variables it stands for.

    Raises:
        RecipeError: no such configuration, one that cannot be used, that shards the model, that is for several
            machines, or more processes than this machine has accelerators.
    """
    config, content = read_accelerate_config(name)
    count = process_count(content, config, num_processes)
    kind = str(content.get("distributed_type") or "NO")
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        raise RecipeError(f"--accelerate {name}: {_MODELS}: use multi_gpu, or cpu_ddp on a CPU")
    machines = content.get("num_machines") or 1
    if machines != 1:
        raise RecipeError(
            f"--accelerate {name}: num_machines: {machines}: on several machines run `accelerate launch --config_file "
            f"{config} -m fdiv eval …` on each, with an --output that all of them see"
        )
    environment = {} if content.get("gpu_ids") in (None, "all") else {"CUDA_VISIBLE_DEVICES": str(content["gpu_ids"])}
    if content.get("use_cpu"):
        environment["ACCELERATE_USE_CPU"] = "true"
    elif count > 1:
        _check_devices(name, count, content.get("gpu_ids"))
    return count, environment


def _check_devices(name: str, count: int, ids: Any) -> None:
    import torch

    there = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    there = there if ids in (None, "all") else min(there, len(str(ids).split(",")))
    if 0 < there < count:
        raise RecipeError(
            f"--accelerate {name} asks for {count} processes, and this machine has {there} accelerators for them: "
            f"say --num_processes {there}"
        )
    if not there:
        terminal.info("--accelerate: this machine has no accelerator, so the processes share its CPU")


def run_together(words: Sequence[str], count: int, environment: Mapping[str, str], go_on: str) -> int:
    """Run `fdiv WORDS` in `count` processes that find each other as accelerate's do. Returns the exit code.

    Each is what `accelerate launch` starts: one rank, on its own accelerator or with its share of the CPU's threads.
    The main process writes and shows the progress. Where one fails or is killed, the others are ended, and one line
    says what happened, with `go_on`; they end with this process, too.
    """
    with tempfile.TemporaryDirectory(prefix="fdiv-eval-") as folder, reserved_port() as port:
        shared = {**os.environ, **environment, **_group(count, port), _ERRORS: folder}
        started: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(count):
                own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                command = [sys.executable, "-m", "fdiv", *words]
                with nullcontext() if rank == 0 else _heard(folder, rank).open("wb") as heard:
                    process = subprocess.Popen(command, env=own, stderr=heard, preexec_fn=_ends_with(os.getpid()))
                started.append(process)
            while True:
                codes = [process.poll() for process in started]
                failed = next((rank for rank, code in enumerate(codes) if code), None)
                if failed is not None:
                    _wait_for_the_same(started, Path(folder))
                    return _said(failed, int(codes[failed] or 1), count, Path(folder), go_on)
                if all(code == 0 for code in codes):
                    return 0
                time.sleep(_LOOK)
        finally:
            _end(started)


def _heard(folder: str | Path, rank: int) -> Path:
    """Where the words of a process other than the main one go: bars and warnings that the main one shows too."""
    return Path(folder) / f"heard-{rank}"


@contextmanager
def reserved_port() -> Iterator[int]:
    """A free port that the system gives to no one else inside, until a process that is told of it listens there.

    The processes of a group need seconds before they meet, in which a port that was let go is often another's. Torch's
    store reuses addresses (`SO_REUSEADDR`), so it can listen where this socket is bound and does not listen.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("", 0))
        yield held.getsockname()[1]


def _group(count: int, port: int) -> dict[str, str]:
    """Where the processes meet, and their share of the threads, unless that is set."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // count))
    return {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": threads,
    }  # fmt: skip


def _ends_with(parent: int) -> Callable[[], None] | None:
    """What a new process does first on Linux: it asks to be killed when the one that started it ends."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)

    def ask() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended in between
            os._exit(1)

    return ask


def _wait_for_the_same(started: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    """What is wrong with data or options all find at about the same time: give the main process a moment to say it."""
    stop = time.monotonic() + _MOMENT
    while time.monotonic() < stop and not _words(folder / "0") and started[0].poll() is None:
        time.sleep(_LOOK)


def _words(errors: Path) -> str:
    """What a process left there; empty also while it writes."""
    return errors.read_text(encoding="utf-8").strip() if errors.is_file() else ""


def _said(rank: int, code: int, count: int, folder: Path, go_on: str) -> int:
    """Show why process `rank` ended, as one line; the exit code."""
    who = f"process {rank} of {count}"
    if text := _words(folder / str(rank)):
        terminal.error(text if _words(folder / "0") == text else f"{who}: {text}")
        return code
    if code < 0:
        with suppress(ValueError):
            code, name = 128 - code, signal.Signals(-code).name
            because = " (the system's usual reason is that memory ran out)" if name == "SIGKILL" else ""
            terminal.error(f"{who} was killed by {name}{because}; the others were ended: {go_on}")
        return code
    if rank:  # a traceback, if anything
        sys.stderr.write(redacted(_heard(folder, rank).read_text(encoding="utf-8", errors="replace")[-_SHOWN:]))
    terminal.error(f"{who} ended with exit code {code}; the others were ended: {go_on}")
    return code


def _end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """End those that still run: SIGTERM, and SIGKILL for what does not hear it."""
    running = [process for process in started if process.poll() is None]
    for process in running:
        with suppress(ProcessLookupError):
            process.terminate()
    stop = time.monotonic() + _GRACE
    while any(process.poll() is None for process in running) and time.monotonic() < stop:
        time.sleep(_LOOK)
    for process in running:
        if process.poll() is None:
            process.kill()
        process.wait()


def join() -> None:
    """What a process does that `run_together` started, before its work: join the others, leave errors to the starter.

    A traceback waits a little: where another process has ended, this one is ended meanwhile, and says nothing.
    """
    if _ERRORS in os.environ:
        shown = sys.excepthook

        def late(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            time.sleep(_LATE)
            shown(kind, error, trace)

        sys.excepthook = late
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from fdiv.inference.processes import join_processes

        join_processes()
