"""What starts a sandbox: refusals that name the remedy, the filter of system calls, ends by signals from outside."""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import re
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from fdiv.errors import SandboxError
from fdiv.rl.rewards import build_reward
from fdiv.rl.rewards.sandbox import bubblewrap as backend
from fdiv.rl.rewards.sandbox import check_sandbox, seccomp, unconfined
from fdiv.rl.rewards.sandbox.inside import survey
from fdiv.rl.rewards.sandbox.inside.wire import Channel
from fdiv.rl.rewards.sandbox.judge import RIGHT, Judge
from fdiv.rl.rewards.sandbox.judge import _read as read_output
from fdiv.rl.rewards.sandbox.server import CrashError
from tests.rl.sandbox.attack import processes_below


@pytest.fixture(autouse=True)
def unchecked():
    """The check's result is remembered for the process: forget it."""
    check_sandbox.cache_clear()
    yield
    check_sandbox.cache_clear()


def refusal(**settings) -> str:
    with pytest.raises(SandboxError) as raised:
        build_reward({"name": "code", "allow_execution": True, **settings})
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_without_bubblewrap_the_reward_refuses(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert refusal() == (
        "sandbox: bubblewrap: there is no program bwrap here; install it (apt install bubblewrap), or set sandbox: none "
        "to run programs without protection"
    )


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'bwrap: No permissions to create new namespace' >&2; exit 1", "No permissions to create new namespace"),
        ("exit 0", "it ended"),
    ],
)
def test_where_bubblewrap_does_not_work_the_reward_refuses(monkeypatch, tmp_path, script, reason):
    program = tmp_path / "bwrap"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    message = refusal()
    assert re.match(
        r"sandbox: bubblewrap: it does not work here \(.*\); allow user namespaces .*sandbox: none", message
    )
    assert reason in message


def test_a_sandbox_that_holds_nothing_back_is_refused(monkeypatch):
    class Open:
        """Claims to be bubblewrap and confines nothing."""

    found = {"see other processes": True, "read /etc": True, "be root": False}
    monkeypatch.setattr("fdiv.rl.rewards.sandbox.BACKENDS", {"bubblewrap": Open, "none": Open})
    monkeypatch.setattr("fdiv.rl.rewards.sandbox.server.Server", lambda *_: Surveyed(found))
    assert refusal().startswith(
        "sandbox: bubblewrap: a process inside can still see other processes, read /etc; allow"
    )


class Surveyed:
    """Stands for a server whose child says what it can do."""

    def __init__(self, found: dict[str, bool]) -> None:
        self.found = found

    def begin(self, descriptor: int) -> None:
        Channel(socket.socket(fileno=os.dup(descriptor))).send(self.found)

    def close(self) -> None:
        pass


def test_the_survey_sees_what_an_open_process_can_do():
    ours, theirs = socket.socketpair()
    survey.serve(theirs.detach())
    found = Channel(ours).receive()
    assert found["see other processes"] and found["read /etc"] and found["signal its parent"] == (os.geteuid() == 0)
    assert found["be root"] == (os.geteuid() == 0)


def test_an_unknown_sandbox_names_the_known_ones():
    assert refusal(sandbox="docker") == "sandbox: 'docker' is unknown; there are: bubblewrap, none"


def test_none_is_said_in_the_log(monkeypatch, caplog):
    monkeypatch.setattr(unconfined, "others_can_read", lambda: True)
    with caplog.at_level(logging.WARNING):
        build_reward({"name": "code", "allow_execution": True, "sandbox": "none"})
    assert "sandbox: none: programs that the model wrote run on this machine" in caplog.text


