"""A trainer under attack: run every cheat and every escape through one worker pool, and say what came of it.

    python attack.py < settings.json

The settings are those of `judge.py`. Prints one JSON object: the outcome of each program by name, that of the right
answers in between, and what is left on the machine afterwards. With `{"sandbox": "control"}` the escapes of `CONTROL` run
without any sandbox: there they must work.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parents[3]
REWARDS = REPOSITORY / "rl" / "rewards"


def load(package: str, folder: Path, name: str) -> ModuleType:
    """A module with its relative imports, without the packages above it, which import torch."""
    sys.modules[package] = ModuleType(package)
    sys.modules[package].__path__ = [str(folder)]
    return importlib.import_module(f"{package}.{name}")


def processes_below(root: int) -> set[int]:
    """Process numbers of all descendants."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int(entry.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found: set[int] = set()
    while more := {pid for pid, parent in parents.items() if parent in found | {root}} - found:
        found |= more
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def segments() -> list[str]:
    return [
        line.split()[1]
        for kind in ("shm", "sem", "msg")
        for line in Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]
    ]


def control(program: str, folder: Path) -> str:
    """What `f()` returns in a process like any other."""
    with tempfile.TemporaryDirectory(dir=folder) as here:
        Path(here, "left-by-another").touch()
        command = [sys.executable, "-c", f"{program}\nprint(f())"]
        run = subprocess.run(command, capture_output=True, text=True, cwd=here, check=False)
    return run.stdout.strip() or run.stderr.strip().splitlines()[-1]


def main() -> None:
    settings = json.load(sys.stdin)
    workers = load("pool", REWARDS / "pool", "workers")
    attacks = load("attacks", Path(__file__).parent, "cheats")
    escapes = importlib.import_module("attacks.escapes")

    os.environ["HF_TOKEN"] = "hf_secret"
    folder = Path(tempfile.mkdtemp(prefix="fdiv-attack-"))
    folder.chmod(0o777)
    secret = folder / "secret.txt"
    secret.write_text("hf_secret")
    listeners = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
    port = listeners[0].getsockname()[1]
    listeners[1].bind(str(folder / "socket"))
    (folder / "socket").chmod(0o777)
    listeners[2].bind(f"\0fdiv-{port}")
    for listener in listeners:
        listener.listen()
        listener.setblocking(False)
    targets = {
        "TRAINER": os.getpid(), "PORT": port, "SOCKET": folder / "socket", "SECRET": secret, "FOLDER": folder,
        "REPOSITORY": REPOSITORY,
    }  # fmt: skip
    programs = dict(attacks.CHEATS)
    for name, source in escapes.ESCAPES.items():
        for target, value in targets.items():
            source = source.replace(target, str(value))
        programs[f"escape: {name}"] = (source, escapes.TEST)

    if settings["sandbox"] == "control":
        sys.stdout.write(
            json.dumps({name: control(programs[f"escape: {name}"][0], folder) for name in escapes.CONTROL})
        )
        shutil.rmtree(folder)
        return
    if settings["sandbox"] == "none":  # where files are in reach, and would stay
        programs = attacks.CHEATS
    items, names = [], []
    for name, (program, tests) in programs.items():
        for label, source, test in ((name, program, tests), ("right", *attacks.RIGHT)):
            items.append({
                "completion": source, "prompt": "", "opened": False, "names": ["f"], "continues": False,
                "tests": test, "setup": "", "entry_point": "",
            })  # fmt: skip
            names.append(label)
    before = {"segments": segments(), "files": set(os.listdir(tempfile.gettempdir()))}
    pool = workers.WorkerPool(
        REWARDS / "sandbox" / "judge.py", settings, workers=2, time_limit=120.0, wall_limit=120.0, writes_files=True
    )
    outcomes = pool.map(items)
    processes = processes_below(os.getpid())
    pool.close()
    deadline = time.monotonic() + 10
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)

    verdicts: dict[str, list[str]] = {}
    for name, outcome in zip(names, outcomes, strict=True):
        verdicts.setdefault(name, []).append(outcome.value["verdict"] if outcome.status == "ok" else outcome.status)
    connected = []
    for listener in listeners:
        try:
            listener.accept()
            connected.append(str(listener))
        except BlockingIOError:
            continue
    left = [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("fdiv-code-")]
    report = {
        "user": os.geteuid(),
        "verdicts": verdicts,
        "restarts": pool.restarts,
        "processes seen": len(processes),
        "processes left": sum(map(alive, processes)),
        "segments left": sorted(set(segments()) - set(before["segments"])),
        "files left": sorted(set(left) - before["files"]),
        "files beside the secret": sorted(set(os.listdir(folder)) - {"secret.txt", "socket"}),
        "secret": secret.read_text(),
        "connected": connected,
    }
    shutil.rmtree(folder)
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
