"""Where the program or the query stands in a completion: fences × line ends × tags × what surrounds them, in linear time."""

import ast
import gzip
import json
import time
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdiv.rl.rewards import completions
from fdiv.rl.rewards.completions import (
    after_reasoning,
    blocks,
    extract_python,
    extract_sql,
    find_program,
    last_answer,
)

PROGRAM = "def f(x):\n    if x:\n        return 2 * x\n\n    return 0"
QUERY = "SELECT a\nFROM t"
FENCES = {"```": "```", "````": "````", "~~~": "~~~", "  ```": "  ```", "- ```": "  ```", "Here it is: ```": "```"}
SURROUNDINGS = [
    "%s", "Sure!\n\n%s\n\nThat is it.", "<think>\n```\nx\n```\nhm</think>\n%s", "%s\n```bash\npip install x\n```\n",
    "```\nold\n```\nbetter:\n%s", "<answer>\n%s\n</answer>",
]  # fmt: skip


def fenced(content, fence, tag, ending):
    margin = " " * (len(fence) - len(fence.lstrip(" -"))) if fence[0] in " -" else ""
    lines = [f"{margin}{line}" if line else line for line in content.split("\n")]
    close = FENCES[fence]
    tail = close.strip() if ending == "attached" else f"\n{close}" + ("\n" if ending == "line" else "")
    return f"{fence}{tag}\n" + "\n".join(lines) + tail


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize(
    ("extract", "content", "tags"),
    [
        (
            extract_python,
            PROGRAM,
            ["python", "Python", "py", "python3", " python", "{.python}", 'python title="f.py"'],
        ),
        (extract_sql, QUERY, ["sql", "SQL", "sqlite", "postgresql", " sql "]),
    ],
    ids=["python", "sql"],
)
def test_every_way_to_fence(extract, content, tags, surrounding, newline):
    for fence, tag, ending in product(FENCES, tags, ("line", "end", "attached")):
        text = surrounding.replace("%s", fenced(content, fence, tag, ending)).replace("\n", newline)
        assert extract(text) == content, repr(text)


@pytest.mark.parametrize("tag", ["", "text", "code", "plaintext"])
def test_blocks_without_a_language_count_where_no_other_does(tag):
    assert extract_python(f"```{tag}\n{PROGRAM}\n```") == PROGRAM
    assert extract_sql(f"```{tag}\n{QUERY}\n```\n```json\n1\n```") == QUERY
    assert extract_python(f"```python\n{PROGRAM}\n```\nprints\n```{tag}\n4\n```") == PROGRAM


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\nx = 1\n```\n```python\ny = 2\n```", "y = 2"),
        ("```ruby\nx\n```", "x"),
        ("it is ```x = 1```.", "x = 1"),
        ("```py x = 1```", "x = 1"),
        ("```python\nx = 1", ""),
        ("```python\nx = 1\n```\n```python\ny = ", ""),
        ("```python\nx = 1\n```\nExample:\n```\n>>> x", "x = 1"),
        ("<think>```python\nx = 1\n```", ""),
        ("<think>a</think>```python\nx = 1\n```<think>```python\ny\n```", ""),
        ("x = 1\r\ny = 2\r\n", "x = 1\ny = 2"),
        ("    return 1\n", "    return 1"),
        ("```python\n    return 1\n```", "    return 1"),
        ("<answer>x = 1</answer>", "x = 1"),
        ("<answer>x = 1", ""),
        ("", ""),
    ],
)
def test_which_program(text, program):
    assert extract_python(text) == program


def test_of_several_blocks_the_last_that_defines_what_is_tested():
    text = "```python\nimport math\n```\n```python\ndef f(x):\n    return math.pi\n```\nUse it:\n```python\nprint(f(2))\n```"
    assert extract_python(text, ["f"]) == "def f(x):\n    return math.pi"
    assert extract_python(text) == "print(f(2))"
    assert find_program(text, "?", ["f"]) == "import math\ndef f(x):\n    return math.pi"
    for definition in ("f = abs", "f: int = 3", "async def f(): 1", "class f: 1", "from m import f", "import f"):
        assert extract_python(f"```python\n{definition}\n```\n```python\nprint(f)\n```", ["f"]) == definition
    for other in ("ff = 1", "f == 1", "def g(f): 1", "  def f(): 1"):
        assert extract_python(f"```python\n{other}\n```\n```python\nprint(f)\n```", ["f"]) == "print(f)"