def test_none_refuses_to_run_programs_as_root(monkeypatch):
    monkeypatch.setattr(unconfined, "others_can_read", lambda: False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    message = refusal(sandbox="none")
    assert message.startswith("sandbox: none: programs run as another user than root, who cannot read ")
    assert "use sandbox: bubblewrap" in message


def run_filter(program: bytes, architecture: int, number: int) -> int:
    """What a filter of classic BPF returns for a call: an interpreter of the four instructions it has."""
    steps = [
        tuple(int.from_bytes(program[i + a : i + b], "little") for a, b in ((0, 2), (2, 3), (3, 4), (4, 8)))
        for i in range(0, len(program), 8)
    ]
    position, value = 0, None
    while True:
        code, true, false, constant = steps[position]
        position += 1
        if code == seccomp.LOAD:
            value = {0: number, 4: architecture}[constant]
        elif code == seccomp.RETURN:
            return constant
        else:
            holds = value == constant if code == seccomp.EQUAL else value >= constant
            position += true if holds else false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("server", [False, True])
def test_the_filter_refuses_what_it_lists_and_nothing_else(monkeypatch, machine, server):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    architecture, column = seccomp.ARCHITECTURES[machine]
    program = seccomp.filter_program(server)
    left = seccomp.SERVER if server else ()
    listed = {calls[column] for name, calls in seccomp.CALLS.items() if name not in left} - {None}
    for number in range(600):
        expected = seccomp.EPERM if number in listed else seccomp.ALLOW
        assert run_filter(program, architecture, number) == expected
    assert run_filter(program, architecture, seccomp.FIRST_X32 + 1) == seccomp.EPERM
    assert run_filter(program, 0x40000003, 1) == seccomp.KILL  # i386


def test_other_processors_have_no_filter(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert seccomp.filter_program() is None


def test_no_file_of_a_home_is_bound_but_the_interpreter():
    bound = [Path(path) for path in backend._arguments() if path.startswith("/")]
    inside = Path(os.__file__).resolve().parents[1]
    for path in bound:
        assert not path.is_relative_to("/etc") or path in (Path("/etc"), *map(Path, backend_files()))
        if path.is_relative_to("/root") or path.is_relative_to("/home"):
            assert inside.is_relative_to(path) or path.is_relative_to(inside.parent) or "sandbox" in path.parts


def backend_files() -> tuple[str, ...]:
    return ("/etc/ld.so.cache", "/etc/localtime")


@pytest.fixture(scope="module")
def judge(bubblewrap):
    judge = Judge("bubblewrap", 60.0, 512 << 20)
    yield judge
    judge.close()


SLOW = {**RIGHT, "program": "import time\ndef area(r):\n    time.sleep(60)\n"}


@pytest.mark.parametrize("role", ["program", "tests"])
@pytest.mark.parametrize("killed", ["its process", "the sandbox"])
def test_what_is_killed_from_outside_is_a_crash_and_replaced(judge, role, killed):
    assert judge.verdict(RIGHT) == {"verdict": "correct"}
    server = {"program": judge.program, "tests": judge.tests}[role]
    idle = processes_below(server.process.pid)

    def kill() -> None:
        deadline = time.monotonic() + 30
        while not (children := processes_below(server.process.pid) - idle) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)
        if killed == "the sandbox":
            server.process.kill()
        else:
            os.kill(children.pop(), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(CrashError, match="SIGKILL" if killed == "its process" else None):
        judge.verdict(SLOW)
    killer.join()
    assert judge.verdict(RIGHT) == {"verdict": "correct"}


def test_a_sandbox_serves_many_answers_and_is_replaced_after_files(judge):
    judge.verdict(RIGHT)
    first = judge.program.process.pid
    for _ in range(3):
        assert judge.verdict(RIGHT) == {"verdict": "correct"}
    assert judge.program.process.pid == first
    writes = {**RIGHT, "program": "def area(r):\n    open('left', 'w').write('x')\n    return 3.5\n"}
    assert judge.verdict(writes) == {"verdict": "correct"}
    assert judge.verdict(RIGHT) == {"verdict": "correct"}
    assert judge.program.process.pid != first


def test_what_a_script_prints_is_read_in_linear_time():
    """Quadratic time, sixteen times as much for four times the output, took most of a script's own limit for 16 MiB."""

    def seconds(size: int) -> float:
        reading, writing = os.pipe()
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)  # small pieces
        with os.fdopen(writing, "wb") as output:
            writer = threading.Thread(target=lambda: (output.write(bytes(size)), output.close()))
            began = time.process_time()
            writer.start()
            found = read_output(reading, time.monotonic() + 300)
            took = time.process_time() - began
            writer.join()
        os.close(reading)
        assert found == bytes(size)
        return took

    assert seconds(16 << 20) < 8 * min(seconds(4 << 20) for _ in range(3)) + 0.2
