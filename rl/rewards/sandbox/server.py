"""A sandbox as the worker sees it: it begins children, ends them, and is replaced when one left something behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
from dataclasses import dataclass

from .bubblewrap import Bubblewrap
from .seccomp import filter_program
from .unconfined import Unconfined

__all__ = ["CrashError", "Ended", "Server"]

START_SECONDS = 60.0
REPLY_SECONDS = 10.0


class CrashError(RuntimeError):
    """A process ended by a signal that was not sent from here, or a sandbox is gone: there is no verdict."""


@dataclass(frozen=True)
class Ended:
    """How a child ended: whether it was killed from here; its exit status; the signal that ended it (0: none)."""

    killed: bool
    status: int
    signal: int

    def check(self, whose: str) -> None:
        """Raise CrashError where a signal ended it."""
        if self.signal:
            known = {number.value: number.name for number in signal.Signals}
            raise CrashError(f"the process of {whose} ended by signal {known.get(self.signal, self.signal)}")


class Server:
    """One sandbox at a time for one role, started on first use.

    Args:
        sandbox: What starts it.
        role: What its children do: `program` or `examiner`.
    """

    def __init__(self, sandbox: Bubblewrap | Unconfined, role: str) -> None:
        self.sandbox, self.role = sandbox, role
        self.process: subprocess.Popen | None = None
        self.control: socket.socket | None = None
        self.busy = False  # with a child

    def start(self) -> None:
        """Make sure that there is a sandbox.

        Raises:
            CrashError: it does not begin; the message is its own error.
        """
        if self.process is not None and self.process.poll() is None and not self.busy:
            return
        self.close()
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, tempfile.TemporaryFile() as error_file:
            self.process = self.sandbox.start(theirs.fileno(), self.role, error_file.fileno())
            theirs.close()
            self.control.settimeout(START_SECONDS)
            try:
                if self.control.recv(16) == b"ready":
                    self.control.send(b"filter" + (filter_program() or b""))
                    self.control.settimeout(REPLY_SECONDS)
                    return
                reason = "it ended"
            except TimeoutError:
                reason = f"nothing within {START_SECONDS} s"
            self.close()
            error_file.seek(0)
            said = error_file.read().decode(errors="replace").strip().splitlines()
            raise CrashError(said[-1] if said else reason)

    def begin(self, *descriptors: int) -> None:
        """Fork a child, which is given these descriptors."""
        self.start()
        self.busy = True
        try:
            socket.send_fds(self.control, [b"begin"], descriptors)
        except OSError as error:
            self.close()
            raise CrashError(f"the sandbox of the {self.role} is gone") from error

    def end(self, patience: float = 0.0) -> Ended:
        """End the child, and say how it ended; a sandbox in which it left files is thrown away.

        Args:
            patience: Seconds that it is given to come to its own end.

        Raises:
            CrashError: the sandbox is gone.
        """
        try:
            self.control.send(f"end {patience}".encode())
            reply = json.loads(self.control.recv(256))
        except (OSError, ValueError) as error:
            self.close()
            raise CrashError(f"the sandbox of the {self.role} is gone") from error
        self.busy = False
        if not reply["clean"]:
            self.close()
        if reply["killed"]:
            return Ended(True, 0, 0)
        code = os.waitstatus_to_exitcode(reply["status"])
        return Ended(False, max(code, 0), max(-code, 0))

    def close(self) -> None:
        """End the sandbox with everything in it."""
        if self.process is not None:
            self.control.close()
            self.process.kill()
            self.process.wait()
            self.process = self.control = None
        self.busy = False
