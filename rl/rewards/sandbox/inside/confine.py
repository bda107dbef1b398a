"""The limits that a process sets on itself before it runs what it was sent."""

from __future__ import annotations

import ctypes
import os
import resource

__all__ = ["NOBODY", "UNCONFINED", "become_nobody", "filter_calls", "limit"]

NOBODY = 65534
UNCONFINED = "fdiv-code-"  # how the temporary folder of a process without a sandbox begins
SET_NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2  # of prctl


def become_nobody() -> None:
    """Root gives up its user, and with it every right; another user stays who it is."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def limit(memory: int, seconds: int, file_bytes: int) -> None:
    """Hard limits of the kernel on this process: address space, processor time, files, no fork and no thread."""
    for what, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(what, (value, value))


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_char_p)]


def filter_calls(program: bytes) -> None:
    """Load a filter of system calls, an array of `struct sock_filter`, for this process and for good.

    Raises:
        OSError: the kernel refuses it.
    """
    kernel = ctypes.CDLL(None, use_errno=True)
    described = _Filter(len(program) // 8, program)
    if kernel.prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or kernel.prctl(SET_SECCOMP, FILTER, ctypes.byref(described)):
        raise OSError(ctypes.get_errno(), "the filter of system calls cannot be loaded")
