"""Signals that come where Python drops what is raised."""

import os
import signal
import sys
import time
import weakref

import pytest

from fdiv.errors import TerminatedError
from fdiv.interrupts import stoppable


class Dying:
    """Is sent a signal while it goes."""

    def __init__(self, number):
        self.number = number

    def close(self):
        os.kill(os.getpid(), self.number)

    def __del__(self):
        self.close()


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, TerminatedError), (signal.SIGINT, KeyboardInterrupt)])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("place", ["a destructor", "a callback"])
def test_a_signal_where_python_drops_it_is_not_lost(number, error, depth, place, capsys):
    handlers = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)] + [sys.unraisablehook]

    def wait():
        if place == "a destructor":
            Dying(number)
        else:
            kept = weakref.WeakSet([owner := type("Owner", (), {})()])
            reference = weakref.ref(owner, lambda _: os.kill(os.getpid(), number))
            del owner
            assert not kept and reference() is None
        stop = time.monotonic() + 30
        while time.monotonic() < stop:
            time.sleep(0.001)

    with pytest.raises(error, match="how to go on"):
        with stoppable(lambda: "how to go on"):
            if depth == 2:
                with stoppable(lambda: "how to go on from here"):
                    wait()
            wait()
    assert [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)] + [sys.unraisablehook] == handlers
    assert "Exception ignored" not in capsys.readouterr().err


def test_a_ctrl_c_that_is_turned_off_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable(lambda: ""):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
