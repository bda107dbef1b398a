"""One writer per output directory, and what tells a lock in use from one that was left behind."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from fdiv import lock
from fdiv.errors import FdivError
from fdiv.lock import LOCK, output_lock, refuse_locked

HOLD = """
import sys, time
from pathlib import Path
from fdiv.lock import output_lock
with output_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path/out`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_until_the_first_has_ended(holder, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(FdivError) as refusal, output_lock(out):
        pass
    assert f"{out} is in use by process {holder.pid} on {socket.gethostname()} (since 20" in str(refusal.value)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((out / LOCK).read_text())["process"] == holder.pid  # nothing was cleaned up
    with output_lock(out):
        assert f"the lock of process {holder.pid} on" in capsys.readouterr().err
        assert json.loads((out / LOCK).read_text())["process"] == os.getpid()
    assert not (out / LOCK).exists()


@pytest.mark.parametrize("name", ["out", "out.json", "deep/out"])
def test_nothing_is_left_of_a_lock(tmp_path, name):
    before = sorted(tmp_path.rglob("*"))
    with (
        output_lock(tmp_path / name),
        pytest.raises(FdivError, match="is in use by process"),
        output_lock(tmp_path / name),
    ):
        pass
    assert not [path for path in tmp_path.rglob("*") if path not in before and path.is_file()]
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("owner", "held"),
    [
        ({}, True),
        ({"process": 2**22 + 1}, False),
        ({"process_started": 1.0}, False),  # its number was given to another process
        ({"host": "elsewhere", "process": 2**22 + 1}, True),
    ],
)
def test_without_flock_the_owner_is_looked_up(tmp_path, monkeypatch, owner, held):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    (tmp_path / LOCK).write_text(json.dumps(lock._this_process() | owner))
    if held:
        hint = "if it has ended, remove " if "host" in owner else "choose another output directory$"
        with pytest.raises(FdivError, match=f"is in use by process.*{hint}"), output_lock(tmp_path):
            pass
    else:
        with output_lock(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(FdivError, match="cannot be written"), output_lock(place):
            pass


def test_the_other_processes_of_a_run_are_not_refused(holder, tmp_path, monkeypatch):
    """The main process holds the lock by the time another one looks."""
    monkeypatch.setenv("RANK", "1")
    refuse_locked(tmp_path / "out")
    with output_lock(tmp_path / "out"):
        pass
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(FdivError, match="is in use by"):
        refuse_locked(tmp_path / "out")
