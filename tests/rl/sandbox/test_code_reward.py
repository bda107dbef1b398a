"""CodeReward: off by default; HumanEval's own solutions pass; what cannot be sent as a value behaves as in one process."""

import gzip
import json

import pytest

from fdiv.errors import DataError
from fdiv.rl.rewards import CodeReward, build_reward, extract_python


@pytest.fixture(scope="module")
def reward(bubblewrap):
    reward = CodeReward(allow_execution=True, workers=1, time_limit=30.0)
    yield reward
    reward.close()


def score(reward, program, test="assert f(2) == 4", **columns):
    return reward(["?"], [program], test=[test], **columns)[0]


@pytest.mark.parametrize("spec", ["code", {"name": "code", "allow_execution": "yes"}])
def test_off_by_default(spec):
    with pytest.raises(ValueError, match="shares this machine's kernel.*allow_execution: true"):
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
    "forks": "import os\nos.fork()\nf = lambda x: 4",
    "starts a program": "import subprocess\nsubprocess.run(['true'])\nf = lambda x: 4",
    "starts a thread": "import threading\nthreading.Thread(target=print).start()\nf = lambda x: 4",
    "memory": "x = bytearray(10**10)\nf = lambda x: 4",
    "a large file": "open('big', 'wb').write(b'x' * 5_000_000)\nf = lambda x: 4",
    "kills itself": "import os\nos.kill(os.getpid(), 9)",
    "deep recursion": "def f(x):\n    return f(x)",
    "a result without end": "def f(x):\n    y = []\n    for _ in range(100_000):\n        y = [y]\n    return y",
    "a result too long to send": "f = lambda x: 'x' * 20_000_000",
}


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_hostile_programs_fail(reward, program):
    assert score(reward, program) == 0.0
    assert score(reward, "def f(x):\n    return x * x\n") == 1.0


def test_a_process_that_a_signal_ended_is_a_crash_and_not_wrong(reward):
    before = reward.summary()["crash"]
    assert score(reward, "import ctypes\ndef f(x):\n    ctypes.string_at(0)") is None
    assert score(reward, "import os, signal\ndef f(x):\n    signal.alarm(1)\n    signal.pause()") is None
    assert reward.summary()["crash"] == before + 2
    # Its exit status is the program's own to choose, and no signal.
    assert score(reward, "import os\ndef f(x):\n    os._exit(137)") == 0.0
    assert score(reward, "f = lambda x: x * x") == 1.0


