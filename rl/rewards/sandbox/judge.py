"""The worker side of `CodeReward`: a program in one sandbox, its tests in another, and the verdict from outside.

Loaded by path in the worker processes of a `WorkerPool`, on the standard library alone; neither the program nor the
tests run in that worker. A worker has one sandbox for programs and one for tests. Each forks a child for each answer,
one at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import runpy
import selectors
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

from .bubblewrap import Bubblewrap
from .inside.wire import Channel, ClosedError, WireError
from .server import CrashError, Server
from .unconfined import Unconfined

__all__ = ["Judge", "answer", "prepare"]

BACKENDS = {"bubblewrap": Bubblewrap, "none": Unconfined}
FILE_BYTES = 1 << 20
MOST_OUTPUT = 16 << 20  # bytes that a script may print
END_SECONDS = 2.0  # in which a process whose socket has closed comes to its end
UNUSABLE = {"verdict": "unusable_gold", "detail": "the tests take more than the time by themselves"}
LEAST = 0.001  # seconds; a socket's limit of 0 would mean another thing

RIGHT = {
    "program": (
        "import collections, math, re, typing\nroom = bytearray(16 << 20)\n"
        "def area(r: float) -> float:\n    return math.pi * r * r\n"
    ),
    "tests": "assert 3 < area(1) < 4", "setup": "", "given": [], "entry_point": "", "names": ["area"],
}  # fmt: skip


class Judge:
    """Judges one answer at a time.

    Args:
        sandbox: A key of `BACKENDS`.
        numpy: Program and tests may import numpy.
        program_time: Seconds of wall time for one answer.
        memory: Bytes of address space of the program, and of the tests.
    """

    def __init__(self, sandbox: str, program_time: float, memory: int, numpy: bool = False) -> None:
        backend = BACKENDS[sandbox](numpy)
        self.own_doing: dict[str, bool] = {}  # digest of tests → whether they take too long without the program
        self.program, self.tests = Server(backend, "program"), Server(backend, "examiner")
        self.program_time = program_time
        self.limits = {"memory": memory, "seconds": math.ceil(program_time) + 1, "file_bytes": FILE_BYTES}

    def close(self) -> None:
        """End both sandboxes."""
        self.program.close()
        self.tests.close()

    def verdict(self, item: dict[str, Any]) -> dict[str, Any]:
        """The verdict on a program: `{"verdict": correct | wrong | over_time | unusable_gold}`.

        Raises:
            CrashError: a process ended by a signal that was not sent from here, or a sandbox is gone.
        """
        self.program.start()
        self.tests.start()
        deadline = time.monotonic() + self.program_time
        if "cases" not in item:
            found = self._tested(item, deadline)
            return UNUSABLE if found["verdict"] == "over_time" and self._tests_alone(item) else found
        if any(len(expected) > MOST_OUTPUT for _, expected in item["cases"]):
            return {
                "verdict": "unusable_gold",
                "detail": f"an output of more than {MOST_OUTPUT} characters is expected",
            }
        for given, expected in item["cases"]:
            verdict = self._printed(item["program"], given, expected, deadline)
            if verdict["verdict"] != "correct":
                return verdict
        return {"verdict": "correct"}

    def _tests_alone(self, item: dict[str, Any]) -> bool:
        """Whether the tests take more than the time with a program that is empty: what they call fails at once."""
        parts = [item[name] for name in ("tests", "setup", "entry_point", "given")]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        if key not in self.own_doing:
            self.program.start()
            self.tests.start()
            deadline = time.monotonic() + self.program_time
            self.own_doing[key] = self._tested({**item, "program": ""}, deadline)["verdict"] == "over_time"
        return self.own_doing[key]

    def _tested(self, item: dict[str, Any], deadline: float) -> dict[str, Any]:
        """The verdict of the tests' code."""
        with contextlib.ExitStack() as stack:
            # Tests and program talk directly; this process hears the tests alone.
            called, calling = (stack.enter_context(end) for end in socket.socketpair())
            ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
            self.program.begin(called.fileno())
            self.tests.begin(theirs.fileno(), calling.fileno())
            for end in (called, calling, theirs):
                end.close()
            task = {"source": item["program"], **self.limits}
            verdict = _heard(ours, {**item, "program": task, **self.limits}, deadline)
            tests = self.tests.end(0.0 if verdict is None else END_SECONDS)
            ended = verdict is not None and verdict.get("verdict") == "ended"
            program = self.program.end(END_SECONDS if ended else 0.0)
        if verdict is None:
            return {"verdict": "over_time"}
        if not verdict:
            tests.check("the tests")
            return {"verdict": "wrong", "detail": "the tests ended their process"}
        if ended:
            program.check("the program")
            return {"verdict": "wrong", "detail": "the program ended its process"}
        return verdict

    def _printed(self, source: str, given: str, expected: str, deadline: float) -> dict[str, Any]:
        """The verdict on what a script prints for one input."""
        with contextlib.ExitStack() as stack:
            theirs, ours = (stack.enter_context(end) for end in socket.socketpair())
            reading, writing = os.pipe()
            stack.callback(os.close, reading)
            with tempfile.TemporaryFile() as standard, os.fdopen(writing, "wb") as output:
                standard.write(given.encode(errors="replace"))
                standard.seek(0)
                self.program.begin(theirs.fileno(), standard.fileno(), output.fileno())
            theirs.close()
            ours.settimeout(max(LEAST, deadline - time.monotonic()))
            with contextlib.suppress(ClosedError, TimeoutError):
                Channel(ours).send({"source": source, **self.limits})
            printed = _read(reading, deadline)
            complete = printed is not None and len(printed) <= MOST_OUTPUT
            ended = self.program.end(END_SECONDS if complete else 0.0)
        if printed is None:
            return {"verdict": "over_time"}
        ended.check("the program")
        if ended.killed or ended.status:
            return {"verdict": "wrong", "detail": f"the script failed (exit status {ended.status})"}
        if _lines(printed.decode(errors="replace")) != _lines(expected):
            return {"verdict": "wrong", "detail": "another output"}
        return {"verdict": "correct"}


