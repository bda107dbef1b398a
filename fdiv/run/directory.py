"""The directory of a run: what may be written into it, and how."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fdiv.errors import FdivError
from fdiv.files import write_text
from fdiv.lock import LOCK, output_lock, refuse_locked
from fdiv.sealed import LISTING, listed, write_record
from fdiv.terminal import is_main_process
from fdiv.training.checkpoints import checkpoint_folders

__all__ = ["RunDirectory", "raise_on_all"]

FINISHED = "result.json"
AFTER_TRAINING = "measure it with `fdiv eval`, or train again with --overwrite_output_dir true"
_WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors")
_MARKS = ("recipe_resolved.yaml", "environment.json")
_LISTED = ("metrics.jsonl", "recipe_resolved.yaml", "batch_log.jsonl")
_OUTPUTS = (
    FINISHED,
    LISTING,
    "metrics.jsonl",
    "eval_before.json",
    "eval_after.json",
    "README.md",
    "report.html",
    "erasure.html",
    "erasure.json",
    "error.txt",
    "batch_log.jsonl",
    "_batch_log.key",
    "_excluded_rows.json",
)


class RunDirectory:
    """`output_dir` of one run. `result.json` is written last: where it stands, the run is finished."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def finished(self) -> bool:
        """Whether a run came to its end here."""
        return (self.path / FINISHED).is_file()

    @property
    def trained(self) -> bool:
        """Whether the weights at the end of a training stand here."""
        return any(next(self.path.glob(pattern), None) for pattern in _WEIGHTS)

    def checkpoints(self) -> list[Path]:
        """The training checkpoints, oldest first."""
        return checkpoint_folders(self.path)

    def check(self, overwrite: bool, resume: bool | str | None) -> None:
        """Refuse to write where that would touch an earlier result. Reads only.

        Raises:
            FdivError: a finished run, an unfinished one with checkpoints or a trained model, or a directory that is
                no run of fdiv; or nothing to resume from.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FdivError(f"output_dir {self.path} is a file; choose another --output_dir")
        if self.finished and not overwrite:
            raise FdivError(
                f"{self.path} holds a finished run, which is left alone; choose another --output_dir, or replace it "
                "with --overwrite_output_dir true"
            )
        if resume is True and not self.checkpoints():
            raise FdivError(
                f"resume_from_checkpoint: there is no checkpoint in {self.path}; leave the key out to start"
            )
        if isinstance(resume, str) and not Path(resume).is_dir():
            raise FdivError(f"resume_from_checkpoint: no such directory: {resume}")
        if not self.path.exists():
            return
        others = [entry.name for entry in self.path.iterdir() if entry.name not in ("prepared", "error.txt", LOCK)]
        if others and not any((self.path / mark).exists() for mark in _MARKS):
            raise FdivError(
                f"output_dir {self.path} is not empty and not a run of fdiv (it holds {sorted(others)[0]!r}); "
                "choose another --output_dir"
            )
        if self.checkpoints() and not (resume or overwrite):
            raise FdivError(
                f"{self.path} holds checkpoints of an unfinished run; continue it with --resume_from_checkpoint true, "
                "start again with --overwrite_output_dir true, or choose another --output_dir"
            )
        if self.trained and not (resume or overwrite):
            raise FdivError(
                f"{self.path} holds a trained model whose evaluation was not finished; {AFTER_TRAINING}, or choose "
                "another --output_dir"
            )

    @contextmanager
    def claimed(self, overwrite: bool, resume: bool | str | None) -> Iterator[None]:
        """`check`, then make the directory and hold its lock: what was checked stays true in the body.

        Of several processes of one run, the main one does so; the others would look at what it is writing. All of them
        raise what it found: one that went on alone would meet the others in another run of a sweep.

        Raises:
            FdivError: see `check`; another process writes there; it cannot be written.
        """
        refused = None
        with ExitStack() as held:
            if is_main_process():
                try:
                    refuse_locked(self.path)
                    self.check(overwrite, resume)
                    self.open()
                    held.enter_context(output_lock(self.path))
                    self.check(overwrite, resume)  # it may have been another's between the first look and the lock
                except FdivError as error:
                    refused = error
            raise_on_all(refused)
            yield

    def open(self) -> None:
        """Make the directory, and see that it can be written.

        Raises:
            FdivError: it cannot be made, or not written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write(".writable", "")
            (self.path / ".writable").unlink()
        except OSError as error:
            raise FdivError(
                f"output_dir {self.path} cannot be written ({error.strerror}); choose another --output_dir"
            ) from error

    def clear(self) -> None:
        """Remove what an earlier run of fdiv wrote, its checkpoints too (nothing that it did not write).

        The files that mark it as a run of fdiv stay until they are written again.
        """
        for name in _OUTPUTS:
            (self.path / name).unlink(missing_ok=True)
        for pattern in (*_WEIGHTS, "model.safetensors.index.json"):
            for file in self.path.glob(pattern):
                file.unlink()
        for folder in (*self.checkpoints(), self.path / "eval", self.path / "plots"):
            if folder.is_dir():
                shutil.rmtree(folder)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write `result.json`, the last record, when the digests of those that hold none themselves are listed."""
        with listed(*(self.path / name for name in _LISTED)):
            pass  # they stand there by now
        write_record(self.path / FINISHED, result)

    def write(self, name: str, content: str) -> None:
        """Write a file so that it is either whole or absent."""
        write_text(self.path / name, content)


def raise_on_all(error: FdivError | None) -> None:
    """Raise what the main process found, on every process of the run; all of them call it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        said = [None if error is None else str(error)]
        if PartialState().num_processes > 1:
            broadcast_object_list(said)
        if error is None and said[0] is not None:
            error = FdivError(said[0])
    if error is not None:
        raise error
