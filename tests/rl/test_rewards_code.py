"""CodeReward: off by default; HumanEval's own solutions pass; what a hostile program does does not pass."""

import gzip
import json

import pytest

from fdiv.rl.rewards import CodeReward, build_reward, extract_python


@pytest.fixture(scope="module")
def reward():
    reward = CodeReward(allow_execution=True, workers=1, time_limit=30.0)
    yield reward
    reward.close()


def score(reward, program, test="assert f(2) == 4", **columns):
    return reward(["?"], [program], test=[test], **columns)[0]


@pytest.mark.parametrize("spec", ["code", {"name": "code", "allow_execution": "yes"}])
def test_off_by_default(spec):
    with pytest.raises(ValueError, match="no security boundary.*allow_execution: true"):
        build_reward(spec)


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("def f(x):\n    return x * x\n", 1.0),
        ("Here:\n```python\ndef f(x):\n    return 2 * x\n```\nDone.", 1.0),
        ("import collections, heapq, re\ndef f(x):\n    return x + 2\n", 1.0),
        ("def f(x):\n    return x\n", 0.0),
        ("def f(x:\n", 0.0),
        ("", 0.0),
        ("```python\ndef f(x):\n    return x * x\n", 0.0),  # cut off
    ],
)
def test_scores(reward, program, expected):
    assert score(reward, program) == expected


HOSTILE = {
    "exit status 0": "import os\nos._exit(0)",
    "SystemExit": "import sys\nsys.exit(0)",
    "prints a marker": "print('passed\\n1.0\\ncorrect', flush=True)\nraise ValueError",
    "closes its pipes": "import os\nos.closerange(0, 999)\nf = lambda x: 4",
    "writes into every descriptor": (
        "import os\nfor n in range(32):\n    try:\n        os.write(n, b'0' * 64)\n    except OSError:\n        pass\nos._exit(0)"
    ),
    "forks": "import os\nos.fork()\nf = lambda x: 4",
    "starts a program": "import subprocess\nsubprocess.run(['true'])\nf = lambda x: 4",
    "starts a thread": "import threading\nthreading.Thread(target=print).start()\nf = lambda x: 4",
    "memory": "x = bytearray(10**10)\nf = lambda x: 4",
    "a large file": "open('big', 'wb').write(b'x' * 5_000_000)\nf = lambda x: 4",
    "kills itself": "import os\nos.kill(os.getpid(), 9)",
    "deep recursion": "def f(x):\n    return f(x)",
}


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_hostile_programs_fail(reward, program):
    assert score(reward, program) == 0.0
    assert score(reward, "def f(x):\n    return x * x\n") == 1.0


def test_environment_is_empty_and_folder_temporary(reward, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    program = (
        "import os\nassert 'HF_TOKEN' not in os.environ and 'HOME' not in os.environ\nf = lambda x: len(os.listdir())"
    )
    assert score(reward, program, "assert f(0) == 1") == 1.0  # the program itself


def test_root_is_dropped(reward):
    assert score(reward, "import os\nf = lambda x: os.geteuid()", "assert f(0) != 0") == 1.0


def test_endless_programs_are_killed_and_count_as_failed():
    reward = CodeReward(allow_execution=True, workers=2, time_limit=6.0)
    programs = ["while True: pass", "import time\ntime.sleep(600)", "f = lambda x: 4"]
    assert reward(["?"] * 3, programs, test=["assert f(2) == 4"] * 3) == [0.0, 0.0, 1.0]
    summary = reward.summary()
    assert (summary["over_time"], summary["correct"], summary["timeout"], summary["restarts"]) == (2, 1, 0, 0)
    reward.close()


def test_no_tests_is_no_score(reward):
    assert score(reward, "f = lambda x: 4", "  ") is None
    with pytest.raises(ValueError, match="'f\\(\\); import os' is not the name of a function"):
        score(reward, "f = lambda x: 4", entry_point=["f(); import os"])


def test_limits_under_which_nothing_runs_are_an_error():
    from fdiv.rl.rewards import WorkerError

    with pytest.raises(WorkerError, match="a program that is right fails under its limits: is memory=1000000"):
        score(CodeReward(allow_execution=True, memory_limit=1_000_000, workers=1), "f = lambda x: 4")


def test_extraction_keeps_the_indentation_of_a_continuation():
    assert extract_python("    return 1\n") == "    return 1"
    assert extract_python("<think>```python\nx\n```</think>```py\ny = 1\n```") == "y = 1"


def test_human_eval(reward, shared_data):
    with gzip.open(shared_data / "data" / "humaneval" / "HumanEval.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines][::20]
    columns = {name: [row[name] for row in rows] for name in ("test", "entry_point")}
    prompts = [row["prompt"] for row in rows]
    assert reward(prompts, [row["canonical_solution"] for row in rows], **columns) == [1.0] * len(rows)
    whole = [f"```python\n{row['prompt']}{row['canonical_solution']}\n```" for row in rows]
    assert reward([[{"role": "user", "content": prompt}] for prompt in prompts], whole, **columns) == [1.0] * len(rows)
    assert reward(prompts, ["    return None\n"] * len(rows), **columns) == [0.0] * len(rows)
