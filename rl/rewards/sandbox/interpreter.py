"""The Python that runs inside, and what of this machine it needs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["executable", "others_can_read", "python_command", "read_only_files"]

INSIDE = Path(__file__).with_name("inside")
SYSTEM_LIBRARIES = ("/lib", "/lib64", "/lib32", "/usr/lib", "/usr/lib64", "/usr/lib32")
SINGLE_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo")


def executable() -> Path:
    """The interpreter of this process, outside its virtual environment."""
    return Path(getattr(sys, "_base_executable", sys.executable)).resolve()


def python_command(folder: str, control: int, role: str) -> list[str]:
    """The command line that runs `inside.server.main(CONTROL, ROLE)`, isolated and without installed packages.

    Args:
        folder: Where `inside` lies.
        control: Descriptor of the control socket.
        role: What its children do: a module of `inside`.
    """
    code = (
        f"import sys; sys.path.insert(0, {folder!r}); from inside import server, {role}; del sys.path[0]; "
        f"server.main({control}, {role!r})"
    )
    return [str(executable()), "-I", "-S", "-B", "-X", "utf8", "-c", code]


def read_only_files() -> list[Path]:
    """The interpreter, its standard library, the system's shared libraries; no home, two files of /etc."""
    base = Path(sys.base_prefix)
    wanted = [executable(), base / "lib", base / "lib64", Path(os.__file__).parent]
    wanted += map(Path, SYSTEM_LIBRARIES + SINGLE_FILES)
    found: list[Path] = []
    for path in sorted(filter(Path.exists, set(wanted)), key=lambda path: len(path.parts)):
        if not any(folder in path.parents for folder in found):
            found.append(path)
    return found


def others_can_read() -> bool:
    """Whether another user of this machine can read the standard library."""
    library = Path(os.__file__).resolve()
    return all(folder.stat().st_mode & 0o005 == 0o005 for folder in library.parents)
