"""The Python that runs inside, and what of this machine it needs."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from fdiv.errors import SandboxError

__all__ = ["executable", "numpy_folders", "others_can_read", "python_command", "read_only_files"]

INSIDE = Path(__file__).with_name("inside")
SYSTEM_LIBRARIES = ("/lib", "/lib64", "/lib32", "/usr/lib", "/usr/lib64", "/usr/lib32")
SINGLE_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo")


def executable() -> Path:
    """The interpreter of this process, outside its virtual environment."""
    return Path(getattr(sys, "_base_executable", sys.executable)).resolve()


def numpy_folders() -> list[Path]:
    """The folders of the installed numpy: the package, and the libraries that its wheel brings.

    Raises:
        SandboxError: it is not installed.
    """
    found = importlib.util.find_spec("numpy")
    if found is None or not found.submodule_search_locations:
        raise SandboxError(
            "numpy: true: numpy is not installed here; pip install numpy, or leave numpy out (programs then have the "
            "standard library alone)"
        )
    package = Path(next(iter(found.submodule_search_locations))).resolve()
    return [folder for folder in (package, package.with_name("numpy.libs")) if folder.is_dir()]


def python_command(folder: str, control: int, role: str, packages: str | None = None) -> list[str]:
    """The command line that runs `inside.server.main(CONTROL, ROLE)`, isolated, with the standard library alone.

    Args:
        folder: Where `inside` lies.
        control: Descriptor of the control socket.
        role: What its children do: a module of `inside`.
        packages: Folder with numpy, which is then there to import; None: no installed package is.
    """
    also = f"sys.path.append({packages!r}); " if packages else ""
    code = (
        f"import sys; sys.path.insert(0, {folder!r}); from inside import server, {role}; del sys.path[0]; {also}"
        f"server.main({control}, {role!r}, {('numpy',) if packages else ()})"
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
