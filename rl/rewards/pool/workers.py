"""A pool of killable worker processes: an item that hangs or crashes its worker costs exactly one answer.

The trainer starts one template process (`template.py`), which loads the task and forks the workers. Items and
answers are JSON over a socket per worker, never pickles. A worker has one item at a time; when that passes its
limits of time or memory, or the worker ends, that item's outcome says so, the worker is killed and another is forked,
and every other item goes on. Nothing relies on signals in the trainer, so the pool works in any of its threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fdiv.errors import WorkerError

from .processes import Processes, Worker, has_ended, usage

__all__ = ["Outcome", "WorkerPool", "default_workers"]

TEMPLATE = Path(__file__).with_name("template.py")
PASSED_ON = (
    "PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "TMPDIR", "VIRTUAL_ENV",
)  # fmt: skip
"""The environment variables a worker sees. Tokens and keys of the trainer are not among them."""

LOOK = 0.05  # seconds between looks at the workers' processor time and memory
WALL_FACTOR = 5.0
START_FAILURES = 5  # workers in a row that end before they are ready
LONGEST_REPLY = 1 << 20


class _TemplateLostError(WorkerError):
    """The template was killed. A new one can take over what is left."""


@dataclass(frozen=True)
class Outcome:
    """What became of one item.

    Args:
        status: `ok`; or why there is no answer: `timeout`, `memory`, or `crash` (the worker ended or raised).
        value: The task's answer where `status` is `ok`, else None.
        detail: A line for the log where it is not.
        own: The item used up its own processor time or memory, or the task raised on it; False where the clock ran
            out, or the worker ended.
    """

    status: Literal["ok", "timeout", "memory", "crash"]
    value: dict[str, Any] | None = None
    detail: str = ""
    own: bool = False


def default_workers() -> int:
    """Workers per trainer process: the processors this process may use, shared by the node's ranks; 1 to 8."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, available // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))))


