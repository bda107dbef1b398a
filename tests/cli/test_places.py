"""Places that cannot be written or read, in every verb: one line, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fdiv.cli import main

LONG = "n" * 300


@pytest.fixture
def places(tmp_path):
    """Name → a place where nothing can be made."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return {
        "below a file": tmp_path / "file" / "below",
        "a name of 300 letters": tmp_path / LONG,
        "below such a name": tmp_path / LONG / "x",
        "a path of 6,000 letters": tmp_path / ("d/" * 3_000),
        "a system's folder": "/sys/fdiv",
        "no process": "/proc/fdiv/x",
        "a link to itself": tmp_path / "loop" / "x",
    }


PLACES = (
    "below a file", "a name of 300 letters", "below such a name", "a path of 6,000 letters", "a system's folder",
    "no process", "a link to itself",
)  # fmt: skip


def commands(place, tmp_path, recipe):
    """Every verb with the place wherever it reads or writes."""
    samples = tmp_path / "samples.jsonl"
    lines = [
        {"task_id": "a", "num_samples": 4, "num_correct": 2},
        {"task_id": "b", "num_samples": 4, "num_correct": 1},
    ]
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    passk = ("eval", "passk", "--k", "1", "--resamples", "10", "--from_samples")
    yield "run", (recipe, "--output_dir", place)
    yield "run", (place,)
    yield "run", (recipe, "--accelerate", place, "--dry_run")
    yield "sweep", (place,)
    yield "sweep", (recipe, "--seeds", "1", "--output_dir", place)
    yield "sweep", (recipe, "--collect", "--results", place)
    yield "recipes", ("tiny/f_dpo", "--copy", place)
    yield "recipes", (place,)
    yield "report", (place, "--output", tmp_path / "x.html")
    yield "report", (tmp_path, "--output", place)
    yield "merge", (place, "--output", tmp_path / "merged")
    yield passk[0], (*passk[1:], samples, "--output", place)
    yield passk[0], (*passk[1:], place, "--output", tmp_path / "out")
    yield "eval", ("tofu", "--from_logs", place, "--output", tmp_path / "out")
    yield "eval", ("preferences", "--model", "x", "--dataset", place, "--output", tmp_path / "out")
    yield (
        "presample",
        ("--model", "x", "--dataset", place, "--reward", "math", "--output", tmp_path / "o", "--dry_run"),
    )
    yield "teach", ("--model", place, "--dataset", samples, "--output", tmp_path / "o")
    yield "teach", ("--model", "x", "--dataset", samples, "--output", place)


@pytest.mark.parametrize("name", PLACES)
def test_every_verb_says_in_one_line_what_is_wrong_with_a_place(name, places, tmp_path, write_recipe, capfd):
    recipe = write_recipe()
    for verb, words in commands(places[name], tmp_path, recipe):
        capfd.readouterr()
        try:
            code = main([verb, *map(str, words)])
        except SystemExit as stop:
            code = stop.code
        error = capfd.readouterr().err
        said = f"fdiv {verb} {' '.join(map(str, words))[:200]}: {error[-500:]}"
        assert code in (1, 2), said
        assert "Traceback" not in error, said
        assert error.splitlines()[-1].startswith("fdiv: ") and len(error.splitlines()[-1]) <= 1_010, said


def run(*words, **options):
    return subprocess.run([sys.executable, "-m", "fdiv", *words], capture_output=True, text=True, **options)


def test_full_and_closed_outputs(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fdiv", "recipes"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left" in done.stderr
    piped = subprocess.run(
        f"{sys.executable} -m fdiv recipes | head -1", shell=True, capture_output=True, text=True, check=False
    )
    assert piped.stdout.count("\n") == 1 and "Traceback" not in piped.stderr


def test_a_working_directory_that_is_gone(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f'cd "{gone}" && rmdir "{gone}" && "{sys.executable}" -m fdiv divergences'
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr == "fdiv: the current directory does not exist any more: change into another one\n"


@pytest.mark.parametrize(
    ("changes", "words", "expected"),
    [
        ({"HOME": None}, ["models"], None),
        ({"HOME": "/nonexistent"}, ["models"], None),
        ({"FDIV_MODELS": "~nosuchuser/x"}, ["models"], "Could not determine home directory"),
        ({"FDIV_MODELS": "/proc/x"}, ["models"], None),
        ({"TMPDIR": "/nonexistent"}, ["recipes"], None),
        ({"COLUMNS": "0"}, ["recipes"], None),
        ({"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict"}, ["recipes", "tiny/nope"], "no recipe file"),
    ],
    ids=str,
)
def test_odd_environments(changes, words, expected):
    environment = {**os.environ, **{key: value for key, value in changes.items() if value is not None}}
    for key, value in changes.items():
        if value is None:
            environment.pop(key, None)
    done = run(*words, env=environment, check=False)
    assert "Traceback" not in done.stderr
    assert (done.returncode == 0) == (expected is None)
    assert expected is None or (expected in done.stderr and done.stderr.count("\n") == 1)
