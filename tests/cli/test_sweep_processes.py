"""A sweep in several processes: all of them are in the same cell, also where one cannot be run."""

from __future__ import annotations

import json

import pytest

from tests.support.processes import run, run_well
from tests.support.runs.sweeps import swept

PREPARE = "prepare: {name: 'tests.support.runs.builders:Trains', model: none, fails: rows}\n"


def read(folder, name):
    return [(folder / f"{name}.{rank}").read_text().split() for rank in range(2)]


def cells(output):
    found = json.loads((output / "results.json").read_text())["cells"]
    return {cell["name"]: (cell["status"], cell.get("error", "")) for cell in found}


@pytest.mark.slow
def test_a_cell_that_is_refused_is_left_by_all(write_recipe, tmp_path):
    """The main process alone looks at the directory; another that trained there would hand its gradients to the next."""
    words = ["sweep", str(write_recipe(use_cpu=True)), "--divergences", "reverse_kl", "forward_kl"]
    (tmp_path / "out" / "reverse_kl").mkdir(parents=True)
    (tmp_path / "out" / "reverse_kl" / "mine.txt").touch()
    run_well(swept, words, str(tmp_path), processes=2)
    assert read(tmp_path, "code") == [["1"], ["1"]]
    assert read(tmp_path, "trained") == [["forward_kl"], ["forward_kl"]]
    found = cells(tmp_path / "out")
    assert found["forward_kl"] == ("finished", "")
    assert found["reverse_kl"][0] == "failed" and "is not empty and not a run of fdiv" in found["reverse_kl"][1]
    assert "not a run of fdiv" in (tmp_path / "out" / "reverse_kl" / "error.txt").read_text()


@pytest.mark.slow
def test_a_build_that_fails_fails_on_all(write_recipe, tmp_path):
    words = ["sweep", str(write_recipe(PREPARE, use_cpu=True)), "--divergences", "reverse_kl"]
    run_well(swept, words, str(tmp_path), processes=2)
    assert read(tmp_path, "code") == [["1"], ["1"]]
    ((status, error),) = cells(tmp_path / "out").values()
    assert status == "failed" and "no rows at all" in error


@pytest.mark.slow
def test_a_process_that_fails_alone_ends_the_sweep(write_recipe, tmp_path):
    """The other waits for it in that cell, and would take its next cell for this one."""
    words = ["sweep", str(write_recipe(use_cpu=True)), "--divergences", "reverse_kl", "forward_kl"]
    ended = run(swept, words, str(tmp_path), "reverse_kl", processes=2)
    assert ended.codes[0] == 1 and ended.codes[1] != 0
    assert "sweep cell reverse_kl: process 0 failed and others did not, so the sweep ends" in ended.stderr[0]
    assert "the disk is full" in ended.stderr[0] and not (tmp_path / "trained.0").exists()
    assert not (tmp_path / "out" / "forward_kl").exists()
