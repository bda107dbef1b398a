"""Modes: which completions count as one way to solve a prompt.

Pre-sampling keeps distinct modes first, the answer bank has a slot for each, and logs count them. A mode function maps
the text of a completion to anything hashable; two completions of one prompt with equal values are of one mode.
"""

from __future__ import annotations

import ast
import copy
import re
import warnings
from collections import Counter
from collections.abc import Callable, Hashable

from fdiv.errors import DataError
from fdiv.named import Table

__all__ = ["MODES", "answer", "expression", "mode_of", "resolve_mode", "sql", "text"]

Mode = Callable[[str], Hashable]

#: Operands of an expression that are read; a longer one is compared as text.
_MOST_NODES = 512


def text(completion: str) -> str:
    """The completion itself, runs of white space as one blank."""
    return " ".join(completion.split())


def answer(completion: str) -> str:
    """The final answer (`\\boxed{…}`, `#### …`, the last number or formula), or the text where there is none."""
    from fdiv.rl.rewards.math.extraction import final_answer

    found = final_answer(completion, plain=True)
    return text(completion if found is None else found)


def expression(completion: str) -> Hashable:
    """An arithmetic expression up to the order of sums and products, brackets and blanks: `3*2+7` is `7+(2*3)`.

    It is the whole completion, or else its boxed answer or the formula after the word "answer". `×`, `·`, `÷`, `−` and
    LaTeX's `\\times`, `\\cdot`, `\\div` are read as `*`, `/` and `-`, and numbers by their value (`2.0` is `2`).
    Nothing is computed: `2+2` and `4` stay two modes, as do `a*(b+c)` and `a*b+a*c`. What is no expression of numbers,
    names, + − * / and brackets is compared as text.
    """
    from fdiv.rl.rewards.math.extraction import final_answer

    found = _expression(completion)
    if found is None and len(completion) > 1 and (said := final_answer(completion)):
        found = _expression(said)
    return text(completion) if found is None else found


def sql(completion: str) -> str:
    """The query that the sql reward runs, as its tokens: comments, white space and the last `;` left out, and case
    outside quotes. Where there is no query (see `extract_sql`), the whole text."""
    from fdiv.rl.rewards.completions import extract_sql

    tokens = _SQL_TOKEN.findall(extract_sql(completion) or completion)
    kept = [token if token[0] in "'\"`" else token.lower() for token in tokens if token[:2] not in ("--", "/*")]
    return " ".join(kept).rstrip("; ")


#: Quoted text, comments, words and numbers, operators of two characters, any other character but white space.
_SQL_TOKEN = re.compile(
    r"""'(?:[^']|'')*'|"[^"]*"|`[^`]*`|--[^\n]*|/\*.*?\*/|[\w.]+|<=|>=|<>|!=|==|\|\||\S""", re.DOTALL
)


MODES: Table[str] = Table(
    "mode",
    "a function of the completion's text that returns something hashable",
    callable,
    {name: f"fdiv.rl.modes:{name}" for name in ("answer", "expression", "sql", "text")},
)
"""`mode:` of pre-sampling and of the answer bank; or `module:attribute` of your own."""


def resolve_mode(name: str) -> Mode:
    """The mode function of a name or `module:attribute`.

    Raises:
        ValueError: an unknown name, with the nearest one; a path that cannot be imported.
    """
    return MODES.find(name)


def mode_of(function: Mode, completion: str, where: str) -> Hashable:
    """`function(completion)`, with its faults named.

    Raises:
        DataError: it raised, or returned something unhashable or unlike its own copy (NaN, an object that is equal
            to nothing else), by which no two completions would be of one mode; `where` says for which completion.
    """
    name = f"mode {getattr(function, '__module__', '')}:{getattr(function, '__qualname__', repr(function))}"
    try:
        found = function(completion)
    except Exception as error:  # the user's function may raise anything
        raise DataError(
            f"{name} raised {type(error).__name__} on {where}, {completion!r:.60}: {' '.join(str(error).split())}"
        ) from error
    fault = _fault(found)
    if fault is not None:
        raise DataError(
            f"{name} returned {_described(found)} for {where}, {completion!r:.60}: {fault}; return a text, a number "
            "or a tuple of them"
        )
    return found


def _fault(found: object) -> str | None:
    """Why a value cannot tell modes apart; None where it can."""
    try:
        hash(found)
    except TypeError:
        return "a mode must be hashable"
    plain = "a mode must be a plain value, which can be copied"
    if callable(found):
        return plain
    try:
        alike = _equals_its_copy(found)
    except Exception:  # whatever the user's class raises
        return plain
    return None if alike else "a mode must be equal to its own copy, or no two completions share one"


def _equals_its_copy(value: object) -> bool:
    if isinstance(value, tuple | frozenset):
        return all(map(_equals_its_copy, value))
    return bool(value == copy.deepcopy(value))  # a NaN is not


def _described(found: object) -> str:
    return f"{found!r}" if isinstance(found, float | int | complex) else f"a {type(found).__name__}"


# ---------------------------------------------------------------- expressions
_OPERATORS = {
    "−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/",
    r"\times": "*", r"\cdot": "*", r"\div": "/",
}  # fmt: skip
_SIGNS = {ast.Add: 1, ast.Sub: -1, ast.Mult: 1, ast.Div: -1}


def _expression(written: str) -> Hashable | None:
    """The canonical form of an expression; None where it is none, or too long."""
    if len(written) > 4096:
        return None
    for sign, operator in _OPERATORS.items():
        written = written.replace(sign, operator)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # `5(3)` and its like
            tree = ast.parse(written.strip().strip("$"), mode="eval")
        return None if sum(1 for _ in ast.walk(tree)) > _MOST_NODES else _canonical(tree.body)
    except (SyntaxError, TypeError, ValueError, OverflowError, RecursionError, MemoryError):
        return None


def _canonical(node: ast.expr) -> Hashable:
    """A number or name, or `(kind, sorted operands)`, each operand with how often it is added or multiplied."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
        return repr(int(value) if value == value // 1 else value)
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        sign = -1 if isinstance(node.op, ast.USub) else 1
        return _chain("sum", [(sign, node.operand)])
    if isinstance(node, ast.BinOp) and type(node.op) in _SIGNS:
        kind = "sum" if isinstance(node.op, ast.Add | ast.Sub) else "product"
        return _chain(kind, [(1, node.left), (_SIGNS[type(node.op)], node.right)])
    raise TypeError(f"{type(node).__name__} is no part of an expression")


def _chain(kind: str, operands: list[tuple[int, ast.expr]]) -> Hashable:
    counts: Counter[Hashable] = Counter()
    for sign, operand in operands:
        found = _canonical(operand)
        if isinstance(found, tuple) and found[0] == kind:  # a sum in a sum is one sum
            counts.update({term: sign * times for term, times in found[1]})
        else:
            counts[found] += sign
    # `b - a` and `a - b` differ by their signs; an operand that cancels is kept, for it was written.
    terms = sorted(counts.items(), key=repr)
    if len(terms) == 1 and terms[0][1] == 1:
        return terms[0][0]
    return kind, tuple(terms)
