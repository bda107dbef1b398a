"""Signals that come where Python drops what is raised."""

import os
import signal
import time

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
def test_a_signal_in_a_destructor_is_not_lost(number, error, depth, capsys):
    handlers = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)]

    def wait():
        Dying(number)
        stop = time.monotonic() + 30
        while time.monotonic() < stop:
            time.sleep(0.001)

    with pytest.raises(error, match="how to go on"):
        with stoppable(lambda: "how to go on"):
            if depth == 2:
                with stoppable(lambda: "how to go on from here"):
                    wait()
            wait()
    assert [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert "Exception ignored" not in capsys.readouterr().err


def test_a_ctrl_c_that_is_turned_off_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable(lambda: ""):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