def _heard(worker: socket.socket, task: dict[str, Any], deadline: float) -> dict[str, Any] | None:
    """What the tests' process says; {} where it ends without a word, None when the time is over."""
    channel = Channel(worker)
    try:
        worker.settimeout(max(LEAST, deadline - time.monotonic()))
        channel.send(task)
        worker.settimeout(max(LEAST, deadline - time.monotonic()))
        return channel.receive()
    except TimeoutError:
        return None
    except (ClosedError, WireError):
        return {}


def _lines(text: str) -> list[str]:
    """Lines without the white space at their ends, and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _read(descriptor: int, deadline: float) -> bytes | None:
    """What comes through a pipe until it closes or is too much; None when the time is over."""
    output = bytearray()  # bytes would be copied whole with every piece, 16 MiB in pieces of a few KiB
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while len(output) <= MOST_OUTPUT:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not selector.select(remaining):
                return None
            data = os.read(descriptor, 1 << 16)
            if not data:
                break
            output += data
    return bytes(output)


# By path: importing it as part of the package would bring the whole package into the worker.
completions = runpy.run_path(str(Path(__file__).parent.with_name("completions.py")))

_settings: dict[str, Any] = {}
_judges: dict[int, Judge] = {}


def prepare(settings: dict[str, Any]) -> None:
    """Check that a right program passes under its limits.

    Raises:
        RuntimeError: it does not: every answer would look wrong.
    """
    _settings.update(
        {name: settings[name] for name in ("sandbox", "program_time", "memory")}, numpy=settings.get("numpy", False)
    )
    numpy = "import numpy\n" if _settings["numpy"] else ""
    right = {**RIGHT, "program": numpy + RIGHT["program"], "setup": numpy}
    try:
        found = json.dumps(_judge().verdict(right))
    except CrashError as error:
        found = str(error)
    finally:  # the workers, forked later, have sandboxes of their own
        _judges.pop(os.getpid()).close()
    if found != '{"verdict": "correct"}':
        raise RuntimeError(
            f"a program that is right fails under its limits: is memory={_settings['memory']} or "
            f"program_time={_settings['program_time']} too small? ({found})"
        )


def answer(item: dict[str, Any]) -> dict[str, Any]:
    """The verdict of this worker's judge on the program in a completion, or `no_answer`: see `Judge.verdict`."""
    program = completions["find_program"](
        item["completion"], item["prompt"], item["names"], continues=item["continues"], opened=item["opened"]
    )
    if not program:
        return {"verdict": "no_answer"}
    given = completions["prompt_code"](item["prompt"])
    task = {name: item[name] for name in ("cases", "tests", "setup", "entry_point", "names") if name in item}
    return _judge().verdict({**task, "program": program, "given": given})


def _judge() -> Judge:
    if os.getpid() not in _judges:
        _judges[os.getpid()] = Judge(**_settings)
    return _judges[os.getpid()]
