"""The process that the workers of a `WorkerPool` are forked from. Run by path; it needs the standard library alone.

    python template.py CONTROL_FD TASK_FILE SETTINGS

TASK_FILE is a Python file with `prepare(settings)` and `answer(item) -> dict`. It is loaded and prepared once, here:
replacing a worker costs a fork and no import. CONTROL_FD is a sequenced-packet socket: each message brings the
socket of one new worker and the number of the process it replaces (0: none). When the other end closes, as it does
when the trainer ends in whatever way, every worker is killed and this process ends.

A worker speaks JSON, one object per line: `{"ready": pid}` first, then one answer for each item it is sent.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["limit_memory", "main", "serve"]


def limit_memory(address_space: int) -> None:
    """Bound the address space in bytes; no core files, and no file can be written."""
    for what, limit in (
        (resource.RLIMIT_AS, address_space),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (limit, limit))


def _answered(task: ModuleType, item: Any) -> dict[str, Any]:
    try:
        return {"value": task.answer(item)}
    except MemoryError:
        return {"error": "memory", "detail": "MemoryError"}
    # Whatever else an item provokes is that item's failure: it is reported by name and counted, never scored.
    except Exception as error:
        return {"error": "crash", "detail": f"{type(error).__name__}: {error}"[:500]}


def serve(channel: socket.socket, task: ModuleType, settings: dict[str, Any]) -> None:
    """Answer items until the channel closes."""
    if settings.get("address_space") is not None:
        limit_memory(settings["address_space"])
    quiet = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(quiet, standard)
    channel.sendall(json.dumps({"ready": os.getpid()}).encode() + b"\n")
    with channel.makefile("rb") as lines:
        for line in lines:
            # A worker whose trainer is gone ends itself, even inside one C call: the kernel delivers this. The pool's
            # own limit comes first.
            signal.setitimer(signal.ITIMER_REAL, settings["wall_limit"] + 5.0)
            reply = _answered(task, json.loads(line))
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            channel.sendall(json.dumps(reply).encode() + b"\n")


def _load(path: str) -> ModuleType:
    """The task's module, as `task.NAME`: relative imports find its neighbours, and no package above is imported."""
    file = Path(path)
    package = sys.modules["task"] = ModuleType("task")
    package.__path__ = [str(file.parent)]
    return importlib.import_module(f"task.{file.stem}")


def main(control_number: int, task_file: str, settings: dict[str, Any]) -> None:
    """Prepare the task, then fork a worker for each message until the control socket closes."""
    control = socket.socket(fileno=control_number)
    task = _load(task_file)
    task.prepare(settings)
    control.send(b"ready")
    children: set[int] = set()
    while True:
        message, numbers, _, _ = socket.recv_fds(control, 64, 1)
        if not message:
            break
        if ended := int(message):
            # Killed by the trainer already. Only now is its number free for another process.
            children.discard(ended)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(ended, 0)
        channel = socket.socket(fileno=numbers[0])
        child = os.fork()
        if child == 0:
            control.close()
            status = 1
            try:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    serve(channel, task, settings)
                    status = 0
            finally:
                os._exit(status)
        children.add(child)
        channel.close()
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to answer
    main(int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