class WorkerPool:
    """Worker processes for one task, started on first use and kept until `close()`, interpreter exit or collection.

    A pool may be shared by threads (calls take turns). In a forked copy of the process (a data loader's worker) it
    starts processes of its own; pickled, it travels as its settings.

    Args:
        task: Python file with `prepare(settings: dict) -> None`, run once in the template, and
            `answer(item) -> dict`, run in the workers; both sides of it are JSON.
        settings: What `prepare` is given; JSON.
        workers: Number of worker processes; None for `default_workers()`.
        time_limit: Seconds of processor time of the worker for one item. Wall time would take answers from a machine
            that is only busy.
        memory_limit: Bytes a worker may hold resident; like the processor time it is looked at every 50 ms.
        address_space: Bytes of address space a worker may reserve, a limit of the kernel; None for 4 × memory_limit.
        writes_files: The task has to write files: no limits of the kernel, `address_space` included.
        wall_limit: Seconds of wall time for one item, however little the worker computes; None for 5 × time_limit.
        start_limit: Seconds in which the template must have prepared the task.

    Raises:
        ValueError: a limit or the number of workers is not positive.
    """

    def __init__(
        self,
        task: str | Path,
        settings: Mapping[str, Any] | None = None,
        *,
        workers: int | None = None,
        time_limit: float = 10.0,
        memory_limit: int = 1 << 30,
        address_space: int | None = None,
        writes_files: bool = False,
        wall_limit: float | None = None,
        start_limit: float = 300.0,
    ) -> None:
        self.workers = default_workers() if workers is None else workers
        self.wall_limit = WALL_FACTOR * time_limit if wall_limit is None else wall_limit
        for name, value in (
            ("workers", self.workers), ("time_limit", time_limit), ("memory_limit", memory_limit),
            ("start_limit", start_limit),
            ("wall_limit", self.wall_limit),
        ):  # fmt: skip
            if not value > 0:
                raise ValueError(f"WorkerPool: {name}={value} must be positive")
        self.task, self.settings = Path(task), dict(settings or {})
        self.time_limit, self.memory_limit, self.start_limit = time_limit, memory_limit, start_limit
        self.address_space = 4 * memory_limit if address_space is None else address_space
        self.writes_files, self.restarts = writes_files, 0
        self._processes: Processes | None = None
        self._finalizer: weakref.finalize | None = None
        self._lock, self._lock_owner = threading.Lock(), os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_processes", "_finalizer", "_lock", "_lock_owner")
        return {name: value for name, value in vars(self).items() if name not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._processes = self._finalizer = None
        self._lock, self._lock_owner = threading.Lock(), os.getpid()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes. The next `map` starts new ones."""
        if self._finalizer is not None:
            self._finalizer()
        self._processes = self._finalizer = None

    def map(self, items: Sequence[Any]) -> list[Outcome]:
        """One outcome per item, in their order.

        Raises:
            WorkerError: the task cannot be prepared, or worker after worker ends before its first item.
        """
        if self._lock_owner != os.getpid():  # forked: the lock may have been held by a thread that is not here
            self._lock, self._lock_owner = threading.Lock(), os.getpid()
        with self._lock:
            if not items:
                return []
            finished = False
            self._start()
            try:
                run = _Run(self, items)
                for attempt in range(START_FAILURES):
                    try:
                        outcomes = run.outcomes(self._processes)
                        finished = True
                        return outcomes
                    except _TemplateLostError:
                        closed = self._finalizer is None or not self._finalizer.alive  # by the interpreter's exit
                        if closed or attempt == START_FAILURES - 1:
                            raise
                        self.close()
                        self._start()
            finally:
                if not finished:  # an interrupt: items are under way, and their answers must not meet the next call
                    self.close()

    def _start(self) -> None:
        if self._processes is not None and self._processes.owner != os.getpid():
            self.close()
        if self._processes is not None and self._processes.template.poll() is not None:
            self.close()
            self.restarts += 1
        if self._processes is None:
            self._processes = self._new_processes()
            self._finalizer = weakref.finalize(self, self._processes.close)

    def _new_processes(self) -> Processes:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        limit = None if self.writes_files else self.address_space
        settings = {**self.settings, "wall_limit": self.wall_limit, "address_space": limit}
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        environment.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
        with theirs, tempfile.TemporaryFile() as error_file:
            # -P: the folder of this file stays off the import path.
            command = [sys.executable, "-P", "-B", str(TEMPLATE), str(theirs.fileno()), str(self.task)]
            template = subprocess.Popen(
                [*command, json.dumps(settings)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=error_file, env=environment, pass_fds=(theirs.fileno(),), process_group=0,
            )  # fmt: skip
            theirs.close()
            processes = Processes(template, ours, os.getpid())
            ours.settimeout(self.start_limit)
            try:
                ready = ours.recv(16) == b"ready"
            except TimeoutError:
                template.kill()
                ready = False
            if not ready:
                processes.close()
                error_file.seek(0)
                said = error_file.read().decode(errors="replace").strip().splitlines()
                reason = said[-1] if said else f"nothing within {self.start_limit} s"
                raise WorkerError(f"the workers of {self.task.name} cannot be started: {reason}")
        ours.settimeout(None)
        return processes


class _Run:
    """One call of `map`."""

    def __init__(self, pool: WorkerPool, items: Sequence[Any]) -> None:
        self.pool = pool
        self.encoded = [json.dumps(item).encode() + b"\n" for item in items]
        self.waiting: deque[int] = deque()
        self.results: dict[int, Outcome] = {}
        self.start_failures = 0
        self.next_look = 0.0

    def outcomes(self, processes: Processes) -> list[Outcome]:
        self.processes = processes
        unanswered = set(range(len(self.encoded))) - self.results.keys()
        self.waiting = deque(sorted(unanswered))
        with selectors.DefaultSelector() as self.selector:
            for worker in list(self.processes.workers):
                if has_ended(worker):
                    self._replace(worker)
                else:
                    self.selector.register(worker.channel, selectors.EVENT_READ, worker)
            while len(self.processes.workers) < min(self.pool.workers, len(self.encoded)):
                self._fork(0)
            while len(self.results) < len(self.encoded):
                self._step()
        return [self.results[index] for index in range(len(self.encoded))]

    def _step(self) -> None:
        for worker in self.processes.workers:
            if worker.pid and worker.item is None and self.waiting:
                self._assign(worker)
        for key, events in self.selector.select(LOOK):
            worker = key.data
            if events & selectors.EVENT_WRITE:
                self._send(worker)
            if events & selectors.EVENT_READ:
                self._receive(worker)
        if time.monotonic() >= self.next_look:
            self.next_look = time.monotonic() + LOOK
            for worker in list(self.processes.workers):
                if worker.item is not None and (outcome := self._beyond_limits(worker)):
                    self._receive(worker)  # the answer may be here, if this process was the one that was late
                    if worker.item is not None:
                        self._lost(worker, outcome)

    def _beyond_limits(self, worker: Worker) -> Outcome | None:
        seconds, resident = usage(worker.pid)
        if seconds > worker.processor_end:
            return Outcome("timeout", detail=f"no answer within {self.pool.time_limit} s of processor time", own=True)
        if time.monotonic() > worker.wall_end:
            return Outcome("timeout", detail=f"no answer within {self.pool.wall_limit} s")
        if resident > self.pool.memory_limit:
            return Outcome("memory", detail=f"more than {self.pool.memory_limit} bytes resident", own=True)
        return None

    def _assign(self, worker: Worker) -> None:
        worker.item = self.waiting.popleft()
        worker.wall_end = time.monotonic() + self.pool.wall_limit
        worker.processor_end = usage(worker.pid)[0] + self.pool.time_limit
        worker.outgoing = memoryview(self.encoded[worker.item])
        self._send(worker)

    def _send(self, worker: Worker) -> None:
        try:
            worker.outgoing = worker.outgoing[worker.channel.send(worker.outgoing) :]
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            worker.outgoing = memoryview(b"")  # it has ended: reading says so, after what it still had to say
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.outgoing else 0)
        self.selector.modify(worker.channel, wanted, worker)

    def _receive(self, worker: Worker) -> None:
        try:
            data = worker.channel.recv(1 << 16)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        worker.incoming += data
        while (end := worker.incoming.find(b"\n")) >= 0:
            line = bytes(worker.incoming[:end])
            del worker.incoming[: end + 1]
            self._handle(worker, json.loads(line))
        if not data or len(worker.incoming) > LONGEST_REPLY:
            self._lost(worker, Outcome("crash", detail="the worker process ended" if not data else "endless reply"))

    def _handle(self, worker: Worker, reply: dict[str, Any]) -> None:
        if "ready" in reply:
            worker.pid, self.start_failures = reply["ready"], 0
            return
        if "error" in reply:
            self.results[worker.item] = Outcome(reply["error"], detail=reply["detail"], own=True)
        else:
            self.results[worker.item] = Outcome("ok", reply["value"])
        worker.item = None
        if reply.get("error") == "memory":
            self._lost(worker, None)  # what filled its memory may still be there

    def _lost(self, worker: Worker, outcome: Outcome | None) -> None:
        """The worker is gone, or has to go: its item gets `outcome`, and another worker its place."""
        if worker not in self.processes.workers:
            return
        if worker.item is not None:
            self.results[worker.item] = outcome
        elif not worker.pid:
            self.start_failures += 1
            if self.start_failures >= START_FAILURES:
                raise WorkerError(
                    f"{START_FAILURES} workers of {self.pool.task.name} in a row ended before they were ready: "
                    f"is address_space={self.pool.address_space} too small for the task, or the machine out of memory?"
                )
        self.selector.unregister(worker.channel)
        self._replace(worker)

    def _replace(self, worker: Worker) -> None:
        if worker.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)  # the number is still its own: the template has not reaped it
        worker.channel.close()
        self.processes.workers.remove(worker)
        self.pool.restarts += 1
        self._fork(worker.pid)

    def _fork(self, replaced: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self.processes.control, [str(replaced).encode()], [theirs.fileno()])
            except (BrokenPipeError, ConnectionResetError) as error:
                ours.close()
                raise _TemplateLostError(
                    f"the template process of {self.pool.task.name} was killed again and again: is memory short?"
                ) from error
        ours.setblocking(False)
        worker = Worker(ours)
        self.processes.workers.append(worker)
        self.selector.register(ours, selectors.EVENT_READ, worker)
