"""Runs that a signal ends at a random moment, and that are resumed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.fuzz.case import Edit, Kind, Outcome
from tests.fuzz.command import TooLong, command, judged

__all__ = ["Kills"]

_STEPS = 6
_LIMIT = 120.0  # seconds, for a run that takes three
_EXIT = {"SIGTERM": 143, "SIGINT": 130}
# Entries that say how long something took, or hold all others.
_TIMES = ("digest", "runtime", "per_second", "seconds", "flops", "memory", "time")


class Kills(Kind):
    """A run is killed after a part of its time, and the same command, or its resume, is run: nothing may be lost."""

    name = "kills"
    what = "SIGKILL, SIGTERM, SIGINT at a random moment of a run, then resumed"
    few = 1

    def members(self, rng: random.Random) -> list[Edit]:
        signals = ["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT"]
        edits: list[Edit] = [("save_steps", rng.choice([1, 2, 3]))]
        return [
            *edits,
            *(("signal", rng.choice(signals), round(rng.random(), 3)) for _ in range(rng.choice([1, 1, 2]))),
        ]

    def _recipe(self, folder: Path, save_steps: int) -> Path:
        evaluation = {"name": "preferences", "batch_size": 4}
        return self.world.write_recipe(
            folder, max_steps=_STEPS, save_strategy="steps", save_steps=save_steps, eval=evaluation
        )

    @cached_property
    def whole(self) -> tuple[Path, float]:
        """The output of the run that was left alone, and the seconds it took in a process of its own."""
        folder = self.world.folder / "unkilled"
        folder.mkdir(parents=True)
        began = time.monotonic()
        code, said = _forked(self._recipe(folder, 2), folder, [], None, 0)
        if code != 0:
            raise RuntimeError(f"the run of the world failed: {said}")
        return folder / "out", time.monotonic() - began

    def judge(self, edits: list[Edit], folder: Path) -> Outcome:
        with _one_thread():
            return self._judged(edits, folder)

    def _judged(self, edits: list[Edit], folder: Path) -> Outcome:
        whole, seconds = self.whole
        save_steps = next((edit[1] for edit in edits if edit[0] == "save_steps"), 2)
        recipe, out = self._recipe(folder, save_steps), folder / "out"
        more: list[str] = []
        for name, *values in edits:
            if name != "signal" or (out / "result.json").is_file():
                continue
            code, said = _forked(recipe, folder, more, getattr(signal, values[0]), values[1] * seconds)
            fault = None if (out / "result.json").is_file() else _fault_of_end(values[0], code, said)
            if fault:
                return fault
            if (out / "model.safetensors").is_file() and not (out / "result.json").is_file():
                more = ["--overwrite_output_dir", "true"]  # the way on that the message names
                if _read(out) != _read(whole):
                    return Outcome("lost", "the saved model is another")
            else:
                more = ["--resume_from_checkpoint", "true"] if any(out.glob("checkpoint-*")) else []
        if (out / "result.json").is_file():
            return Outcome("ok", "", "finished before the signal")
        outcome = judged(command(["run", recipe, *more], folder, 120))
        if outcome.verdict != "ok":
            return Outcome("lost", f"cannot go on after {edits[-1][1]}: {outcome.verdict}", outcome.message)
        if _read(out) != _read(whole):
            return Outcome("lost", "other weights than those of the whole run")
        return _same_numbers(whole, out)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A fork has none of the threads that OpenMP has started here, and waits for them for ever once it wants some."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fault_of_end(name: str, code: int, said: str) -> Outcome | None:
    """SIGKILL says nothing; the others are one line and the shell's exit code. A run may have ended before."""
    if "Traceback (most recent call last)" in said:
        return Outcome("traceback", f"{name}: a traceback", said[-800:])
    if code in (0, -9 if name == "SIGKILL" else _EXIT[name]):
        line = [line for line in said.splitlines() if line.startswith("fdiv: ")]
        if code != 0 and name != "SIGKILL" and len(line) != 1:
            return Outcome("silent", f"{name}: {len(line)} lines", said[-500:])
        return None
    return Outcome("silent", f"{name}: exit code {code}", said[-500:])


def _forked(recipe: Path, folder: Path, more: list[str], number: int | None, after: float) -> tuple[int, str]:
    """`fdiv run` in a fork of this process, ended by a signal some seconds after it can be: its handlers stand then.

    The exit code (negative: the signal), and what it said.
    """
    log = folder / "said.txt"
    sys.stdout.flush()
    ready, started = os.pipe()
    process = os.fork()
    if process == 0:
        code = 99
        try:
            descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.chdir(folder)
            code = _main(["run", str(recipe), *more], started)
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(started)
    os.read(ready, 1)
    os.close(ready)
    if number is not None:
        time.sleep(after)
        os.kill(process, number)
    status, stop = (0, 0), time.monotonic() + _LIMIT
    while status[0] == 0:
        status = os.waitpid(process, os.WNOHANG)
        if time.monotonic() > stop:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise TooLong
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(status[1]), log.read_text(encoding="utf-8", errors="replace")


def _main(words: list[str], started: int) -> int:
    """`fdiv`, which says on a pipe when it can be stopped."""
    import traceback

    import fdiv.cli.command as module
    from fdiv.cli import main

    stoppable = module.stoppable

    @contextlib.contextmanager
    def told(how_to_go_on: Any) -> Iterator[None]:
        with stoppable(how_to_go_on):
            os.write(started, b".")
            yield

    module.stoppable = told
    try:
        return main(words)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def _read(out: Path) -> bytes:
    file = out / "model.safetensors"
    return file.read_bytes() if file.is_file() else b""


def _same_numbers(whole: Path, out: Path) -> Outcome:
    """`result.json` without times is that of the whole run."""
    expected, found = (json.loads((place / "result.json").read_text(encoding="utf-8")) for place in (whole, out))

    def kept(result: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in result.items() if not any(part in name for part in _TIMES)}

    for name in kept(expected).keys() | kept(found).keys():
        a, b = expected.get(name), found.get(name)
        close = isinstance(a, float) and isinstance(b, float) and abs(a - b) <= 1e-6 * max(1, abs(a))
        if a != b and not close:
            return Outcome("lost", f"{name} is another after the resume", f"{name}: {a} of the whole run, now {b}")
    return Outcome("ok")
