"""SIGTERM and Ctrl-C end a command with one line that says how to go on. Standard library only."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from fdiv.errors import TerminatedError

__all__ = ["Sigterm", "held_back", "stoppable"]

_AGAIN = 0.02  # seconds


class Sigterm(KeyboardInterrupt):
    """SIGTERM, on its way up. Like Ctrl-C it passes every `except Exception`."""


@contextmanager
def stoppable(how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Inside, SIGTERM raises `TerminatedError` and Ctrl-C `KeyboardInterrupt`, both with `how_to_go_on()` in them.

    Contexts nest: the innermost that was entered tells how to go on. Outside the main thread, where Python has no
    signal handlers, only the message is added. A signal in a destructor or a weak reference's callback, where Python
    drops what is raised, comes again after it.
    """
    before, hook = {}, sys.unraisablehook
    if threading.current_thread() is threading.main_thread():
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, _handler(os.getpid()))
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell turned it off
            before[signal.SIGINT] = signal.signal(signal.SIGINT, _handler(os.getpid()))
        sys.unraisablehook = _sent_again(hook)
    try:
        yield
    except Sigterm:
        raise TerminatedError(f"terminated (SIGTERM): {how_to_go_on()}") from None
    except KeyboardInterrupt as interrupt:
        if interrupt.args:
            raise
        raise KeyboardInterrupt(f"interrupted (Ctrl-C): {how_to_go_on()}") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if before:
            sys.unraisablehook = hook


@contextmanager
def held_back() -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C wait for the end of the body; a second signal does not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, waiting = os.getpid(), []
    numbers = (signal.SIGTERM, signal.SIGINT)

    def keep(number: int, frame: FrameType | None) -> None:
        if waiting or os.getpid() != owner:  # or a forked worker, which has nothing to finish
            restore()
            os.kill(os.getpid(), number)
        waiting.append(number)

    def restore() -> None:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)

    before = [signal.signal(number, keep) for number in numbers]
    try:
        yield
    finally:
        restore()
    if waiting:
        signal.raise_signal(waiting[0])


def _handler(owner: int) -> Callable[[int, FrameType | None], None]:
    def handle(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked worker inherits the handler: it ends as without it
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise KeyboardInterrupt if number == signal.SIGINT else Sigterm

    return handle


def _sent_again(hook: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A hook for what Python drops: a signal is sent again, all else goes to the hook of before."""

    def dropped(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            number = signal.SIGTERM if isinstance(unraisable.exc_value, Sigterm) else signal.SIGINT
            again = threading.Timer(_AGAIN, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
        else:
            hook(unraisable)

    return dropped
