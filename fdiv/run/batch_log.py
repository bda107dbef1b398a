"""`batch_log.jsonl`: which rows every optimizer step held, as keyed digests, and what they were computed with.

Every line is a JSON object with its own digest (`fdiv.sealed`):

* `{"part": …, "from_step": 0, "data": …, "model": …, "made_with": …, …}` when a training begins or goes on;
* `{"step": 1, "batches": [["3f…", …], …]}` after each optimizer step: one list for each micro-batch, in order, with
  the digests of its rows, and null for a place that was empty.

The digests are made with the key in `_batch_log.key`, which only its owner can read and no upload to the hub takes.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fdiv.errors import DataError
from fdiv.sealed import SealedLines, sealed_line

__all__ = [
    "EXCLUDED",
    "KEY",
    "LOG",
    "BatchLog",
    "changes",
    "made_with",
    "part_line",
    "read_key",
    "step_line",
    "write_key",
]

LOG = "batch_log.jsonl"
KEY = "_batch_log.key"  # TRL's upload to the hub leaves out names that begin with an underscore
EXCLUDED = "_excluded_rows.json"
"""The file of a run that says which rows it left out, by their numbers in the data."""

_FORMAT = 1
_PACKAGES = (
    "fdiv",
    *(f"fdiv.{name}" for name in ("alignment", "distillation", "eval", "recipes", "rl", "unlearning")),
)
_COMPARED = ("versions", "platform", "device", "processes", "distributed", "threads")


# ---------------------------------------------------------------- the key
def write_key(folder: Path, key: bytes) -> None:
    """Write the key of a folder's digests; only its owner can read it."""
    path = folder / KEY
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(key.hex() + "\n")


def read_key(folder: Path) -> bytes | None:
    """The key of a folder's digests; None where there is none.

    Raises:
        DataError: it is damaged.
    """
    path = folder / KEY
    if not path.is_file():
        return None
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except ValueError:
        key = b""
    if len(key) != 32:
        raise DataError(f"{path} is damaged: a key has 64 hex digits; the digests of {folder / LOG} mean nothing now")
    return key


# ---------------------------------------------------------------- what a run is computed with
def made_with(record: Mapping[str, Any]) -> dict[str, Any]:
    """What equal runs need beside recipe, data and model: versions, code, device, processes, threads, processor.

    Args:
        record: `fdiv.provenance.environment`.
    """
    return {name: record[name] for name in _COMPARED} | {"code": _code_digest(), "processor": _processor()}


def _code_digest() -> str:
    """One digest of the Python files of this package, whether or not they are committed."""
    files: dict[str, Path] = {}
    for package in _PACKAGES:
        spec = find_spec(package)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            for file in Path(place).rglob("*.py"):
                files[f"{package}/{file.relative_to(place).as_posix()}".replace(".", "/")] = file
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        digest.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """The processor's model and the vector instructions in use: libraries choose their kernels by them."""
    import torch

    name = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # no Linux: the platform's word has to do
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


_REMEDIES = {
    "threads": "; set OMP_NUM_THREADS to that",
    "code": "; check out the code of that run",
}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One phrase for each thing that a run was computed with and that is different now."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        was, current = before.get(name), now.get(name)
        if was == current:
            continue
        if name == "versions" and isinstance(was, Mapping) and isinstance(current, Mapping):
            packages = sorted(key for key in was.keys() | current.keys() if was.get(key) != current.get(key))
            found += [f"{key} is {current.get(key)} and was {was.get(key)}" for key in packages]
        else:
            found.append(f"{name} is {current} and was {was}{_REMEDIES.get(name, '')}")
    return found


# ---------------------------------------------------------------- the file
@dataclass
class BatchLog:
    """What a log holds.

    Args:
        path: the file.
        parts: its part lines in order. steps: step → micro-batches → digests, None for an empty place.
    """

    path: Path
    parts: list[dict[str, Any]] = field(default_factory=list)
    steps: dict[int, list[list[str | None]]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> BatchLog:
        """Read a log.

        Raises:
            DataError: there is none, or it is damaged or no batch log.
        """
        if not path.is_file():
            raise DataError(f"there is no {path}: the run was made without batch_log: true, so no step is known")
        log = cls(path)
        for number, item in enumerate(SealedLines.read(path, "it cannot be used").items, start=1):
            if item.get("part") == _FORMAT:
                log.parts.append(item)
            elif isinstance(item.get("step"), int) and isinstance(item.get("batches"), list):
                log.steps[item["step"]] = item["batches"]
            else:
                raise DataError(f"{path}, line {number} is neither a part nor a step of a batch log of this release")
        if not log.parts:
            raise DataError(f"{path} does not say what its run was computed with: it has no first line")
        return log

    def first_steps(self) -> dict[str, int]:
        """Digest → the first optimizer step (from 1) that held the row."""
        found: dict[str, int] = {}
        for step in sorted(self.steps):
            for batch in self.steps[step]:
                for digest in batch:
                    if digest is not None:
                        found.setdefault(digest, step)
        return found

    def gap(self) -> str | None:
        """Why the log does not know every step; None where it does."""
        begins, missing = min(part["from_step"] for part in self.parts), set(range(1, max(self.steps, default=0) + 1))
        missing -= self.steps.keys()
        if begins > 0 and missing:
            return f"it begins at step {begins}: the first part of the run was made without batch_log"
        return f"step {min(missing)} is missing" if missing else None

    def lines(self, until: int) -> Iterable[str]:
        """Its lines up to a step, as they were written."""
        parts = [part for part in self.parts if part["from_step"] < until]
        ends = [part["from_step"] for part in parts[1:]] + [until]
        for part, end in zip(parts, ends, strict=True):
            yield sealed_line(part)
            yield from (step_line(n, self.steps[n]) for n in range(part["from_step"] + 1, end + 1) if n in self.steps)


def part_line(from_step: int, content: Mapping[str, Any]) -> str:
    """The line of a part that begins after `from_step`."""
    return sealed_line({"part": _FORMAT, "from_step": from_step, **content})


def step_line(step: int, batches: list[list[str | None]]) -> str:
    """The line of an optimizer step."""
    return sealed_line({"step": step, "batches": batches})
