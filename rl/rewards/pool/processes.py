"""The processes of a `WorkerPool` as the trainer sees them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Processes", "Worker", "has_ended", "usage"]


@dataclass(eq=False)
class Worker:
    """One worker, seen from the trainer: its socket, and the item it works on."""

    channel: socket.socket
    pid: int = 0  # 0 until it says that it is ready
    item: int | None = None  # index of the item it works on
    wall_end: float = 0.0
    processor_end: float = 0.0
    outgoing: memoryview = field(default_factory=lambda: memoryview(b""))
    incoming: bytearray = field(default_factory=bytearray)


@dataclass(eq=False)
class Processes:
    """The template and the workers of one trainer process."""

    template: subprocess.Popen
    control: socket.socket
    owner: int
    workers: list[Worker] = field(default_factory=list)

    def close(self) -> None:
        """End them all; in a forked copy of the trainer, let go of them."""
        ours = os.getpid() == self.owner  # else a forked copy: the processes are the original's
        if ours:
            if self.template.poll() is None:  # while it lives, no other process can have these numbers
                for worker in self.workers:
                    if worker.pid:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(worker.pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                self.control.shutdown(socket.SHUT_RDWR)  # reaches the template even if a forked copy is open elsewhere
        self.control.close()
        for worker in self.workers:
            worker.channel.close()
        if not ours:
            return
        try:
            self.template.wait(5)
        except subprocess.TimeoutExpired:
            self.template.kill()
            self.template.wait()


def has_ended(worker: Worker) -> bool:
    """Whether an idle worker is gone: nothing else makes its socket readable."""
    try:
        return not worker.channel.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def usage(pid: int) -> tuple[float, int]:
    """Seconds of processor time and bytes of resident memory of a process; zeros once it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0, 0
    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds, int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
