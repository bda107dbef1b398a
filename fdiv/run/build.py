"""What `prepare:` builds for a run of several processes: in a process of its own, which is in no group.

A builder may load a model or train one. In a process that has joined others, transformers and accelerate would shard
that model, and wait for processes that wait for the build.
"""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from fdiv import errors
from fdiv.files import plain
from fdiv.recipe.prepared import build_once, is_built

__all__ = ["build"]

# What launchers tell their processes.
_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
_PREFIXES = ("MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")


def build(name: str, builder: Any, root: Path) -> tuple[Path, dict[str, Any]]:
    """`build_once`; in a process of its own where this one has joined others.

    Args:
        name: of the builder in `fdiv.catalog.TASKS`, or `module:attribute`.
        builder: its settings, a dataclass with `build(folder)`.
        root: where builds stand beside each other.

    Raises:
        ValueError, FileNotFoundError, FdivError: what the builder raised.
        FdivError: its process ended otherwise.
    """
    from accelerate import PartialState

    if PartialState().num_processes > 1 and not is_built(name, builder, root):
        _build_apart(name, builder, root)
    return build_once(name, builder, root)  # finds the build where there is one


def _build_apart(name: str, builder: Any, root: Path) -> None:
    settings = {field.name: plain(getattr(builder, field.name)) for field in fields(builder) if field.init}
    environment = {
        key: value for key, value in os.environ.items() if key not in _GROUP and not key.startswith(_PREFIXES)
    }
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # a builder of one's own
    with tempfile.TemporaryDirectory() as folder:
        order = Path(folder) / "build.json"
        order.write_text(json.dumps({"name": name, "settings": settings, "root": str(root)}))
        code = subprocess.run([sys.executable, "-m", __name__, str(order)], env=environment, check=False).returncode
        failure = order.with_name("failure.json")
        if failure.is_file():
            said = json.loads(failure.read_text())
            raise {**vars(builtins), **vars(errors)}[said["class"]](said["message"])
    if code:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        raise errors.FdivError(f"prepare: the process that built {name} {how}; what it wrote stands above")


def _main(order: Path) -> int:
    from fdiv.catalog import TASKS

    read = json.loads(order.read_text())
    try:
        build_once(read["name"], TASKS.find(read["name"])(**read["settings"]), Path(read["root"]))
    except (ValueError, FileNotFoundError, errors.FdivError) as error:
        ours = hasattr(errors, type(error).__name__)
        kind = type(error).__name__ if ours else "FileNotFoundError" if isinstance(error, OSError) else "ValueError"
        failure = {"class": kind, "message": str(error)}
        order.with_name("failure.json").write_text(json.dumps(failure))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1])))
