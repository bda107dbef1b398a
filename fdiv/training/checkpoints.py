"""Training checkpoints that are either whole or not there.

A checkpoint is written in `OUTPUT_DIR/_saving`, flushed to disk, given its marker (`fdiv_checkpoint.json`: every
file with its size and the digest of all its bytes, what the run was, and the marker's own digest), and only then
renamed to `OUTPUT_DIR/checkpoint-STEP`. A process killed at any moment leaves the earlier checkpoints as they were.
State files of Trainer and DeepSpeed are pickles: loaded only from a folder whose marker stands and agrees with
its files, to the last one: nothing is added to a checkpoint. Hidden files, which nothing loads and file systems leave
behind, do not count.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fdiv.errors import CheckpointError, FdivError
from fdiv.files import _flush, flush_tree
from fdiv.sealed import file_digest, read_record, write_record

__all__ = [
    "MARKER",
    "STAGING",
    "checkpoint_fault",
    "checkpoint_folders",
    "newest_checkpoint",
    "publish",
    "read_marker",
    "recover",
]

MARKER = "fdiv_checkpoint.json"
STAGING = "_saving"  # TRL's upload to the hub leaves out names that begin with an underscore

_PARTS = ("files", "identity", "settings")
_REPLACED = "replaced-"
_EDGE = 32 * 2**20  # bytes that were hashed at each end of a file longer than both, before 0.3
_HASHING = 8  # files hashed at once: terabytes of optimizer state are read once more, whole


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-STEP` of `output_dir`, smallest step first, whole or not."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name.partition("-")[2]))


def publish(
    staged: Path, output_dir: Path, identity: Mapping[str, Any], settings: Mapping[str, Any] | None = None
) -> Path:
    """Make `staged`, a finished `checkpoint-STEP` folder below `STAGING`, the checkpoint of that step.

    Args:
        staged: the folder, on the file system of `output_dir`.
        output_dir: where checkpoints stand.
        identity: what a run that resumes from it must share (JSON values).
        settings: what it is told of where it differs (JSON values).

    Returns:
        The folder's new place. A checkpoint of the same step is replaced.
    """
    marker = {
        "files": _digests(staged, _names(staged)),
        "identity": dict(identity),
        "settings": dict(settings or {}),
    }
    write_record(staged / MARKER, marker)
    flush_tree(staged)
    target, replaced = output_dir / staged.name, staged.parent / f"{_REPLACED}{staged.name}"
    if target.exists():
        os.replace(target, replaced)  # stays complete, and is put back by `recover`, if we die before the next line
    os.replace(staged, target)
    _flush(output_dir)
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def recover(output_dir: Path) -> None:
    """Remove what an interrupted save left, and put back a checkpoint that was about to be replaced."""
    staging = output_dir / STAGING
    for folder in staging.glob(f"{_REPLACED}*"):
        target = output_dir / folder.name.removeprefix(_REPLACED)
        if not target.exists():
            os.replace(folder, target)
    shutil.rmtree(staging, ignore_errors=True)


def read_marker(checkpoint: Path) -> dict[str, Any] | None:
    """The marker of a checkpoint; None where there is none that can be read, or it does not agree with its digest."""
    try:
        marker = {"settings": {}, **read_record(checkpoint / MARKER, "")}
    except FdivError:
        return None
    return marker if all(isinstance(marker.get(part), dict) for part in _PARTS) else None


def checkpoint_fault(checkpoint: Path) -> str | None:
    """Why a folder is no complete checkpoint of ours; None where it is one."""
    marker = read_marker(checkpoint)
    if marker is None:
        return f"it has no {MARKER} that can be read, so the save was not finished, was not ours, or is damaged"
    files, found = marker["files"], _names(checkpoint)
    if not files:
        return f"its {MARKER} lists no files"
    if missing := sorted(files.keys() - set(found)):
        return f"{missing[0]} is missing"
    for name in found:
        hidden = any(part.startswith(".") for part in name.split("/"))
        if name not in files and not hidden:
            return f"{name} was not saved with it (take what was added out of the folder)"
    for name, digest in files.items():
        if not isinstance(digest, dict) or not isinstance(digest.get("bytes"), int):
            return f"its {MARKER} gives no size of {name}"
        if (size := (checkpoint / name).stat().st_size) != digest["bytes"]:
            return f"{name} has {size} bytes instead of {digest['bytes']}"
    ends = {name: digest for name, digest in files.items() if "sha256_of_ends" in digest}
    now = _digests(checkpoint, files.keys() - ends.keys()) | {
        name: _digest_of_ends(checkpoint / name) for name in ends
    }
    changed = sorted(name for name, digest in files.items() if now[name] != digest)
    return f"the content of {changed[0]} has changed" if changed else None


def newest_checkpoint(output_dir: Path) -> tuple[Path, list[str]]:
    """The complete checkpoint with the largest step, and one line for each newer folder that was passed over.

    Raises:
        CheckpointError: there is none.
    """
    passed_over = []
    for folder in reversed(checkpoint_folders(output_dir)):
        fault = checkpoint_fault(folder)
        if fault is None:
            return folder, passed_over
        passed_over.append(f"{folder.name} is incomplete: {fault}")
    reasons = f" ({'; '.join(passed_over)})" if passed_over else ""
    raise CheckpointError(f"there is no complete checkpoint in {output_dir}{reasons}: leave the key out to start over")


def _names(folder: Path) -> list[str]:
    """The files below a checkpoint folder, as its marker names them and without the marker."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return sorted(names - {MARKER})


def _digests(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`file_digest` of files below a folder, by name."""
    names = sorted(names)
    with ThreadPoolExecutor(_HASHING) as pool:  # hashing leaves Python's lock
        return dict(zip(names, pool.map(lambda name: file_digest(folder / name), names), strict=True))


def _digest_of_ends(path: Path) -> dict[str, Any]:
    """What markers of before say of a file longer than 64 MiB: its size, and SHA-256 of its first and last 32 MiB."""
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_EDGE))
        file.seek(-_EDGE, os.SEEK_END)
        digest.update(file.read(_EDGE))
    return {"bytes": path.stat().st_size, "sha256_of_ends": digest.hexdigest()}