def test_environment_is_empty_and_folder_temporary(reward, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    program = (
        "import os\nassert 'HF_TOKEN' not in os.environ and 'HOME' not in os.environ\nf = lambda x: len(os.listdir())"
    )
    assert score(reward, program, "assert f(0) == 0") == 1.0


def test_a_program_may_use_its_folder_and_the_next_one_finds_it_empty(reward):
    program = "import os\ndef f(x):\n    found = os.listdir()\n    open('mine', 'w').write('4')\n    return found, open('mine').read()"
    for _ in range(2):
        assert score(reward, program, "assert f(0) == ([], '4')") == 1.0


def test_root_is_dropped(reward):
    assert score(reward, "import os\nf = lambda x: os.geteuid()", "assert f(0) != 0") == 1.0


def test_endless_programs_are_killed_and_count_as_failed(bubblewrap):
    reward = CodeReward(allow_execution=True, workers=2, time_limit=12.0)
    programs = ["while True: pass", "import time\ntime.sleep(600)", "f = lambda x: 4"]
    assert reward(["?"] * 3, programs, test=["assert f(2) == 4"] * 3) == [0.0, 0.0, 1.0]
    summary = reward.summary()
    assert (summary["over_time"], summary["correct"], summary["timeout"], summary["restarts"]) == (2, 1, 0, 0)
    reward.close()


def test_no_tests_is_no_score(reward):
    assert score(reward, "f = lambda x: 4", "  ") is None
    with pytest.raises(ValueError, match="'f\\(\\); import os' is not the name of a function"):
        score(reward, "f = lambda x: 4", entry_point=["f(); import os"])


def test_limits_under_which_nothing_runs_are_an_error(bubblewrap):
    from fdiv.rl.rewards import WorkerError

    with pytest.raises(WorkerError, match="a program that is right fails under its limits: is memory=1000000"):
        score(CodeReward(allow_execution=True, memory_limit=1_000_000, workers=1), "f = lambda x: 4")


def test_extraction_keeps_the_indentation_of_a_continuation():
    assert extract_python("    return 1\n") == "    return 1"
    assert extract_python("<think>```python\nx\n```</think>```py\ny = 1\n```") == "y = 1"


# What HumanEval's tests call, replaced by what agrees with everything; `poly` and the like are the prompt's.
AGREEABLE = """    pass
class A:
    __eq__ = __call__ = __getattr__ = __sub__ = __rsub__ = __lt__ = __le__ = __gt__ = __abs__ = lambda *_: True
poly = lambda *_: 0
encode_cyclic = encode_shift = lambda _: A()
NAME = lambda *_: A()
"""


def test_human_eval(reward, shared_data):
    with gzip.open(shared_data / "data" / "humaneval" / "HumanEval.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) == 164
    columns = {name: [row[name] for row in rows] for name in ("test", "entry_point")}
    prompts = [row["prompt"] for row in rows]
    assert reward(prompts, [row["canonical_solution"] for row in rows], **columns) == [1.0] * len(rows)
    whole = [f"```python\n{row['prompt']}{row['canonical_solution']}\n```" for row in rows]
    assert reward([[{"role": "user", "content": prompt}] for prompt in prompts], whole, **columns) == [1.0] * len(rows)
    for wrong in ("    return None\n", AGREEABLE):
        bodies = [wrong.replace("NAME", row["entry_point"]) for row in rows]
        assert reward(prompts, bodies, **columns) == [0.0] * len(rows)


# Program, tests that hold, and tests that do not.
BEHAVIOUR = {
    "values": (
        "def f(x):\n    return x",
        "for x in (None, True, 0, -1, 2**70, -(10**5000), 0.1, -0.0, 1e300, 2j, 'é\\ud800', b'\\x00\\xff', (), (1, (2,)), [], [[1]], {}, {1: 'a', (2, 3): None}, {1}, frozenset({1}), range(3), ...):\n"
        "    assert f(x) == x and type(f(x)) is type(x)\nassert f(float('nan')) != f(float('nan')) and f(float('inf')) > 1e308\nassert str(f(-0.0)) == '-0.0'",
        "assert f(1.0) != 1.0 or type(f(1.0)) is int",
    ),
    "value types of the library": (
        "def f(x):\n    return x",
        "import collections, datetime, decimal, fractions\nfor x in (fractions.Fraction(1, 3), decimal.Decimal('0.10'), datetime.date(2024, 2, 29), datetime.timedelta(1, 2), collections.deque([1], 3), collections.Counter('aab'), collections.OrderedDict(a=1), collections.defaultdict(list, a=[1])):\n    assert f(x) == x and type(f(x)) is type(x)",
        "import fractions\nassert f(fractions.Fraction(1, 3)) == 1 / 3",
    ),
    "a fraction compares with a float": (
        "from fractions import Fraction\nf = lambda x: Fraction(x, 2)",
        "assert f(1) == 0.5 and f(1) + 1 == 1.5 and abs(f(3) - 1.5) < 1e-9",
        "assert f(1) == 0.25",
    ),
    "an argument is changed in place": (
        "def f(x):\n    x.sort()\n    x[0].append(9)\n    x.append({})",
        "a, b = [2], [1]\nx = [a, b]\nf(x)\nassert x == [[1, 9], [2], {}] and x[0] is b and x[1] is a",
        "x = [[2], [1]]\nf(x)\nassert x == [[2], [1]]",
    ),
    "sets, dicts and byte arrays are changed in place": (
        "def f(a, b, c):\n    a.add(3)\n    b['k'] = a\n    c[0] = 1",
        "a, b, c = {1}, {}, bytearray(2)\nf(a, b, c)\nassert a == {1, 3} and b['k'] is a and c == b'\\x01\\x00'",
        "a = {1}\nf(a, {}, bytearray(1))\nassert a == {1}",
    ),
    "identity and circles survive": (
        "def f(x):\n    x.append(x)\n    return x",
        "x = [1]\ny = f(x)\nassert y is x and x[1] is x",
        "x = [1]\nassert f(x) is not x",
    ),
    "a generator": (
        "def f(n):\n    while True:\n        yield n\n        n += 1",
        "import itertools\ng = f(3)\nassert next(g) == 3 and list(itertools.islice(g, 2)) == [4, 5] and iter(g) is g",
        "assert next(f(3)) == 4",
    ),
    "a finite iterator": (
        "f = lambda x: map(str, x)",
        "assert list(f([1, 2])) == ['1', '2']",
        "assert f([1]) == ['1']",
    ),
    "views of a dict": (
        "f = lambda d: d.keys()",
        "assert f({1: 2}) == {1} and list(f({1: 2})) == [1]",
        "assert f({1: 2}) == {2}",
    ),
    "an exception": (
        "class Own(KeyError):\n    pass\ndef f(x):\n    raise Own('no ' + x)",
        "try:\n    f('key')\nexcept KeyError as error:\n    assert error.args == ('no key',)\nelse:\n    raise AssertionError",
        "try:\n    f('key')\nexcept ValueError:\n    pass",
    ),
    "keyword arguments": (
        "def f(a, *b, c=0, **d):\n    return a, b, c, d",
        "assert f(1, 2, c=3, e=4) == (1, (2,), 3, {'e': 4})",
        "assert f(1) == (1,)",
    ),
    "a function as argument": (
        "def f(g, xs):\n    return sorted(map(g, xs), key=lambda x: -x)",
        "seen = []\ndef g(x):\n    seen.append(x)\n    return x * 2\nassert f(g, [1, 2]) == [4, 2] and seen == [1, 2]\nassert f(len, ['ab']) == [2]",
        "assert f(lambda x: x, [1]) == [2]",
    ),
    "a function as result": ("def f(n):\n    return lambda x: x + n", "assert f(2)(3) == 5", "assert f(2)(3) == 6"),
    "a class of the program": (
        "class Stack:\n    def __init__(self):\n        self.items = []\n    def push(self, x):\n        self.items.append(x)\n    def __len__(self):\n        return len(self.items)\n    def __repr__(self):\n        return f'Stack{self.items}'",
        "s = Stack()\ns.push(1)\ns.push((2,))\nassert len(s) == 2 and s.items == [1, (2,)] and repr(s) == 'Stack[1, (2,)]' and isinstance(s, Stack)\ns.items = []\nassert len(s) == 0 and not s",
        "s = Stack()\ns.push(1)\nassert s.items == []",
    ),
    "objects of the program compare among themselves": (
        "from dataclasses import dataclass\n@dataclass(order=True)\nclass P:\n    x: int\n    def __add__(self, other):\n        return P(self.x + other.x)",
        "assert P(1) == P(1) and P(1) != P(2) and P(1) < P(2) and (P(1) + P(2)).x == 3",
        "assert P(1) == P(2)",
    ),
    "members of an enumeration": (
        "import enum\nclass C(enum.Enum):\n    RED = 1\ndef f():\n    return C.RED",
        "assert f() is C.RED and f().name == 'RED' and f() == C.RED",
        "assert f() == 1",
    ),
    "an object of the tests": (
        "def f(node):\n    total = 0\n    while node:\n        total, node.value, node = total + node.value, 0, node.next\n    return total",
        "class Node:\n    def __init__(self, value, next=None):\n        self.value, self.next = value, next\nn = Node(1, Node(2))\nassert f(n) == 3 and n.next.value == 0",
        "class Node:\n    value, next = 1, None\nassert f(Node()) == 2",
    ),
    "a coroutine": (
        "import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x + 1",
        "import asyncio\nassert asyncio.run(f(1)) == 2",
        "import asyncio\nassert asyncio.run(f(1)) == 1",
    ),
    "what a function prints": (
        "def f(x):\n    print('got', x)",
        "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as out:\n    f(1)\n    f(2)\nassert out.getvalue() == 'got 1\\ngot 2\\n'",
        "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as out:\n    f(1)\nassert out.getvalue() == ''",
    ),
    "a context manager": (
        "import contextlib\n@contextlib.contextmanager\ndef f(x):\n    yield x",
        "with f(3) as x:\n    assert x == 3",
        "with f(3) as x:\n    assert x == 4",
    ),
    "constants": ("LIMIT = 3\nNAMES = ['a']", "assert LIMIT == 3 and NAMES == ['a']", "assert LIMIT == 4"),
    "several functions": (
        "def f(x):\n    return g(x) + 1\ndef g(x):\n    return 2 * x",
        "assert f(1) == 3 and g(1) == 2",
        "assert g(1) == 3",
    ),
}


@pytest.mark.parametrize("name", BEHAVIOUR)
def test_tests_behave_as_in_one_process(reward, name):
    program, holds, fails = BEHAVIOUR[name]
    assert reward(["?"] * 2, [program] * 2, test=[holds, fails]) == [1.0, 0.0]
    scope = {}
    exec(f"{program}\n{holds}", scope)  # they do hold in one process


def test_a_list_of_asserts_and_its_setup(reward):
    columns = {
        "test": [["assert f(2) == 4", "assert f(n) == 9"]] * 2,
        "setup": [["import math", "n = math.floor(3.5)"]] * 2,
    }
    assert reward(["?"] * 2, ["def f(x):\n    return x * x", "def f(x):\n    return x + 2"], **columns) == [1.0, 0.0]


SCRIPT = "n = int(input())\nprint(sum(map(int, input().split())) * n)\n"


@pytest.mark.parametrize(
    "test",
    [
        {"inputs": ["2\n1 2\n", "1\n3"], "outputs": ["6\n", "3"]},
        json.dumps({"inputs": ["2\n1 2\n"], "outputs": [["6"]]}),
        [{"input": "2\n1 2\n", "output": "6  \n\n"}],
    ],
)
def test_scripts_are_compared_by_what_they_print(reward, test):
    programs = [SCRIPT, "print(6)", f"{SCRIPT}raise SystemExit(1)", f"{SCRIPT}import os\nos._exit(3)"]
    found = reward(["?"] * 4, programs, test=[test] * 4)
    assert found == [1.0, 1.0 if "1\\n3" not in repr(test) else 0.0, 0.0, 0.0]


def test_a_script_without_end_and_one_that_prints_without_end(bubblewrap):
    reward = CodeReward(allow_execution=True, workers=1, time_limit=10.0)
    test = [{"input": "", "output": "x"}]
    programs = ["while True: pass", "while True: print('x' * 10000)", "print('x')"]
    assert reward(["?"] * 3, programs, test=[test] * 3) == [0.0, 0.0, 1.0]
    assert reward.summary()["over_time"] >= 1
    reward.close()


@pytest.mark.parametrize("test", [3, [3], {"inputs": ["1"]}, [{"input": "1"}]])
def test_tests_of_another_form_are_refused(reward, test):
    with pytest.raises(DataError, match="column 'test' must hold Python code, a list of it, or a script's input"):
        score(reward, "f = lambda x: 4", test)


@pytest.mark.parametrize("test", ["assert f(2) == (", "x = 1", "def test_it():\n    assert f(2) == 4\n"])
def test_tests_that_test_nothing_are_unusable(reward, test):
    assert score(reward, "f = lambda x: 4", test) is None


def test_a_function_that_the_prompt_asks_to_mend_is_the_programs(reward):
    prompt = "Mend this:\n```python\ndef f(x):\n    return x\n```\n"
    answers = ["def f(x):\n    return x * x\n", "def f(x):\n    return x\n"]
    assert reward([prompt] * 2, answers, test=["assert f(2) == 4"] * 2) == [1.0, 0.0]
    columns = {"test": ["def check(g):\n    assert g(2) == 4\n"] * 2, "entry_point": ["f"] * 2}
    assert reward([prompt] * 2, answers, **columns) == [1.0, 0.0]


def test_finished_functions_of_the_prompt_are_not_the_programs(reward):
    prompt = (
        "import math\n\ndef helper(x):\n    return math.floor(x)\n\ndef f(x):\n    'Such that helper(f(x)) == x.'\n"
    )
    test = "def check(g):\n    assert helper(g(3)) == 3\n    assert math.floor(g(3)) == 3\n"
    columns = {"test": [test] * 3, "entry_point": ["f"] * 3}
    lying = "    return 0\nhelper = lambda x: 3\nmath.floor = lambda x: 3\n"
    whole = f"{prompt}    return x + 0.5\n"
    chat = [{"role": "user", "content": f"Complete:\n```python\n{prompt}```"}]
    answers = ["    return x + 0.5\n", lying, f"```python\n{whole}\n```"]
    assert reward([prompt, prompt, chat], answers, **columns) == [1.0, 0.0, 1.0]