@pytest.mark.parametrize(
    "prompt",
    [
        "from typing import List\nimport math\n\nP = 3\n\ndef helper(x):\n    return x\n\ndef f(x: List[int]):\n    '''Doc.'''\n",
        "Write f.\n```python\nfrom typing import List\nimport math\nP = 3\ndef helper(x):\n    return x\n"
        "def f(x: List[int]):\n    pass\nassert f(2) == 4\nprint(f(2))\nresult = f(3)\n```\nThank you.",
        "Complete this function:\n\nfrom typing import List\nimport math\nP = 3\ndef helper(x):\n    return x\n"
        "def f(x: List[int]):\n    pass\n\nGive the whole of it, please!",
    ],
)
@pytest.mark.parametrize("conversation", [False, True])
def test_a_restated_function_has_the_header_of_its_prompt(prompt, conversation):
    prompt = [{"role": "user", "content": prompt}] if conversation else prompt
    answer = "```python\ndef f(x: List[int]):\n    return helper(math.floor(x)) + P\n```"
    scope = {}
    exec(find_program(answer, prompt, ["f"]), scope)
    assert scope["f"](2.5) == 5
    assert "result" not in scope
    assert find_program("```python\nfrom __future__ import annotations\ndef f(): 1\n```", prompt, ["f"]).startswith(
        "from __future__"
    )


def test_an_answer_without_the_function_continues_the_prompt():
    prompt = "def f(x):\n"
    assert find_program("    return 1\n", prompt, ["f"]) == "def f(x):\n    return 1"
    assert find_program("```python\n    return 1\n```", prompt, ["f"]) == "def f(x):\n    return 1"
    assert find_program("x = 1", "Write x.", ["y"], continues=False) == "x = 1"
    assert find_program("", prompt, ["f"]) == find_program("```python\nx", prompt, ["f"]) == ""


def test_every_restated_solution_of_humaneval_compiles_with_its_header(shared_data):
    with gzip.open(shared_data / "data" / "humaneval" / "HumanEval.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    for row in rows:
        source = row["prompt"] + row["canonical_solution"]
        tree = ast.parse(source)
        function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == row["entry_point"])
        answer = f"```python\n{ast.get_source_segment(source, function)}\n```"
        exec(find_program(answer, row["prompt"], [row["entry_point"]]), {})  # the names in its header are defined


@pytest.mark.parametrize(
    ("tests", "names"),
    [
        ("assert f(2) == 4\nassert g(h(1)) == len([2])", {"f", "g", "h"}),
        ("import math\ndef check(c):\n    assert c(math.floor(2)) == 4", set()),
        ("x = list(range(3))\nassert set(similar(x, (1,))) == set()", {"similar"}),
        ("no python", set()),
        ("", set()),
    ],
)
def test_the_names_that_tests_need(tests, names):
    assert completions.tested_names(tests) == names


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("a", "a"), ("<think>a</think>b", "b"), ("<think>a", None), ("a</think>b", "b"), ("<think>a</think>b<think>c", None),
        ("<reasoning>a</reasoning>b", "b"), ("[THINK]a[/THINK]b", "b"), ("<|begin_of_thought|>a<|end_of_thought|>b", "b"),
    ],
)  # fmt: skip
def test_what_follows_the_reasoning(text, rest):
    assert after_reasoning(text) == rest
    assert after_reasoning(text, opened=True) == (None if text == "a" else rest)


def test_answers_in_tags():
    assert last_answer("<answer>a</answer> <ANSWER>b</ANSWER>") == "b"
    assert last_answer("<answer>a</answer> <answer>b") == ""
    assert last_answer("a</answer>") is None


UNITS = [
    "```a\n", "```\n", "<answer>", "</answer>", "<think>", "`````a\nx", "```\nx```\n", "x```\n", "~~~a\nx~~~\n```a\nx```\n",
    "``` ``` ", "` ", "\r\n", "def f", "import a, ", "```python\nimport f\n```\n", "    ", "f = ", "from a import b,\n",
]  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_extraction_takes_linear_time(unit):
    """Quadratic time would be sixteen times as much for four times the text; 20 KB took 3 s."""

    def seconds(length):
        text = (unit * (length // len(unit) + 1))[:length]
        began = time.process_time()
        extract_sql(text)
        find_program(text, "def f(x):\n", ["f"])
        return time.process_time() - began

    seconds(1000)
    small, large = seconds(25_000), seconds(100_000)
    assert large < 8 * small + 0.2
    assert large < 2.0


@given(
    st.lists(
        st.sampled_from([*UNITS, "x", "\n", "```python\n", "````", "</think>", "def f():\n  1\n"]), max_size=30
    ).map("".join)
)
@settings(max_examples=200, deadline=None)
def test_any_text_is_read(text):
    for block in blocks(text):
        assert "\r" not in block.text
    assert isinstance(extract_sql(text), str)
    assert isinstance(find_program(text, "?", ["f"]), str)
