"""A process of a group ends with its own exit code, whatever would happen while the interpreter is taken down."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# An object that aborts the process when it is finalised, as a thread of gloo does that still holds a tensor.
SCRIPT = """
import atexit, os, sys
from fdiv.cli.ending import exit_after

class Aborts:
    def __del__(self, abort=os.abort):
        abort()

def main():
    if {joins}:
        import torch.distributed as distributed
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    atexit.register(print, "atexit was run")
    sys.stdout.write("all work is done\\n")
    {end}

kept = Aborts()
{call}
"""


def _run(end: str, joins: bool = True, call: str = "exit_after(main)") -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(end=end, joins=joins, call=call)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(("end", "code"), [("return None", 0), ("return 0", 0), ("return 3", 3)])
def test_the_exit_code_of_a_joined_process_stands(end, code):
    done = _run(end)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines() == ["all work is done", "atexit was run"]


def test_without_it_the_process_would_abort():
    assert _run("return 0", call="sys.exit(main())").returncode == -signal.SIGABRT


def test_a_process_alone_ends_as_ever():
    assert _run("return 0", joins=False).returncode == -signal.SIGABRT


def test_an_error_is_shown_as_ever():
    done = _run("raise RuntimeError('no more rows')")
    assert done.returncode != 0
    assert "RuntimeError: no more rows" in done.stderr


def test_a_closed_pipe_does_not_undo_the_exit():
    script = SCRIPT.format(end="return 0", joins=True, call="exit_after(main)").replace(
        'atexit.register(print, "atexit was run")', "sys.stdout.close()"
    )
    script = script.replace('sys.stdout.write("all work is done\\n")', "pass")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
