"""Locks of extensions that DeepSpeed compiles: those that a killed process left are removed; later runs would wait."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from fdiv.terminal import info

__all__ = ["remove_stale_locks"]

# No build takes so long. A younger lock may belong to another machine that shares the folder.
STALE_AFTER_SECONDS = 900


def remove_stale_locks(root: Path | None = None) -> list[Path]:
    """Remove locks of builds that nobody works on, and name those that somebody may be working on.

    torch compiles an extension once per machine, about 100 seconds. The process that compiles holds the file `lock` in
    the extension's folder open, and the others wait until the file is gone: without a word and without end, also when
    that process was killed.

    Args:
        root: the folder of the extensions; `$TORCH_EXTENSIONS_DIR` or torch's own where it is not given.

    Returns:
        The locks that were removed: those that no process here holds open and that are `STALE_AFTER_SECONDS` old.
    """
    removed = []
    held: set[str] | None = None
    for lock in sorted((root or _extensions_folder()).glob("**/lock")):
        held = set(_open_files()) if held is None else held
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:  # the build has just ended
            continue
        if str(lock.resolve()) in held:
            continue
        if age < STALE_AFTER_SECONDS:
            info(
                f"{lock}: no process here builds this extension, and the run waits for whoever does; unless that is "
                f"another machine, a killed run left the lock: remove it (done for you when it is "
                f"{STALE_AFTER_SECONDS // 60} minutes old)"
            )
            continue
        lock.unlink(missing_ok=True)
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
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            yield os.readlink(link)
        except OSError:  # ended, or another user's
            continue
