"""Modes: which completions count as one way to solve a prompt.

Pre-sampling keeps distinct modes first, the answer bank has a slot for each, and logs count them. A mode function maps
the text of a completion to anything hashable; two completions of one prompt with equal values are of one mode.
"""

from __future__ import annotations

import ast
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

    Values are not computed: `2+2` and `4` stay two modes, as do `a*(b+c)` and `a*b+a*c`. What is no expression of
    numbers, names, + − * / and brackets is compared as text.
    """
    if len(completion) > 4096:
        return text(completion)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # `5(3)` and its like
            tree = ast.parse(completion.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text(completion)
    if sum(1 for _ in ast.walk(tree)) > _MOST_NODES:
        return text(completion)
    try:
        return _canonical(tree.body)
    except (TypeError, RecursionError):
        return text(completion)


def sql(completion: str) -> str:
    """The last ```sql block, else the text, as its tokens: comments, white space and the last `;` left out, and
    case outside quotes."""
    blocks = re.findall(r"```(?:sql)?[^\n]*\n(.*?)```", completion, re.DOTALL | re.IGNORECASE)
    tokens = _SQL_TOKEN.findall(blocks[-1] if blocks else completion)
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
        DataError: it raised, or returned something unhashable; `where` says for which completion.
    """
    name = f"mode {getattr(function, '__module__', '')}:{getattr(function, '__qualname__', repr(function))}"
    try:
        found = function(completion)
    except Exception as error:  # the user's function may raise anything
        raise DataError(
            f"{name} raised {type(error).__name__} on {where}, {completion!r:.60}: {' '.join(str(error).split())}"
        ) from error
    try:
        hash(found)
    except TypeError:
        raise DataError(
            f"{name} returned a {type(found).__name__} for {where}, {completion!r:.60}: a mode must be hashable, such "
            "as a text, a number or a tuple of them"
        ) from None
    return found


# ---------------------------------------------------------------- expressions
_SIGNS = {ast.Add: 1, ast.Sub: -1, ast.Mult: 1, ast.Div: -1}


def _canonical(node: ast.expr) -> Hashable:
    """A number or name, or `(kind, sorted operands)`, each operand with how often it is added or multiplied."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return repr(node.value)
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
