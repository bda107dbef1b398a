"""Modes: which completions are one way to solve a prompt."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdiv.errors import DataError
from fdiv.rl.modes import MODES, answer, expression, mode_of, resolve_mode, sql


@pytest.mark.parametrize(
    "group",
    [
        ["3*2+7", "7 + 2*3", "(2*3)+7", "7+(3*2)", "3×2+7", "7+2·3", r"$7 + 3 \times 2$", "3.0*2+7"],
        ["7-3", "-3+7", "(7)-(3)", "7−3", "−3+7"],
        ["3-7", "-7+3"],
        ["8/2*3", "3*8/2", "3/2*8", "8÷2×3", r"8 \div 2 \cdot 3"],
        ["5-4*2", r"First 4*2, so it is \boxed{5-2*4}.", r"The answer is $-(2\cdot 4)+5$"],
        ["2-(3-4)", "2-3+4", "4+2-3"],
        ["a*(b+c)", "(c+b)*a"],
        ["a*b+a*c", "c*a+b*a"],
        ["2+2"],
        ["4"],
        ["2*3=6"],
        ["f(2)"],
        ["2**3"],
        [""],
    ],
)
def test_expressions_of_a_group_are_one_mode_and_of_no_other(group):
    found = {expression(text) for text in group}
    assert len(found) == 1
    others = {"1+1", "9-8-7", "7*3+2", "a*b*c"}
    assert found.isdisjoint({expression(text) for text in others})


def _forms(node):
    """Every way to write a tree of sums and products with its operands swapped."""
    if isinstance(node, int):
        return [str(node)]
    operator, left, right = node
    pairs = itertools.product(_forms(left), _forms(right))
    return [text for a, b in pairs for text in (f"({a}){operator}({b})", f"({b}){operator}({a})")]


trees = st.recursive(st.integers(0, 9), lambda inner: st.tuples(st.sampled_from("+*"), inner, inner), max_leaves=4)


@given(trees)
def test_operands_may_change_places(tree):
    assert len({expression(text) for text in _forms(tree)}) == 1


@given(st.text(max_size=40))
def test_any_text_has_a_hashable_mode(text):
    for name in MODES:
        hash(mode_of(resolve_mode(name), text, "a sample"))


def test_a_hostile_expression_is_compared_as_text():
    for text in ("(" * 3000 + ")" * 3000, "1+" * 2000 + "1", "-" * 4000 + "1", "9" * 5000):
        assert expression(text) == text


def test_sql_keeps_what_stands_in_quotes():
    assert sql("SELECT  Name FROM T WHERE x='A  b' -- c\n;") == "select name from t where x = 'A  b'"
    assert sql("Here:\n```sql\nselect count( * )\nfrom t /* all */ ;\n```") == sql("SELECT COUNT(*) FROM t")
    assert sql("select 'a--b'") == "select 'a--b'"
    assert sql("select a-b") != sql("select a/b")


def test_sql_is_the_query_that_the_reward_runs():
    for completion in (
        "<think>```sql\nselect 9\n```</think>SELECT 1;",
        "<answer>select  1</answer>",
        "```sqlite\nselect 1\n```\nor\n```text\nno query\n```",
        "~~~sql\r\nselect 1\r\n~~~",
    ):
        assert sql(completion) == "select 1"
    assert sql("```sql\nselect 1") == "`` ` sql select 1"  # cut off: no query, so the text


@pytest.mark.parametrize(("completion", "mode"), [("3−2", "3−2"), ("so 5 − 2", "5 − 2"), ("It is −2", "−2")])
def test_a_minus_of_typography_belongs_to_the_answer(completion, mode):
    assert answer(completion) == mode


def test_a_fault_of_the_function_is_named():
    def broken(text):
        raise KeyError("no")

    def unhashable(text):
        return [text]

    def unequal(text):
        return len(text), math.nan

    def identity(text):
        return object()

    with pytest.raises(DataError, match=r"broken raised KeyError on sample 3/1, 'abc': 'no'"):
        mode_of(broken, "abc", "sample 3/1")
    with pytest.raises(DataError, match=r"unhashable returned a list for sample 3/1, 'abc': a mode must be hashable"):
        mode_of(unhashable, "abc", "sample 3/1")
    for function, what in ((unequal, "a tuple"), (identity, "a object"), (lambda text: math.nan, "nan")):
        with pytest.raises(
            DataError, match=rf"returned {what} for sample 3/1, 'abc': a mode must be equal to its own"
        ):
            mode_of(function, "abc", "sample 3/1")
    with pytest.raises(DataError, match="returned a function for a row, 'abc': a mode must be a plain value"):
        mode_of(lambda text: lambda: text, "abc", "a row")
    for value in (None, 1.5, ("a", frozenset("bc")), ""):
        assert mode_of(lambda text, value=value: value, "abc", "a row") == value
    with pytest.raises(ValueError, match="unknown mode 'expresion'; did you mean 'expression'"):
        resolve_mode("expresion")
