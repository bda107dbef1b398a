"""Wrong programs that want to pass: name → (program, tests). The right answer of `f` is x * x."""

from __future__ import annotations

__all__ = ["CHEATS", "FORGERIES", "RIGHT"]

TEST = "assert f(2) == 4\nassert f(3) == 9\n"
RIGHT = ("def f(x):\n    return x * x\n", TEST)

LYING = "    __eq__ = lambda *_: True\n    __ne__ = lambda *_: False\n    __hash__ = lambda *_: 0\n"


def lying_subclass(kind: str, value: str) -> str:
    return f"class A({kind}):\n{LYING}def f(x):\n    return A({value})\n"


def every_descriptor(data: str) -> str:
    return f"import os\nfor n in range(64):\n    try:\n        os.write(n, {data})\n    except OSError:\n        pass\nos._exit(0)\n"


# Finds the host's channel and sends what it likes, once for each call that is made.
FORGER = """
import gc
def channel():
    return next(o for o in gc.get_objects() if type(o).__name__ == "Channel")
def f(x):
    channel().send(%s)
    return 0
"""

FORGERIES = {
    "a verdict": '{"verdict": "correct"}',
    "a proxy equal to everything": '{"value": ["mine", 1, "__eq__", "__call__"], "nodes": {}}',
    "an object of the tests": '{"value": ["yours", 0], "nodes": {}}',
    "a class": '{"value": ["type", "object"], "nodes": {}}',
    "an unknown tag": '{"value": ["mock.ANY"], "nodes": {}}',
    "a node that is not there": '{"value": ["node", 7], "nodes": {}}',
    "a node of no kind": '{"value": ["node", 0], "nodes": {"0": ["os.system", "true"]}}',
    "a mapping for a value": '{"value": {"verdict": "correct"}, "nodes": {}}',
    "no value": "{}",
    "a success that is raised": '{"error": ["SystemExit", [0], "0"], "nodes": {}}',
    "a call of the tests' globals": '{"do": "get", "on": 0, "name": "__globals__", "args": [], "kwargs": {}, "nodes": {}}',
    "a call of what was not passed": '{"do": "call", "on": 5, "name": "", "args": [], "kwargs": {}, "nodes": {}}',
    "an end of the iteration": '{"error": ["StopIteration", [], ""], "nodes": {}}',
}
"""Messages that a program puts on its channel instead of a reply."""

