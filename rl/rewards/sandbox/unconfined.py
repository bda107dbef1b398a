"""No sandbox: limits, a filter of system calls, an empty environment, `nobody` instead of root, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import weakref

from fdiv.errors import SandboxError

from .inside.confine import NOBODY, UNCONFINED
from .interpreter import INSIDE, numpy_folders, others_can_read, python_command

__all__ = ["Unconfined"]


class Unconfined:
    """Starts Python without a sandbox: every file that its user may read is in reach.

    Args:
        numpy: numpy can be imported, and no other installed package.

    Raises:
        SandboxError: the trainer is root's and its interpreter is readable to no other user, so that the program could
            not run as another user; there is no numpy.
    """

    name = "none"

    def __init__(self, numpy: bool = False) -> None:
        self.packages: str | None = None
        if os.geteuid() == 0 and not others_can_read():
            raise SandboxError(
                f"sandbox: none: programs run as another user than root, who cannot read {os.__file__}; "
                "use sandbox: bubblewrap, a Python outside root's home, or a trainer that is not root's"
            )
        if numpy:
            self.packages = tempfile.mkdtemp(prefix="fdiv-numpy-")
            weakref.finalize(self, shutil.rmtree, self.packages, ignore_errors=True)
            os.chmod(self.packages, 0o755)
            for folder in numpy_folders():
                os.symlink(folder, os.path.join(self.packages, folder.name))

    def start(self, control: int, role: str, stderr: int = subprocess.DEVNULL) -> subprocess.Popen:
        """As `Bubblewrap.start`, without a sandbox, in a temporary folder."""
        folder = tempfile.mkdtemp(prefix=UNCONFINED)
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        process = subprocess.Popen(
            python_command(str(INSIDE.parent), control, role, self.packages), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=stderr, env={}, pass_fds=[control], start_new_session=True, cwd=folder,
        )  # fmt: skip
        weakref.finalize(process, shutil.rmtree, folder, ignore_errors=True)
        return process
