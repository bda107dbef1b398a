"""`fdiv …` in this process: exit code, output and error, with a limit on its time."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdiv.errors import FdivError
from tests.fuzz.case import Outcome

__all__ = ["Ended", "TooLong", "command", "crash", "judged", "time_limit"]

LONGEST = 1000  # characters of a message: ten lines of a hundred
_REPOSITORY = str(Path(__file__).resolve().parents[2])


class TooLong(BaseException):
    """The time is up. No `Exception`, so that nothing on the way takes it for one of its own."""


@dataclass
class Ended:
    """How a command ended. `code` is None where it raised `error`."""

    words: list[str]
    code: int | None
    out: str
    err: str
    error: BaseException | None
    seconds: float

    @property
    def messages(self) -> list[str]:
        """The lines that `fdiv` says an error with."""
        lines = (line for line in self.err.splitlines() if line.startswith("fdiv: "))
        return [line.removeprefix("fdiv: ") for line in lines]


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TooLong` in the block after a time; a timer that was set outside goes on afterwards."""

    def stop(*_: Any) -> None:
        raise TooLong

    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        rest = max(left - (time.monotonic() - began), 0.01) if left else 0
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, rest, interval)


def command(words: Sequence[Any], folder: Path, seconds: float = 60) -> Ended:
    """Run `fdiv WORDS` with `folder` as the working directory; environment and directory are as before afterwards."""
    from fdiv.cli import main

    words = [str(word) for word in words]
    # As a terminal's: text that UTF-8 lacks is an error on stdout.
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    environment, place, path = dict(os.environ), os.getcwd(), list(sys.path)
    code, error, began = None, None, time.process_time()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with time_limit(seconds):
                code = main(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except TooLong as late:
        error = late
    except Exception as raised:
        error = raised
    finally:
        os.chdir(place)
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environment)
    said = [_written(stream) for stream in (out, err)]
    return Ended(words, code, *said, error, time.process_time() - began)


def _written(stream: io.TextIOWrapper) -> str:
    """What was written to a stream; nothing where the command closed it."""
    with contextlib.suppress(ValueError):
        stream.flush()
        return stream.buffer.getvalue().decode("utf-8")
    return ""


def crash(error: BaseException) -> Outcome:
    """The outcome of an exception that got out: its type, and the last line of ours that it passed."""
    if isinstance(error, TooLong):
        return Outcome("hang", "no answer in time")
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(_REPOSITORY) and ".venv" not in frame.filename]
    last = (ours or frames)[-1]
    where = f"{Path(last.filename).name}:{last.lineno} in {last.name}"
    return Outcome("traceback", f"{type(error).__name__} at {where}", f"{type(error).__name__}: {error}"[:500])


def judged(ended: Ended, must_refuse: str = "") -> Outcome:
    """What any command owes any input: success, or a line and an exit code.

    Args:
        ended: the command.
        must_refuse: what is wrong with the input, where that is certain; success is then `silent`.
    """
    if isinstance(ended.error, FdivError) and "--debug" in ended.words:  # it asks for the traceback
        return Outcome("refused", "", str(ended.error))
    if ended.error is not None:
        return crash(ended.error)
    if "Traceback (most recent call last)" in ended.err:
        return Outcome("traceback", "a traceback was printed", ended.err[-500:])
    message = ended.messages[-1] if ended.messages else ""
    if max((len(line) for line in ended.messages), default=0) > LONGEST:
        longest = max(ended.messages, key=len)
        return Outcome("long", f"a message over ten lines: {longest[:60]}", f"{len(longest)} characters: {longest}")
    if ended.code == 0:
        return Outcome("silent", f"accepted: {must_refuse}") if must_refuse else Outcome("ok")
    if ended.code not in (1, 2):
        return Outcome("silent", f"exit code {ended.code}", message)
    if not message:
        return Outcome("silent", f"exit code {ended.code} without a word", ended.err[-500:])
    return Outcome("refused", "", message)