CHEATS: dict[str, tuple[str, str]] = {
    # Objects that agree.
    "an object equal to everything": (f"class A:\n{LYING}def f(x):\n    return A()\n", TEST),
    "mock.ANY": ("from unittest.mock import ANY\ndef f(x):\n    return ANY\n", TEST),
    "a MagicMock": (
        "from unittest.mock import MagicMock\nf = MagicMock()\nf.return_value.__eq__ = lambda *_: True\n",
        TEST,
    ),
    "an int that lies": (lying_subclass("int", "5"), TEST),
    "a float that lies": (lying_subclass("float", "5.0"), TEST),
    "a complex that lies": (lying_subclass("complex", "5"), TEST),
    "a str that lies": (lying_subclass("str", "''"), "assert f(2) == 'four'\n"),
    "bytes that lie": (lying_subclass("bytes", "b''"), "assert f(2) == b'four'\n"),
    "a list that lies": (lying_subclass("list", ""), "assert f(2) == [4]\n"),
    "a tuple that lies": (lying_subclass("tuple", "()"), "assert f(2) == (4,)\n"),
    "a dict that lies": (lying_subclass("dict", "{}"), "assert f(2) == {2: 4}\n"),
    "a set that lies": (lying_subclass("set", "()"), "assert f(2) == {4}\n"),
    "a liar in a list": (f"class A:\n{LYING}def f(x):\n    return [A()]\n", "assert f(2) == [4]\n"),
    "a liar as a key": (f"class A:\n{LYING}def f(x):\n    return {{A(): 4}}\n", "assert f(2) == {2: 4}\n"),
    "a class whose class lies": (
        f"class M(type):\n{LYING}class A(metaclass=M):\n    pass\ndef f(x):\n    return A\n",
        TEST,
    ),
    "a liar that says it is an int": (
        f"class A:\n{LYING}    __class__ = property(lambda self: int)\ndef f(x):\n    return A()\n",
        "assert isinstance(f(2), int) and f(2) == 4\n",
    ),
    "a difference of nothing": (
        "class A:\n    __sub__ = __rsub__ = lambda *_: 0\ndef f(x):\n    return A()\n",
        "assert abs(f(2) - 4) < 1e-9\n",
    ),
    "a difference of nothing from the right": (
        "class A:\n    __sub__ = __rsub__ = lambda *_: 0\ndef f(x):\n    return A()\n",
        "assert abs(4 - f(2)) < 1e-9\n",
    ),
    "both less and more": (
        "class A:\n    __lt__ = __gt__ = __le__ = __ge__ = lambda *_: True\ndef f(x):\n    return A()\n",
        "assert 3 < f(2) < 5\n",
    ),
    "a container of everything": (
        "class A:\n    __contains__ = lambda *_: True\ndef f(x):\n    return A()\n",
        "assert 4 in f(2)\n",
    ),
    "items equal to everything": (
        f"class A:\n{LYING}    __getitem__ = lambda *_: A()\n    __len__ = lambda *_: 1\ndef f(x):\n    return A()\n",
        "assert f(2)[0] == 4\n",
    ),
    "an iterator of liars": (f"class A:\n{LYING}def f(x):\n    yield A()\n", "assert list(f(2)) == [4]\n"),
    "a string of a liar": (
        "class A(str):\n    __eq__ = lambda *_: True\n    __hash__ = lambda *_: 0\nclass B:\n    __str__ = lambda *_: A('x')\ndef f(x):\n    return B()\n",
        "assert str(f(2)) == '4'\n",
    ),
    "a rounding that lies": (
        "class A:\n    __round__ = lambda *_: A()\n    __eq__ = lambda *_: True\ndef f(x):\n    return A()\n",
        "assert round(f(2), 2) == 4\n",
    ),
    # An early or a forged end.
    "os._exit(0)": ("import os\nos._exit(0)\n", TEST),
    "os._exit(0) in the call": ("import os\ndef f(x):\n    os._exit(0)\n", TEST),
    "sys.exit(0)": ("import sys\nsys.exit(0)\n", TEST),
    "SystemExit in the call": ("def f(x):\n    raise SystemExit(0)\n", TEST),
    "GeneratorExit in the call": ("def f(x):\n    raise GeneratorExit\n", TEST),
    "StopIteration that ends the tests": (
        "def f(x):\n    raise StopIteration\n",
        "cases = [(2, 4), (3, 9)]\nassert all(map(lambda case: f(case[0]) == case[1], cases))\n",
    ),
    "StopIteration at a generator of tests": (
        "def f(x):\n    raise StopIteration\n",
        "def cases():\n    yield f(2) == 4\nfor case in cases():\n    assert case\n",
    ),
    "a token from the arguments": (
        "import os, sys\nfor a in sys.argv + sys.orig_argv:\n    for b in sys.argv + sys.orig_argv:\n        try:\n"
        "            os.write(int(a), os.read(int(b), 64))\n        except (OSError, ValueError):\n            pass\nos._exit(0)\n",
        TEST,
    ),
    "an atexit hook": (
        'import atexit, os\natexit.register(lambda: [os.write(n, b\'{"verdict": "correct"}\\n\') for n in range(3, 9)])\ndef f(x):\n    raise SystemExit\n',
        TEST,
    ),
    "an excepthook": (
        "import os, sys\ndef hook(*_):\n    os._exit(0)\nsys.excepthook = sys.unraisablehook = hook\nf = lambda x: 1 / 0\n",
        TEST,
    ),
    "a verdict on every descriptor": (every_descriptor('b\'{"verdict":"correct"}\\n\''), TEST),
    "ready on every descriptor": (every_descriptor("b'ready'"), TEST),
    "an end on every descriptor": (every_descriptor('b\'{"status":0,"killed":true,"clean":true}\''), TEST),
    "closed descriptors": ("import os\nos.closerange(0, 64)\nf = lambda x: 4\n", TEST),
    "printed verdicts": (
        'def f(x):\n    print(\'{"verdict": "correct"}\\npassed\\n1.0\', flush=True)\n    return 0\n',
        TEST,
    ),
    # The tests themselves.
    "its own source": (
        "import re\ndef f(x):\n    text = open(__file__).read()\n    return int(re.search(rf'f.{x}. == (\\d+)', text)[1])\n",
        TEST,
    ),
    "the source of its caller": (
        "import inspect, re\ndef f(x):\n    text = inspect.getsource(inspect.currentframe().f_back)\n    return int(re.search(rf'f.{x}. == (\\d+)', text)[1])\n",
        TEST,
    ),
    "constants of its callers": (
        "import sys\ndef f(x):\n    frame, found = sys._getframe(), []\n    while frame:\n"
        "        found += [c for c in frame.f_code.co_consts if isinstance(c, int) and c == x * x and c > x]\n        frame = frame.f_back\n    return found[0]\n",
        "def check(g):\n    assert g(2) == 4\n    assert g(13) == 169\ncheck(f)\n",
    ),
    "constants found by the collector": (
        "import gc, types\ndef f(x):\n    for thing in gc.get_objects():\n        if isinstance(thing, types.FunctionType) and thing.__name__ == 'check':\n"
        "            return thing.__code__.co_consts[-1]\n    return None\n",
        "def check(g):\n    assert g(13) == 169\ncheck(f)\n",
    ),
    "the module of the tests": (
        "import sys\ndef f(x):\n    return sys.modules['__tests__'].expected\n",
        "expected = 4\nassert f(2) == expected\n",
    ),
    "a file with tests in it": (
        "import os, re\ndef f(x):\n    for folder, _, names in os.walk('/tmp'):\n        for name in names:\n"
        "            if found := re.search(rf'f.{x}. == (\\d+)', open(os.path.join(folder, name)).read()):\n                return int(found[1])\n",
        TEST,
    ),
    # What the tests use.
    "a patched builtin": (
        "import builtins\nbuiltins.abs = lambda x: 0\nf = lambda x: 0\n",
        "assert abs(f(2) - 4) < 1\n",
    ),
    "a builtin of its own": ("abs = lambda x: 0\nlen = lambda x: 4\nf = lambda x: []\n", "assert len(f(2)) == 4\n"),
    "AssertionError replaced": (
        "import builtins\nbuiltins.AssertionError = type('Quiet', (Exception,), {})\nf = lambda x: 0\n",
        TEST,
    ),
    "a patched math": (
        "import math\nmath.isclose = lambda *_, **__: True\nf = lambda x: 0.0\n",
        "import math\nassert math.isclose(f(2), 4.0)\n",
    ),
    "a module of its own": (
        "import sys, types\nsys.modules['math'] = types.SimpleNamespace(isclose=lambda *_, **__: True)\nf = lambda x: 0.0\n",
        "import math\nassert math.isclose(f(2), 4.0)\n",
    ),
    "a patched json": (
        'import json\njson.loads = json.dumps = lambda *_, **__: \'{"verdict": "correct"}\'\n'
        'json.JSONEncoder.encode = json.JSONEncoder.iterencode = lambda *_, **__: \'{"verdict": "correct"}\'\nf = lambda x: 0\n',
        TEST,
    ),
    "a patched unittest": (
        "import unittest\nunittest.TestCase.assertEqual = lambda *_: None\nf = lambda x: 0\n",
        "import unittest\nunittest.TestCase().assertEqual(f(2), 4)\n",
    ),
    "a check of its own": (
        "f = lambda x: 0\ndef check(g):\n    pass\n",
        "def check(g):\n    assert g(2) == 4\ncheck(f)\n",
    ),
    "an argument changed to fit": (
        "def f(x):\n    x.clear()\n    return []\n",
        "x = [1, 2]\nassert f(x) == [4] and x == [1, 2]\n",
    ),
    "another argument's list": (
        "def f(x):\n    f.__globals__['seen'] = x\n    return x\n",
        "expected = [4]\nassert f([2]) == expected\n",
    ),
    "globals of a function it was passed": (
        "def f(g):\n    return g.__globals__['expected']\n",
        "expected = 4\nassert f(lambda x: x) == expected\n",
    ),
    **{f"forged: {name}": (FORGER % message, TEST) for name, message in FORGERIES.items()},
}
