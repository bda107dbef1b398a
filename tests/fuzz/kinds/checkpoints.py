"""Damaged, forged and poisoned checkpoints, resumed by `fdiv run --resume_from_checkpoint true`."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.fuzz.case import Edit, Kind, Outcome
from tests.fuzz.command import command, judged
from tests.fuzz.damage import byte_damage, damage_bytes

__all__ = ["Checkpoints"]

_STEPS = 4
_FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "training_args.bin",
    "config.json",
)


class _Pickle:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


class Checkpoints(Kind):
    """An interrupted run with two checkpoints is damaged and resumed: its end is the end of the whole run, or a line."""

    name = "checkpoints"
    what = "checkpoints with damaged, missing, forged and poisoned files, resumed"
    few = 3

    def members(self, rng: random.Random) -> list[Edit]:
        def one() -> Edit:
            step = rng.choice([2, 3, 3])
            file = rng.choice(_FILES)
            return rng.choice([
                ("bytes", step, file, byte_damage(rng)),
                ("bytes", step, file, byte_damage(rng)),
                ("bytes", step, "MARKER", byte_damage(rng)),
                ("remove", step, file),
                ("remove", step, "MARKER"),
                ("pickle", step, file),
                ("pickle", step, rng.choice(["pytorch_model.bin", "adapter_model.bin", "extra.pt", "sub/extra.pt"])),
                ("link", step, file),
                ("rename", step, rng.choice(["checkpoint-9", "checkpoint-x", "checkpoint-99999999999999999999", "checkpoint-"])),
                ("file", rng.choice(["checkpoint-5", "_saving", "checkpoint-5.txt"])),
                ("all of it", step, rng.choice(["empty", "file"])),
            ])  # fmt: skip

        return [one() for _ in range(rng.choice([1, 1, 2, 3]))]

    @cached_property
    def whole(self) -> Path:
        """The output of the run, uninterrupted, with its checkpoints."""
        folder = self.world.folder / "whole"
        folder.mkdir(parents=True)
        ended = command(["run", self._recipe(folder)], folder, 120)
        if ended.code != 0:
            raise RuntimeError(f"the run of the world failed: {ended.error!r} {ended.messages}") from ended.error
        return folder / "out"

    @cached_property
    def interrupted(self) -> Path:
        """The same after a kill in step 4: two checkpoints, no model, no result."""
        folder = self.world.folder / "interrupted" / "out"
        shutil.copytree(self.whole, folder)
        shutil.rmtree(folder / f"checkpoint-{_STEPS}")
        for path in [*folder.glob("*.safetensors"), folder / "result.json"]:
            path.unlink()
        return folder

    def _recipe(self, folder: Path) -> Path:
        return self.world.write_recipe(folder, max_steps=_STEPS, save_strategy="steps", save_steps=1)

    def judge(self, edits: list[Edit], folder: Path) -> Outcome:
        from fdiv.training.checkpoints import MARKER

        out, canary = self.world.copy(self.interrupted, folder), folder / "canary"
        shutil.rmtree(out / "checkpoint-1")
        for edit in edits:
            _apply(out, edit, canary, MARKER)
        ended = command(["run", self._recipe(folder), "--resume_from_checkpoint", "true"], folder, 120)
        if canary.exists():
            return Outcome("escape", "a pickle was executed")
        outcome = judged(ended)
        if outcome.verdict != "ok":
            return outcome
        if _weights(out) != _weights(self.whole):
            return Outcome("lost", "other weights after the resume", "; ".join(ended.err.splitlines()[-3:]))
        return outcome


def _weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def _apply(out: Path, edit: Edit, canary: Path, marker: str) -> None:
    name, *values = edit
    if name == "file":
        (out / values[0]).write_text("x", encoding="utf-8")
        return
    folder = out / f"checkpoint-{values[0]}"
    if not folder.is_dir():
        return
    file = folder / (marker if values[1] == "MARKER" else values[1])
    if name == "bytes" and file.is_file():
        file.write_bytes(damage_bytes(file.read_bytes(), values[2]))
    elif name == "remove":
        file.unlink(missing_ok=True)
    elif name == "pickle":
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(pickle.dumps(_Pickle(canary)))
        if file.name in _FILES:
            _forge(folder / marker, file)
    elif name == "link" and file.is_file():
        file.rename(out / f"elsewhere-{file.name}")
        file.symlink_to(out / f"elsewhere-{file.name}")
    elif name == "rename" and not (out / values[1]).exists():
        folder.rename(out / values[1])
    elif name == "all of it":
        shutil.rmtree(folder)
        folder.mkdir() if values[1] == "empty" else folder.write_text("x", encoding="utf-8")


def _forge(marker: Path, file: Path) -> None:
    """Make the marker agree with a file: an attacker who can write the one can write the other."""
    import hashlib

    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
        content["files"][file.name] = {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        content.pop("digest", None)
        marker.write_text(json.dumps(content), encoding="utf-8")
    except (OSError, ValueError, KeyError, TypeError):
        return
