"""CodeReward: who is to blame, the answer or its tests; numpy on request."""

import pytest

from fdiv.errors import SandboxError
from fdiv.rl.rewards import CodeReward
from fdiv.rl.rewards.sandbox import interpreter


@pytest.fixture(scope="module")
def rewards(bubblewrap):
    """With much time, and with little: a machine that is busy may take seconds for what takes none."""
    rewards = {
        seconds: CodeReward(allow_execution=True, numpy=True, workers=1, time_limit=seconds) for seconds in (60, 4)
    }
    yield rewards
    for reward in rewards.values():
        reward.close()


@pytest.fixture
def reward(rewards):
    return rewards[60]


def score(reward, program, test):
    return reward(["?"], [program], test=[test])[0]


RIGHT, NP = "def f(x):\n    return x * x\n", "import numpy as np\n"
ANSWERS = {
    "an endless loop": ("def f(x):\n    while True: pass", "assert f(1) == 1", "over_time"),
    "too much memory": ("def f(x):\n    return bytearray(10**10)", "assert f(1) == 1", "wrong"),
    "a package that is missing": ("import pandas\n" + RIGHT, "assert f(1) == 1", "wrong"),
    "no such function": ("def g(x):\n    return 1", "assert f(1) == 1", "wrong"),
    "too much output": ("print('x' * (20 << 20))", {"inputs": [""], "outputs": ["x"]}, "wrong"),
    "data of another kind": ("limit = 3", "import nowhere\nassert limit == 4", "wrong"),
}  # fmt: skip
TESTS = {
    "an endless loop": ("while True: pass\nassert f(2) == 4", "more than the time by themselves"),
    "too much memory": ("table = bytearray(10**10)\nassert f(2) == 4", "MemoryError"),
    "a package that is missing": ("import pandas\nassert f(2) == 4", "No module named 'pandas'"),
    "too much output": ({"inputs": [""], "outputs": ["x" * (17 << 20)]}, "an output of more than"),
    "no Python": ("assert f(2) ==", "do not compile"),
    "nothing is called": ("assert 4 == 4", "call nothing of the program"),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_in_its_own_limit_scores_0_and_is_counted(rewards, name):
    program, test, verdict = ANSWERS[name]
    reward = rewards[4 if verdict == "over_time" else 60]
    before = reward.summary()[verdict]
    assert score(reward, program, test) == 0.0
    assert reward.summary()[verdict] == before + 1


@pytest.mark.parametrize("name", TESTS)
def test_tests_that_cannot_be_passed_are_not_scored_and_named(rewards, name):
    test, reason = TESTS[name]
    reward = rewards[4 if name == "an endless loop" else 60]
    program = RIGHT if isinstance(test, str) else "print('x')"
    assert score(reward, program, test) is None
    assert reason in list(reward.unusable_golds.values())[-1]


WITH_NUMPY = [
    ("def f(x):\n    return np.array(x).sum()", "assert f([1, 2]) == 3", 1.0),
    ("def f(x):\n    return np.array(x) * 2", NP + "r = f([1, 2]); assert r.shape == (2,) and r.dtype == np.int64 and (r == [2, 4]).all()", 1.0),
    ("def f(x):\n    x.sort()", NP + "a = np.array([3, 1, 2]); f(a); assert a.tolist() == [1, 2, 3]", 1.0),
    ("def f(x):\n    return np.float32(0.1), np.float64(0.1)", NP + "a, b = f(0); assert type(a) is np.float32 and type(b) is np.float64", 1.0),
    ("def f(x):\n    return np.linalg.inv(x)", NP + "assert np.allclose(f(np.eye(3) * 2), np.eye(3) / 2)", 1.0),
    ("def f(x):\n    return np.linalg.inv(x)", NP + "assert np.allclose(f(np.eye(3) * 2), np.eye(3))", 0.0),
    ("def f(x):\n    return [np.nan, np.bool_(True), np.str_('a'), np.complex64(1 + 2j), np.array(['b', None], object)]",
     "r = f(0); assert r[0] != r[0] and r[1] == True and r[2] == 'a' and r[3] == 1 + 2j and list(r[4]) == ['b', None]", 1.0),
    ("class E(np.ndarray):\n    def __eq__(self, other):\n        return np.True_\ndef f(x):\n    return np.zeros(2).view(E)",
     NP + "assert (f(0) == np.array([5, 6])).all()", 0.0),
    ("class E:\n    def __array__(self, *a, **k):\n        return np.array([5, 6])\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return E()",
     NP + "assert np.array_equal(f(0), np.array([5, 6]))", 0.0),
    ("def f(x):\n    return np.zeros(10**8)", "assert f(0).sum() == 0", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("program", "test", "expected"), WITH_NUMPY)
def test_arrays_cross_as_values(reward, program, test, expected):
    assert score(reward, NP + program, test) == expected


def test_without_the_option_there_is_no_numpy(bubblewrap):
    plain = CodeReward(allow_execution=True, workers=1)
    assert score(plain, NP + RIGHT, "assert f(2) == 4") == 0.0
    assert score(plain, RIGHT, NP + "assert f(2) == 4") is None  # tests that need it
    plain.close()


def test_numpy_that_is_not_installed_is_refused_with_the_remedy(monkeypatch, bubblewrap):
    monkeypatch.setattr(interpreter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SandboxError, match="numpy is not installed here; pip install numpy, or leave numpy out"):
        CodeReward(allow_execution=True, numpy=True)


def test_numpy_is_read_only_and_alone(reward):
    program = (
        "import os, numpy\nroot = os.path.dirname(numpy.__path__[0])\ndef f(x):\n"
        "    try:\n        open(numpy.__file__, 'a')\n    except OSError:\n        return sorted(os.listdir(root))\n"
    )
    assert score(reward, program, "assert set(f(0)) <= {'numpy', 'numpy.libs'}") == 1.0
