"""One hostile program, in a process of its own: limits first, then the program, then the token.

    python -I -S python_child.py PROGRAM CPU_SECONDS MEMORY FILE_BYTES TOKEN_IN TOKEN_OUT

The token waits in a pipe and is read only after the program, tests included, has run to its end; a program that ends
the interpreter early, however it does that, has not delivered it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import runpy
import sys
from pathlib import Path

__all__ = ["limit", "main"]

NOBODY = 65534
PR_SET_KEEPCAPS = 8
CAPABILITY_VERSION_3 = 0x20080522
CAP_DAC_READ_SEARCH = 1 << 2


def limit(cpu_seconds: int, memory: int, file_bytes: int) -> None:
    """The limits of the kernel for this process; root's rights are dropped, since its processes are not limited."""
    for what, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),  # no fork, no thread
    ):
        resource.setrlimit(what, (value, value))
    if os.geteuid() == 0:
        _become_nobody()


def _become_nobody() -> None:
    library = Path(os.__file__).resolve()
    # An interpreter under /root can be read by root alone: then the right to read, and no other, is kept.
    readable = all(folder.stat().st_mode & 0o005 == 0o005 for folder in library.parents)
    kept = 0 if readable else CAP_DAC_READ_SEARCH
    kernel = ctypes.CDLL(None, use_errno=True)
    kernel.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    effective_permitted_inheritable = (ctypes.c_uint32 * 6)(kept, kept)
    if kernel.capset(header, effective_permitted_inheritable) != 0:
        raise OSError(ctypes.get_errno(), "capset: the rights of root cannot be dropped")


def main(program: str, cpu_seconds: str, memory: str, file_bytes: str, token_in: str, token_out: str) -> None:
    """Run the program under its limits; pass the token on if it comes to its end."""
    limit(int(cpu_seconds), int(memory), int(file_bytes))
    runpy.run_path(program, run_name="__program__")
    os.write(int(token_out), os.read(int(token_in), 64))


if __name__ == "__main__":
    main(*sys.argv[1:])
