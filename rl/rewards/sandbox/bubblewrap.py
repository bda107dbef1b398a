"""Processes behind bubblewrap: namespaces of their own, a filter of system calls, and next to no files."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fdiv.errors import SandboxError

from .inside.confine import NOBODY
from .interpreter import INSIDE, numpy_folders, python_command, read_only_files
from .seccomp import filter_program

__all__ = ["Bubblewrap"]

FOLDER = "/sandbox"  # where `inside` lies, inside
PACKAGES = "/packages"  # where numpy lies, inside; `inside` itself is closed to the programs
DISK = 16 << 20  # bytes of the temporary folder
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
ALLOW_NAMESPACES = (
    "allow user namespaces (in a container: by its seccomp profile; on Ubuntu: kernel.apparmor_restrict_unprivileged_"
    "userns=0), or set sandbox: none to run programs without protection"
)
INSTALL = "install it (apt install bubblewrap), or set sandbox: none to run programs without protection"

NAMESPACES = (
    "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-cgroup-try", "--unshare-uts", "--hostname", "inside",
)  # fmt: skip

# A child of a namespace that maps root and `nobody` alone: root's process sets the sandbox up, `nobody`'s runs in it.
HOLDER = """
import ctypes, sys
if ctypes.CDLL(None).unshare(0x10000000):  # CLONE_NEWUSER
    sys.exit(1)
print("ready", flush=True)
sys.stdin.read()
"""


def _arguments(packages: Sequence[Path] = ()) -> list[str]:
    """What every sandbox is made of, in the order in which bubblewrap does it."""
    files = read_only_files()
    found = {path: str(path) for path in files}
    # Folders that lead to a file are closed to others unless they are made first.
    parents = sorted({folder for path in [*files, Path(FOLDER), *map(Path, DEVICES)] for folder in path.parents})
    arguments = ["--die-with-parent", "--new-session", "--clearenv"]
    for folder in parents[1:]:
        arguments += ["--perms", "0755", "--dir", str(folder)]
    for path in found:
        link = path.is_symlink() and path.parent == Path("/")  # /lib on a system that keeps it under /usr
        arguments += ["--symlink", os.readlink(path), str(path)] if link else ["--ro-bind", str(path), str(path)]
    arguments += ["--ro-bind", str(INSIDE), FOLDER + "/inside"]
    if packages:
        arguments += ["--perms", "0755", "--dir", PACKAGES]
    for path in packages:
        arguments += ["--ro-bind", str(path), f"{PACKAGES}/{path.name}"]
    for device in DEVICES:
        arguments += ["--dev-bind", device, device]
    # /proc is left out: nothing needs it, and where containers are nested it often cannot be mounted.
    arguments += ["--perms", "1777", "--size", str(DISK), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
    return arguments


@functools.cache
def _user_namespace() -> int:
    """Descriptor of a user namespace with root and `nobody` in it; made once, by root alone."""
    holder = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={}
    )
    with holder:
        if holder.stdout.readline() != b"ready\n":
            raise SandboxError(f"sandbox: bubblewrap: user namespaces are forbidden here; {ALLOW_NAMESPACES}")
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{holder.pid}/{name}").write_text(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
        return os.open(f"/proc/{holder.pid}/ns/user", os.O_RDONLY)


class Bubblewrap:
    """Starts Python inside bubblewrap.

    User, process, network, IPC, host-name, mount and control-group namespaces; the interpreter, its standard library
    and the system's shared libraries read-only; one writable folder, in memory, of 16 MiB; no capabilities, no new
    privileges, no environment, no terminal; the filter of `seccomp`. As root, what runs is `nobody`'s. The processes
    end with the one that started them.

    Args:
        numpy: numpy can be imported inside, its folder read-only.

    Raises:
        SandboxError: there is no `bwrap` here, or no numpy.
    """

    name = "bubblewrap"

    def __init__(self, numpy: bool = False) -> None:
        self.program = shutil.which("bwrap")
        if self.program is None:
            raise SandboxError(f"sandbox: bubblewrap: there is no program bwrap here; {INSTALL}")
        self.packages = PACKAGES if numpy else None
        self.arguments = _arguments(numpy_folders() if numpy else [])

    def start(self, control: int, role: str, stderr: int = subprocess.DEVNULL) -> subprocess.Popen:
        """Start a sandbox whose first process is `inside.server`.

        Args:
            control: Descriptor of its control socket.
            role: What its children do: a module of `inside`.
            stderr: Descriptor for its errors.
        """
        passed = [control]
        if os.geteuid() == 0:
            # Only to become `nobody`; both rights are those of the namespace, and gone before the program starts.
            user = ["--userns", str(_user_namespace()), "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
            passed.append(_user_namespace())
        else:
            user = ["--unshare-user"]
        command = [self.program, "--cap-drop", "ALL", *user, *NAMESPACES, *self.arguments]
        if (filtered := filter_program(server=True)) is not None:
            # A pipe of its own for each: a shared file could be written by one sandbox and read by the next.
            reading, writing = os.pipe()
            os.write(writing, filtered)
            os.close(writing)
            passed.append(reading)
            command += ["--seccomp", str(reading)]
        try:
            return subprocess.Popen(
                [*command, "--", *python_command(FOLDER, control, role, self.packages)], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=stderr, env={}, pass_fds=passed, start_new_session=True, cwd="/",
            )  # fmt: skip
        finally:
            if filtered is not None:
                os.close(reading)
