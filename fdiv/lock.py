"""One writer per output directory: `output_lock`."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fdiv.errors import FdivError
from fdiv.terminal import info, is_main_process

__all__ = ["LOCK", "output_lock", "refuse_locked"]

LOCK = "_lock.json"  # TRL's upload to the hub leaves out names that begin with an underscore
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def output_lock(output: Path) -> Iterator[None]:
    """Hold an output directory (or an output file `NAME.json`) while the body writes to it.

    The lock is `flock` on a file inside, which names host, process and start time of its owner. The system drops it
    when the owner ends, however it ends, so a file that was left behind is recognised and taken over, with a line.
    Where the file system has no `flock`, the owner's process is looked up on the same host.

    Of several processes of one run, the main one holds it.

    Raises:
        FdivError: another process writes there; or the place cannot be written.
    """
    is_file = output.suffix == ".json"
    wrong_kind = os.path.exists(output) and os.path.isdir(output) == is_file  # the command says so in its own words
    if wrong_kind or not is_main_process():
        yield
        return
    path = lock_path(output)
    made = not os.path.exists(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquired(path, output)
    except OSError as error:
        raise FdivError(f"{output} cannot be written ({error.strerror}); choose another output") from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)
        if made:
            with suppress(OSError):  # it is not empty: something was written
                path.parent.rmdir()


def refuse_locked(output: Path) -> None:
    """Refuse a directory that another run writes to. Reads only; of several processes of a run, the main one looks.

    Raises:
        FdivError: another process writes there.
    """
    if not is_main_process():  # the main process of this very run holds it
        return
    try:
        descriptor = os.open(lock_path(output), os.O_RDONLY)
    except OSError:
        return
    try:
        _lock(descriptor, output)
    finally:
        os.close(descriptor)


def lock_path(output: Path) -> Path:
    """The file that is locked: in the directory, or beside the output file."""
    return output.with_name(f"_{output.name}.lock") if output.suffix == ".json" else output / LOCK


def _acquired(path: Path, output: Path) -> int:
    """The descriptor of the locked file, with this process in it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            stale = _lock(descriptor, output)
            # The one who held it may have removed the file between the two lines above: then lock the new one.
            if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
                os.close(descriptor)
                continue
            if stale:
                info(f"{output}: the lock of {_named(stale)} is stale (the process has ended); it is taken over")
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
        except BaseException:
            with suppress(OSError):
                os.close(descriptor)
            raise
        return descriptor


def _lock(descriptor: int, output: Path) -> dict[str, Any] | None:
    """Lock the file; the owner that left it behind, if any.

    Raises:
        FdivError: its owner lives.
    """
    hint = ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _owner(descriptor)
    except BlockingIOError:
        owner = _owner(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        owner = _owner(descriptor)
        if owner is None or not _may_live(owner):
            return owner
        if owner.get("host") != socket.gethostname():  # whether it lives cannot be seen from here
            hint = f"; if it has ended, remove {lock_path(output)}"
    raise FdivError(
        f"{output} is in use by {_named(owner)}; wait until it has ended, or choose another output directory{hint}"
    )


def _owner(descriptor: int) -> dict[str, Any] | None:
    """The content of a lock file; None where it is empty or damaged."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return None
    return owner if isinstance(owner, dict) else None


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "process_started": _start_of(os.getpid()),
    }


def _start_of(process: int) -> float | None:
    """When a process of this host started, by the system's clock; None where there is no such process."""
    import psutil

    try:
        return psutil.Process(process).create_time()
    except (psutil.Error, ValueError, TypeError):
        return None


def _may_live(owner: Mapping[str, Any]) -> bool:
    """Whether the owner may still run: a process of another host cannot be looked up, so it counts as running."""
    if owner.get("host") != socket.gethostname():
        return True
    start = _start_of(owner.get("process"))
    return start is not None and abs(start - float(owner.get("process_started") or 0)) < 2


def _named(owner: Mapping[str, Any] | None) -> str:
    if owner is None:
        return "another process"
    return f"process {owner.get('process')} on {owner.get('host')} (since {owner.get('started')})"
