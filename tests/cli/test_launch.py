"""`--accelerate`: configurations that cannot be used, and what a signal does to the processes that were started."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from fdiv.cli import launch
from fdiv.interrupts import stoppable
from fdiv.memory.placement import read_placement
from fdiv.training.checkpoints import checkpoint_fault, newest_checkpoint
from tests.support.processes import wait_for_step


# ---------------------------------------------------------------- configurations
@pytest.mark.parametrize("dry_run", [(), ("--dry_run",)], ids=["run", "dry"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"num_processes: [1\nother: 2", r"mine\.yaml, line 2: not valid YAML: .*; give a file that `accelerate config`"),
        (b"compute_environment: Z\xfcrich", r"mine\.yaml: cannot be read: .*utf-8.*; give a file"),
        (b"date: 2024-13-45", r"mine\.yaml: cannot be read: month must be in 1\.\.12; give a file"),
        (b"- MULTI_CPU", r"mine\.yaml: not an accelerate configuration \(a mapping\); give a file"),
        (b"", r"mine\.yaml: not an accelerate configuration \(a mapping\); give a file"),
        (b"distributed_type: DEEPSPEED\ndeepspeed_config: [2]", r"mine\.yaml: deepspeed_config: \[2\] is not a mapping"),
        (b"num_processes: two", r"mine\.yaml: num_processes: 'two': must be a whole number, 1 or more"),
        (b"num_processes: -1", r"mine\.yaml: num_processes: -1: must be a whole number, 1 or more"),
        (b"num_processes: true", r"mine\.yaml: num_processes: True: must be a whole number, 1 or more"),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_used_is_one_line(write_recipe, tmp_path, fails, content, reason, dry_run):
    config = tmp_path / "mine.yaml"
    config.write_bytes(content)
    assert re.search(reason, fails("run", write_recipe(), "--accelerate", config, *dry_run))


@pytest.mark.parametrize("verb", ["run", "sweep"])
@pytest.mark.parametrize("dry_run", [(), ("--dry_run",)], ids=["run", "dry"])
def test_a_number_of_processes_that_no_run_has(write_recipe, fails, verb, dry_run):
    words = (verb, write_recipe(), *dry_run)
    for count in ("0", "-2"):
        line = fails(*words, "--accelerate", "cpu_zero2", "--num_processes", count)
        assert line.endswith(f"--num_processes {count}: must be a whole number, 1 or more")
    line = fails(*words, "--num_processes", "4")
    assert "--num_processes 4: without --accelerate there is one process; name the configuration" in line


def test_a_stated_number_of_processes_wins_over_a_missing_one(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("distributed_type: MULTI_GPU\nnum_processes: -1  # accelerate: to be stated\n")

    class Args:
        bf16 = fp16 = False

    assert read_placement(Args(), str(config), num_processes=3).processes == 3


# ---------------------------------------------------------------- signals
def launched(launcher, *words):
    """`launch` in a process of its own, with a Python program in the launcher's place."""
    program = (
        "import sys; from fdiv.cli import launch; "
        "launch.launch_command = lambda *_: [sys.executable, '-c', *sys.argv[1:]]; sys.exit(launch.launch('x', []))"
    )
    return subprocess.Popen([sys.executable, "-c", program, launcher, *map(str, words)])


WORKER = """
import os, pathlib, signal, sys, time
def save(*_):
    time.sleep(1)
    pathlib.Path(sys.argv[1], "saved").write_text(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(60)
"""
STARTS = f"import os, signal, subprocess, sys, time; start = [sys.executable, '-c', {WORKER!r}, sys.argv[1]]; "
LAUNCHERS = {
    # As accelerate with one process: ends at once, and the worker, in its group, is told by the same signal.
    "ends at once": STARTS + "subprocess.Popen(start).wait()",
    # As torchrun: tells a worker in a session of its own, waits for it, and ends with 1.
    "waits": STARTS + "p = subprocess.Popen(start, start_new_session=True); "
    "signal.signal(signal.SIGTERM, lambda *_: (p.terminate(), p.wait(), sys.exit(1))); time.sleep(60)",
    # As torchrun at a second signal: the worker saves alone.
    "leaves": STARTS + "p = subprocess.Popen(start, start_new_session=True); "
    "signal.signal(signal.SIGTERM, lambda *_: (p.terminate(), sys.exit(1))); time.sleep(60)",
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_sigterm_waits_for_what_the_launcher_started(launcher, tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    process = launched(LAUNCHERS[launcher], tmp_path)
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 143
    assert (tmp_path / "saved").read_text() == "3600"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_launcher_starts_reaches_it(number, monkeypatch):
    """It comes between the start and the next line: the launcher must not go on alone."""
    started = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)
            signal.raise_signal(number)

    monkeypatch.setattr(launch.subprocess, "Popen", Interrupted)
    monkeypatch.setattr(launch, "launch_command", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with stoppable(lambda: "again"):
            assert launch.launch("x", []) == 128 + number
        assert started[0].poll() is not None
    finally:
        started[0].kill()


def test_an_exit_code_without_a_signal_is_the_launchers(monkeypatch):
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "7")  # stated: kept
    ends = "import os, sys; sys.exit(int(os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT']))"
    assert launched(ends).wait(30) == 7


@pytest.mark.slow
def test_sigterm_under_accelerate_saves_and_returns_143(write_recipe, tmp_path):
    path = write_recipe(max_steps=400, save_strategy="no", per_device_train_batch_size=1)
    process = subprocess.Popen(
        [sys.executable, "-m", "fdiv", "run", str(path), "--accelerate", "cpu_ddp"],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_for_step(process, tmp_path / "out" / "metrics.jsonl", 3)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 143, stderr[-3000:]
    folder, _ = newest_checkpoint(tmp_path / "out")
    step = int(folder.name.split("-")[1])
    assert 3 <= step < 400 and checkpoint_fault(folder) is None
    assert f"stopped after step {step}" in stderr
