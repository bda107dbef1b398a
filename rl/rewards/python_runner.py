"""The worker side of `CodeReward`: run a program with its tests in a limited subprocess (`python_child.py`).

Loaded by path in a worker process of a `WorkerPool`; the program itself never runs in that worker.
"""

from __future__ import annotations

import contextlib
import hmac
import math
import os
import runpy
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

__all__ = ["answer", "prepare"]

CHILD = Path(__file__).with_name("python_child.py")
FILE_BYTES = 1 << 20

# By path: importing it as part of the package would bring the whole package into the worker.
find_program = runpy.run_path(str(Path(__file__).with_name("completions.py")))["find_program"]

_settings: dict[str, Any] = {}


def prepare(settings: dict[str, Any]) -> None:
    """Check that a program can run at all under its limits.

    Raises:
        RuntimeError: it cannot: every answer would look wrong.
    """
    _settings.update(settings)
    if _run("import collections, math, re, typing\nassert math.pi > 3\n")["verdict"] != "correct":
        raise RuntimeError(
            f"a program that is right fails under its limits: is memory={settings['memory']} or "
            f"program_time={settings['program_time']} too small, or {sys.executable} not readable by others?"
        )


def _delivered(descriptor: int, deadline: float) -> bytes | None:
    """What comes through the pipe until it closes or is full; None when the time is over."""
    received = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while len(received) < 64:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not selector.select(remaining):
                return None
            data = os.read(descriptor, 64 - len(received))
            if not data:
                break
            received += data
    return received


def answer(item: dict[str, Any]) -> dict[str, Any]:
    """`{"verdict": correct | wrong | over_time | no_answer}` for a completion, its prompt, and the tests."""
    program = find_program(
        item["completion"], item["prompt"], item["names"], continues=item["continues"], opened=item["opened"]
    )
    return _run(f"{program}\n\n{item['tests']}") if program else {"verdict": "no_answer"}


def _run(source: str) -> dict[str, Any]:
    token = secrets.token_hex(32).encode()
    with tempfile.TemporaryDirectory(prefix="fdiv-code-") as folder, contextlib.ExitStack() as stack:
        program = Path(folder) / "program.py"
        program.write_text(source, encoding="utf-8", errors="replace")
        Path(folder).chmod(0o755)
        pipes = [os.pipe(), os.pipe()]
        opened = {number for pipe in pipes for number in pipe}
        stack.callback(lambda: [os.close(number) for number in opened])
        (token_in, feed), (collect, token_out) = pipes
        os.write(feed, token)
        limits = [math.ceil(_settings["program_time"]) + 1, _settings["memory"], FILE_BYTES]
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(CHILD), str(program), *map(str, limits), str(token_in),
             str(token_out)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder, env={},
            pass_fds=(token_in, token_out), start_new_session=True,
        )  # fmt: skip
        for number in (feed, token_in, token_out):
            os.close(number)
            opened.discard(number)
        try:
            received = _delivered(collect, time.monotonic() + _settings["program_time"])
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if received is None:
        return {"verdict": "over_time"}
    return {"verdict": "correct" if hmac.compare_digest(received, token) else "wrong"}
