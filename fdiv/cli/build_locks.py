"""Locks of extensions that DeepSpeed compiles: those that a killed process left are removed; later runs would wait."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from fdiv.terminal import info

__all__ = ["remove_stale_locks"]

# DeepSpeed's builds take a minute or two. A younger lock may belong to another machine that shares the folder.
STALE_AFTER_SECONDS = 900
# The extensions that DeepSpeed compiles for the configurations of `--accelerate`, by the beginning of their names.
_EXTENSIONS = ("cpu_adam", "fused_adam", "deepspeed_")


def remove_stale_locks(root: Path | None = None) -> list[Path]:
    """Remove locks of builds that no process works on, and name those that one may be working on.

    torch compiles an extension once per machine, about 100 seconds. The process that compiles holds the file `lock` in
    the extension's folder open, and the others wait until the file is gone: without a word and without end, also when
    that process was killed. What cannot be read or removed is left alone.

    Args:
        root: the folder of the extensions; `$TORCH_EXTENSIONS_DIR` or torch's own where it is not given.

    Returns:
        The locks that were removed: DeepSpeed's, not held open by a process here, and `STALE_AFTER_SECONDS` old.
    """
    removed = []
    locks = (root or _extensions_folder()).glob("**/lock")
    for lock in sorted(path for path in locks if path.parent.name.startswith(_EXTENSIONS)):
        try:
            age = time.time() - lock.stat().st_mtime
            if str(lock.resolve()) in set(_open_files()):
                continue
            if age < STALE_AFTER_SECONDS:
                info(
                    f"{lock}: no process here builds this extension, and a run that needs it waits for whoever does; "
                    f"unless that is another machine, a killed run left the lock: remove it (done for you when it is "
                    f"{STALE_AFTER_SECONDS // 60} minutes old)"
                )
                continue
            lock.unlink()
        except OSError:  # gone by now, or not ours
            continue
        info(f"{lock}: removed, left by a build that was killed")
        removed.append(lock)
    return removed


def _extensions_folder() -> Path:
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named:
        return Path(named)
    from torch.utils.cpp_extension import get_default_build_root

    return Path(get_default_build_root())


def _open_files() -> Iterator[str]:
    """Files that processes of this machine hold open, as far as this user may see them."""
    for process in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        try:
            for descriptor in os.listdir(f"/proc/{process}/fd"):
                yield os.readlink(f"/proc/{process}/fd/{descriptor}")
        except OSError:  # ended, or another user's
            continue
