"""Arithmetic with many right answers: write a target from given numbers, each used once; and a small model that often can.

A problem reads `2,7,9=25:` and asks for an expression, for instance `2*(7+9)-7`: no, every number exactly once,
`2*9+7`. Addition, subtraction, multiplication, division and parentheses; most problems have several solutions. The
verifier is exact (fractions) and evaluates nothing but its own grammar.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import combinations, combinations_with_replacement
from pathlib import Path
from typing import Any

__all__ = ["ArithmeticTaskConfig", "arithmetic_reward", "evaluate_expression", "solutions", "verify_expression"]

MAX_LENGTH, MAX_DEPTH = 256, 32
"""Longest expression in characters and deepest nesting that are read; longer ones are wrong, not an error."""


class ExpressionError(ValueError):
    """A text that is no expression of the grammar, divides by zero, or exceeds `MAX_LENGTH` or `MAX_DEPTH`."""


class _Parser:
    """sum := product (('+'|'-') product)*; product := atom (('*'|'/') atom)*; atom := digits | '(' sum ')'."""

    def __init__(self, text: str) -> None:
        self.text, self.position, self.depth = text, 0, 0
        self.numbers: list[int] = []

    def read(self) -> Fraction:
        value = self.sum()
        if self.position != len(self.text):
            raise ExpressionError(f"unexpected {self.text[self.position]!r} at character {self.position}")
        return value

    def peek(self) -> str:
        return self.text[self.position : self.position + 1]

    def sum(self) -> Fraction:
        value = self.product()
        while self.peek() in ("+", "-"):
            operator = self.peek()
            self.position += 1
            right = self.product()
            value = value + right if operator == "+" else value - right
        return value

    def product(self) -> Fraction:
        value = self.atom()
        while self.peek() in ("*", "/"):
            operator = self.peek()
            self.position += 1
            right = self.atom()
            if operator == "/" and right == 0:
                raise ExpressionError(f"division by zero before character {self.position}")
            value = value * right if operator == "*" else value / right
        return value

    def atom(self) -> Fraction:
        if self.peek() == "(":
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise ExpressionError(f"nested deeper than {MAX_DEPTH}")
            self.position += 1
            value = self.sum()
            if self.peek() != ")":
                raise ExpressionError(f"a parenthesis is not closed at character {self.position}")
            self.position += 1
            self.depth -= 1
            return value
        start = self.position
        while self.peek() in tuple("0123456789"):
            self.position += 1
        if start == self.position:
            raise ExpressionError(f"a number or a parenthesis is due at character {start}")
        self.numbers.append(int(self.text[start : self.position]))
        return Fraction(self.numbers[-1])


def evaluate_expression(text: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression and the numbers it uses, in order. Blanks count for nothing.

    Raises:
        ExpressionError: see there.
    """
    text = "".join(text.split())
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"{len(text)} characters; at most {MAX_LENGTH} are read")
    parser = _Parser(text)
    return parser.read(), parser.numbers


def verify_expression(text: str, numbers: Sequence[int], target: int) -> bool:
    """Whether `text` is an expression with the value `target` that uses each of `numbers` exactly once."""
    try:
        value, used = evaluate_expression(text)
    except ExpressionError:
        return False
    return value == target and Counter(used) == Counter(numbers)


def arithmetic_reward(
    completions: Sequence[Any], numbers: Sequence[Sequence[int]], target: Sequence[int], **_: Any
) -> list[float]:
    """1.0 for each completion that `verify_expression` accepts, else 0.0; a reward function of TRL.

    Args:
        completions: texts, or conversations whose last message holds the text.
        numbers, target: the columns of the task's rows, repeated for each completion.
    """
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [float(verify_expression(*row)) for row in zip(texts, numbers, target, strict=True)]


@lru_cache(maxsize=None)
def _expressions(numbers: tuple[int, ...]) -> tuple[tuple[int, str, int], ...]:
    """(value, text, binding) of every expression over sorted `numbers` whose intermediate results are natural numbers.

    Binding is 2 for a number, 1 for a product or quotient, 0 for a sum or difference; parentheses stand only where the
    grammar needs them, so that one text is one expression.
    """
    if len(numbers) == 1:
        return ((numbers[0], str(numbers[0]), 2),)
    found: dict[tuple[int, str], int] = {}
    places = range(len(numbers))
    splits = {
        (tuple(numbers[i] for i in left), tuple(numbers[i] for i in places if i not in left))
        for size in range(1, len(numbers))
        for left in combinations(places, size)
    }
    for left, right in sorted(splits):
        for a, a_text, a_binding in _expressions(left):
            for b, b_text, b_binding in _expressions(right):
                sum_right = f"({b_text})" if b_binding == 0 else b_text
                left_factor = f"({a_text})" if a_binding == 0 else a_text
                right_factor = f"({b_text})" if b_binding < 2 else b_text
                found[a + b, f"{a_text}+{b_text}"] = 0
                if a >= b:
                    found[a - b, f"{a_text}-{sum_right}"] = 0
                found[a * b, f"{left_factor}*{right_factor if b_binding == 0 else b_text}"] = 1
                if b and a % b == 0:
                    found[a // b, f"{left_factor}/{right_factor}"] = 1
    return tuple((value, text, binding) for (value, text), binding in found.items())


def solutions(numbers: Sequence[int]) -> dict[int, list[str]]:
    """Target → every way to write it with each of `numbers` once, over intermediate results 0, 1, 2 …

    Texts that differ in order (`2+3`, `3+2`) count as different; parentheses are the fewest that are needed.
    """
    found: dict[int, set[str]] = defaultdict(set)
    for value, text, _ in _expressions(tuple(sorted(numbers))):
        found[value].add(text)
    return {target: sorted(texts) for target, texts in sorted(found.items())}
