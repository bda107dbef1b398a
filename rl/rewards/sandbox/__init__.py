"""Where programs that a model wrote run: `bubblewrap`, or `none`."""

from __future__ import annotations

import functools
import logging
import socket

from fdiv.errors import SandboxError
from fdiv.rl.rewards.sandbox import seccomp, server
from fdiv.rl.rewards.sandbox.bubblewrap import ALLOW_NAMESPACES
from fdiv.rl.rewards.sandbox.inside import wire
from fdiv.rl.rewards.sandbox.judge import BACKENDS

__all__ = ["SandboxError", "check_sandbox"]

log = logging.getLogger(__name__)

CHECK_SECONDS = 30.0
NO_PROTECTION = (
    "sandbox: none: programs that the model wrote run on this machine with limits of time and memory and a filter of "
    "system calls; they may read every file that their user may, /proc of the trainer among them, and write"
)


@functools.cache
def check_sandbox(name: str) -> None:
    """Start a process in the sandbox, and look at what it sees. `none` is said in the log instead.

    Raises:
        SandboxError: an unknown name; bubblewrap is not installed, or does not work on this machine.
    """
    if name not in BACKENDS:
        raise SandboxError(f"sandbox: {name!r} is unknown; there are: {', '.join(BACKENDS)}")
    sandbox = BACKENDS[name]()
    if name == "none":
        log.warning(NO_PROTECTION)
        return
    process = server.Server(sandbox, "survey")
    ours, theirs = socket.socketpair()
    try:
        with ours, theirs:
            process.begin(theirs.fileno())
            theirs.close()
            ours.settimeout(CHECK_SECONDS)
            seen = wire.Channel(ours).receive()
    except (server.CrashError, wire.ClosedError, TimeoutError) as error:
        reason = str(error) or type(error).__name__
        raise SandboxError(f"sandbox: {name}: it does not work here ({reason}); {ALLOW_NAMESPACES}") from error
    finally:
        process.close()
    held = {name: value for name, value in seen.items() if value}
    if held:
        raise SandboxError(f"sandbox: {name}: a process inside can still {', '.join(held)}; {ALLOW_NAMESPACES}")
    if seccomp.filter_program() is None:
        log.warning("sandbox: %s: no filter of system calls for this processor; namespaces and limits hold", name)
