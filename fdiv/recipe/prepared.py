"""What `prepare:` builds, once for all runs under one folder that describe the same."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fdiv.files import plain
from fdiv.sealed import file_digest, read_record, write_record
from fdiv.terminal import info

__all__ = ["build_once", "is_built", "moved"]

_HERE = "${prepare}"
_MARKER = "recipe_keys.json"
_LARGE = 2**28


def build_once(name: str, builder: Any, root: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a build under `root` and the recipe keys that it sets; one of the same description is used again.

    The description is the settings and what is in the files that they name: of a folder the names, sizes and times of
    its files, of a file above 256 MiB its size and time.

    Args:
        name: of the builder.
        builder: its settings, a dataclass with `build(folder)`.
        root: where builds stand beside each other.
    """
    folder, identity = _place(name, builder, root)
    marker = folder / _MARKER
    if marker.is_file():
        info(f"prepare: {name} was built before: {folder}")
    else:
        if folder.exists():
            shutil.rmtree(folder)  # a build that was cut off: the marker is written last
        folder.mkdir(parents=True)
        info(f"prepare: building {name} in {folder}")
        keys = builder.build(folder)
        # Without the place of the build, which may move.
        relative = {key: moved(value, folder, _HERE) for key, value in keys.items()}
        write_record(marker, {"prepare": json.loads(identity), "keys": relative})
    built = read_record(marker, f"remove {folder}, so that it is built again")
    return folder, {key: moved(value, _HERE, folder) for key, value in built["keys"].items()}


def is_built(name: str, builder: Any, root: Path) -> bool:
    """Whether `build_once` would find the build of this description under `root`."""
    return (_place(name, builder, root)[0] / _MARKER).is_file()


def _place(name: str, builder: Any, root: Path) -> tuple[Path, str]:
    """The folder of a build, and its description as text."""
    settings = plain(builder)
    inputs = dict(_inputs(settings))
    identity = json.dumps([name, settings, inputs] if inputs else [name, settings], sort_keys=True)
    return root / f"{name.replace(':', '.')}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}", identity


def _inputs(settings: Any) -> Iterator[tuple[str, Any]]:
    """Each file or folder that a value names by a path, and what tells whether it changed."""
    if isinstance(settings, dict | list):
        for value in settings.values() if isinstance(settings, dict) else settings:
            yield from _inputs(value)
    elif isinstance(settings, str) and (os.sep in settings or Path(settings).suffix):  # not the name of a split
        path = Path(settings)
        if path.is_file():
            yield settings, file_digest(path) if path.stat().st_size <= _LARGE else _state(path)
        elif path.is_dir():
            yield settings, {str(file.relative_to(path)): _state(file) for file in sorted(path.rglob("*"))}


def _state(path: Path) -> list[int]:
    if not path.is_file():
        return []
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def moved(value: Any, here: Path | str, there: Path | str) -> Any:
    """A path inside `here` as one inside `there`, also among the values of a mapping; anything else unchanged."""
    if isinstance(value, dict):
        return {key: moved(one, here, there) for key, one in value.items()}
    if isinstance(value, (str, Path)) and str(value).startswith(str(here)):
        return str(there) + str(value)[len(str(here)) :]
    return value
