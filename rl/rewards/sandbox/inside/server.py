"""The first process of a sandbox: fork a child for each answer, end it, and say how it ended.

    server.main(DESCRIPTOR, ROLE)

The descriptor is a sequenced-packet socket. The first message is `filter` and the filter of system calls of the
children. Then each message `begin`, which brings descriptors, forks a child that runs `ROLE.serve` with them. `end S`
waits S seconds for its end and then kills it; the reply is its wait status, whether it was killed, and whether it left
the temporary folder empty. A child can neither fork nor signal,
so that nothing of it is left; a sandbox whose folder is not empty is thrown away by the worker.

The interpreter and the modules that programs import most are loaded once, before the forks.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback

from .confine import UNCONFINED, become_nobody, filter_calls

__all__ = ["main"]

LOADED = (
    "asyncio", "bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "enum", "fractions", "functools",
    "heapq", "io", "itertools", "json", "math", "operator", "random", "re", "statistics", "string", "typing",
)  # fmt: skip

ONE_THREAD = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def _child(role: str, numbers: list[int], filtered: bytes) -> int:
    """Run one child; return its exit status."""
    try:
        if filtered:
            filter_calls(filtered)
        module = importlib.import_module(f".{role}", __package__)
        module.serve(*numbers)
    except SystemExit as leaving:
        return 0 if leaving.code is None else leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _ended(child: int, patience: float) -> tuple[int, bool]:
    """The wait status of a child, and whether it had to be killed."""
    deadline = time.monotonic() + patience
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status, False
        if time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1], True
        time.sleep(0.001)


def _leave(child: int) -> None:
    """End this process, its child, and the folder that was made for it where there is no sandbox."""
    if child:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    if os.path.basename(os.getcwd()).startswith(UNCONFINED):
        shutil.rmtree(os.getcwd(), ignore_errors=True)
    os._exit(0)


def main(descriptor: int, role: str, packages: tuple[str, ...] = ()) -> None:
    """Serve until the socket closes. `packages` are loaded too; they must not start threads, which no child has."""
    os.closerange(3, descriptor)  # what made the sandbox
    os.closerange(descriptor + 1, 1024)
    become_nobody()
    os.environ.update(dict.fromkeys(ONE_THREAD, "1") if packages else {})
    for name in LOADED + packages:
        importlib.import_module(name)
    for name in ONE_THREAD:
        os.environ.pop(name, None)
    control = socket.socket(fileno=descriptor)
    control.sendall(b"ready")
    filtered = control.recv(1 << 16).removeprefix(b"filter")
    child = 0
    while True:
        message, numbers, _, _ = socket.recv_fds(control, 16, 3)
        if not message:
            _leave(child)
        if message.startswith(b"end"):
            status, killed = _ended(child, float(message[3:]))
            child = 0
            control.sendall(json.dumps({"status": status, "killed": killed, "clean": not os.listdir()}).encode())
            continue
        child = os.fork()
        if child == 0:
            control.close()
            status = _child(role, numbers, filtered)
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(status & 0xFF)
        for number in numbers:
            os.close(number)
