"""Every cheat scores 0, every escape fails, right answers beside them score 1: as this user, and as a plain user."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rl.sandbox.cheats import CHEATS
from tests.rl.sandbox.escapes import CONTROL, ESCAPES

ATTACK = Path(__file__).with_name("attack.py")
SETTINGS = {"sandbox": "bubblewrap", "program_time": 60.0, "memory": 512 << 20}


def plain_user() -> list[str]:
    """The command in front of another, under which root's process is a plain user's.

    Python, its virtual environment and the repository may lie in root's home: they are mounted where others can read.
    """
    needed = {Path(sys.base_prefix), Path(sys.prefix), ATTACK.parents[3]}
    closed = {folder for path in needed for folder in path.resolve().parents if folder.stat().st_mode & 0o005 != 0o005}
    mounts: list[str] = []
    for folder in sorted(closed):
        mounts += ["--tmpfs", str(folder)]
    for path in sorted(path for path in needed if closed & set(path.parents)):
        inner = [parent for parent in reversed(path.parents) if closed & {parent, *parent.parents}]
        mounts += [part for parent in inner[1:] for part in ("--perms", "0755", "--dir", str(parent))]
        mounts += ["--bind", str(path), str(path)]
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
    return ["bwrap", "--dev-bind", "/", "/", *mounts, "--", *user] if mounts else user


def attacked(user: list[str], settings: dict) -> dict:
    run = subprocess.run(
        [*user, sys.executable, str(ATTACK)], input=json.dumps(settings), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module", params=["this user", "a plain user"])
def report(request, bubblewrap):
    if request.param == "this user":
        return attacked([], SETTINGS)
    if os.geteuid() != 0:
        pytest.skip("this user is a plain user already")
    report = attacked(plain_user(), SETTINGS)
    assert report["user"] == 65534
    return report


def test_there_are_enough_of_them():
    assert len(CHEATS) >= 30
    assert len(ESCAPES) >= 25


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_wrong(report, name):
    assert report["verdicts"][name] == ["wrong"]


@pytest.mark.parametrize("name", ESCAPES)
def test_an_escape_fails(report, name):
    assert report["verdicts"][f"escape: {name}"] == ["wrong"]


def test_right_answers_beside_attackers_keep_their_score(report):
    assert report["verdicts"]["right"] == ["correct"] * (len(CHEATS) + len(ESCAPES))
    assert report["restarts"] == 0


def test_nothing_is_left_behind_or_reached(report):
    assert report["processes seen"] >= 4
    assert report["processes left"] == 0
    assert report["segments left"] == []
    assert report["files left"] == []
    assert report["files beside the secret"] == []
    assert report["secret"] == "hf_secret"
    assert report["connected"] == []


def test_cheats_are_wrong_without_a_sandbox_too(bubblewrap):
    """The tests are outside the program's process either way."""
    user = plain_user() if os.geteuid() == 0 else []
    report = attacked(user, {**SETTINGS, "sandbox": "none"})
    assert (report["files left"], report["processes left"]) == ([], 0)
    verdicts = report["verdicts"]
    assert verdicts.pop("right") == ["correct"] * len(CHEATS)
    assert verdicts == {name: ["wrong"] for name in CHEATS}


def test_the_escapes_work_where_there_is_no_sandbox():
    """Otherwise their failure above would say nothing."""
    found = attacked([], {"sandbox": "control"})
    assert found == dict.fromkeys(CONTROL, "escaped")
