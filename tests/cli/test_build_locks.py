"""A lock that a killed build left is taken away; one that somebody may hold is not, and is named."""

from __future__ import annotations

import os
import time

import pytest

from fdiv.cli.build_locks import STALE_AFTER_SECONDS, remove_stale_locks


@pytest.fixture
def lock(tmp_path):
    path = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def aged(path, seconds):
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_an_old_lock_that_nobody_holds_is_removed_and_named(lock, tmp_path, capsys):
    aged(lock, STALE_AFTER_SECONDS + 1)
    assert remove_stale_locks(tmp_path) == [lock]
    assert not lock.exists() and f"{lock}: removed" in capsys.readouterr().err


def test_a_young_one_stays_and_is_named(lock, tmp_path, capsys):
    aged(lock, STALE_AFTER_SECONDS - 60)
    assert remove_stale_locks(tmp_path) == [] and lock.exists()
    said = capsys.readouterr().err
    assert str(lock) in said and "remove it" in said


def test_an_open_one_stays_however_old_and_nothing_is_said(lock, tmp_path, capsys):
    aged(lock, 10 * STALE_AFTER_SECONDS)
    with lock.open():
        assert remove_stale_locks(tmp_path) == [] and lock.exists()
    assert capsys.readouterr().err == ""


def test_the_folder_is_torchs(lock, tmp_path, monkeypatch):
    aged(lock, STALE_AFTER_SECONDS + 1)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert remove_stale_locks() == [lock]


def test_without_a_folder_there_is_nothing_to_do(tmp_path):
    assert remove_stale_locks(tmp_path / "none") == []


def test_other_extensions_and_folders_that_are_not_ours_are_left_alone(lock, tmp_path, monkeypatch):
    other = tmp_path / "py311_cpu" / "my_kernel" / "lock"
    other.parent.mkdir()
    other.touch()
    for path in (lock, other):
        aged(path, STALE_AFTER_SECONDS + 1)

    def refused(path, **_):
        raise PermissionError(path)

    monkeypatch.setattr(type(lock), "unlink", refused)
    assert remove_stale_locks(tmp_path) == [] and lock.exists()
    monkeypatch.undo()
    assert remove_stale_locks(tmp_path) == [lock] and other.exists()
