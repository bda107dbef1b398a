"""When two answers are equal. math-verify decides, apart from what it gets wrong; each case says what that is."""

from __future__ import annotations

import functools
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

from .reading import UNITS, Answer, read

__all__ = ["correct_math_verify", "equal", "exact", "numbers_equal", "usable"]

DECIMALS = 6  # decimal places to which an approximation must agree, as in math-verify
DIGITS = 400  # digits to which a difference is worked out before it counts as zero
BITS = 100_000  # of a decimal that is still written out as a fraction


def usable(gold: Answer) -> bool:
    """Whether answers can be compared with a gold by more than its letters."""
    if gold.missing or gold.sentence:
        return False
    return bool(gold.words or gold.base or gold.choice or gold.readings)


def equal(gold: Answer, answer: Answer) -> bool:
    """Whether an answer equals the gold. It is not symmetric: the gold says what kind of thing an answer has to be."""
    if answer.missing:
        return False
    if gold.raw_key == answer.raw_key:
        return True
    if gold.words is not None or gold.sentence:
        # math-verify reads bare words as products of letters, in which "north" is "thorn".
        return gold.words is not None and gold.words == answer.plain
    if gold.choice is not None and answer.choice is not None:
        return gold.choice == answer.choice
    if gold.base is not None or answer.base is not None:
        return _numerals_equal(gold, answer)  # math-verify drops the base: 21_3 is 21_4
    factor = _conversion(gold.unit, answer.unit)
    if factor is None:
        return False
    if factor == 1 and gold.key == answer.key:
        return True
    if factor == 1 and _neighbours(gold.key, answer.key):
        return False
    return _values_equal(gold, answer, factor)


def _numerals_equal(gold: Answer, answer: Answer) -> bool:
    """Digits and bases are equal; where one side names no base, the digits are."""
    first, second = (side.base or (side.key.upper().lstrip("0") or "0", "") for side in (gold, answer))
    return first[0] == second[0] and (first[1] == second[1] or not first[1] or not second[1])


def _neighbours(first: str, second: str) -> bool:
    """Whether two decimals are written to the same place and differ: 0.10 and 0.11 are two values to two places.

    SymPy keeps no zeros at the end, so that to it 0.00010010 would be a rounding of 0.00010011.
    """
    found = [_DECIMAL.fullmatch(side) for side in (first, second)]
    if found[0] is None or found[1] is None or found[0]["percent"] != found[1]["percent"]:
        return False
    if len(found[0]["places"]) != len(found[1]["places"]):
        return False
    return Decimal(found[0]["value"]) != Decimal(found[1]["value"])


_DECIMAL = re.compile(r"(?P<value>[-+]?\d+\.(?P<places>\d+))(?P<percent>(?:\\?%)?)")


def _conversion(gold: str, answer: str) -> Fraction | None:
    """How many of the gold's unit one of the answer's is; 1 where one has none or it is unknown; None: another kind.

    math-verify drops units: 5 cm is 5 m.
    """
    (first, _, power), (second, _, other_power) = gold.partition("^"), answer.partition("^")
    kinds = [UNITS.get(name, ("", "1")) for name in (first, second)]
    if not all(kind for kind, _ in kinds) or first == second:
        return Fraction(1)
    if kinds[0][0] != kinds[1][0]:
        return None
    exponent = int(power or 1) if (power or "1") == (other_power or "1") else 1
    return (Fraction(kinds[1][1]) / Fraction(kinds[0][1])) ** exponent


def _values_equal(gold: Answer, answer: Answer, factor: Fraction) -> bool:
    from math_verify import verify
    from sympy import Rational

    found = list(answer.readings)
    if gold.readings and not answer.unit and not _symbols(gold.readings[0]):
        found += _without_letters(answer.text)
    if factor != 1:
        found = [reading * Rational(factor.numerator, factor.denominator) for reading in found]
    found = [reading for reading in found if not _is_false(reading)]
    # verify is not symmetric: the gold comes first.
    return bool(found) and verify(list(gold.readings), found, timeout_seconds=None)


def _symbols(reading: Any) -> set[Any]:
    return getattr(reading, "free_symbols", set())


def _without_letters(text: str) -> list[Any]:
    """Readings without the words, or the letter of a unit, behind the number: `18 apples`, `5m`. For golds that are
    numbers: an answer to those has no variables."""
    match = re.fullmatch(r"(.*[\d}])(?:\s*([ghlmsL])|((?:\s+[A-Za-z]{3,})+))[\s.]*", text, re.DOTALL)
    return [] if match is None else list(read(match[1]).readings)


def _is_false(reading: Any) -> bool:
    """Whether a reading is an equation that does not hold (`5 = 4`), or one that is not solved (`2x = 10`).

    math-verify takes the right side of an equation for the answer, whatever is on the left.
    """
    from latex2sympy2_extended.logic import And
    from sympy import Eq, Mul, Pow

    parts = reading._unsorted_args if isinstance(reading, And) else [reading]
    for part in parts:
        if not isinstance(part, Eq):
            continue
        left, right = part.args
        if not _symbols(left) and not _symbols(right):
            if not numbers_equal(left, right):
                return True
        elif not _symbols(right) and isinstance(left, Mul | Pow) and len(_symbols(left)) == 1:
            if any(argument.is_number for argument in left.args):
                return True
    return False


def numbers_equal(first: Any, second: Any, float_rounding: int = DECIMALS, numeric_precision: int = 15) -> bool:
    """Whether two expressions have one value. It takes the place of math-verify's `sympy_numeric_eq`.

    That one calls equal whatever differs by less than 1e-15 (1/2^99 and 1/2^98), and decimals by their first six
    places alone (0.0000001 and 0.0000002). Here a decimal stands for its exact value, and may approximate an exact one
    if it shows at least six places and is right to the last of them and to four digits; anything else is equal if the
    difference is zero to 400 digits. Expressions with variables are left to simplification.
    """
    from math_verify import grader
    from sympy import Float, Integer, MatrixBase

    if isinstance(first, MatrixBase) or isinstance(second, MatrixBase):
        return _matrices_equal(first, second)
    if _too_large(first) or _too_large(second):
        return first == second
    # 9 % is 9 as well as 0.09; an expression that is no percentage has no such value.
    shares = [grader.get_pct_val(side) for side in (first, second)]
    if (shares[0] is None) != (shares[1] is None):
        values = [side if share is None else share for side, share in zip((first, second), shares, strict=True)]
        if all(isinstance(value, Integer | Float) for value in values) and numbers_equal(*values):
            return True
    decimals = [side for side in (first, second) if isinstance(side, Float)]
    if not decimals and _clearly_differ(exact(first), exact(second)):
        return False
    first, second = (grader.safe_sympy_doit(exact(side)) for side in (first, second))
    if _symbols(first) or _symbols(second):
        return first == second
    difference = first - second
    if difference == 0 or _is_zero(difference):
        return True
    return bool(decimals) and _approximates(first, second, difference, min(map(_places, decimals)))


def _value(expression: Any) -> Any:
    """The value of a constant to 30 digits; None: it is no finite number, or has variables."""
    if _symbols(expression):
        return None
    try:
        value = expression.evalf(30)
    except Exception:  # whatever SymPy raises on what is no number
        return None
    return value if getattr(value, "is_number", False) and value.is_finite else None


def _clearly_differ(first: Any, second: Any) -> bool:
    """Whether two constants differ in their first 20 digits. It spares writing out 9^(9^9) to the last digit."""
    values = [_value(side) for side in (first, second)]
    return None not in values and bool(abs(values[0] - values[1]) > max(map(abs, values)) / 10**20)


def _matrices_equal(first: Any, second: Any) -> bool:
    from math_verify import grader
    from sympy import MatrixBase

    first, second = grader.safe_sympy_doit(first), grader.safe_sympy_doit(second)
    if not (isinstance(first, MatrixBase) and isinstance(second, MatrixBase)) or first.shape != second.shape:
        return False
    pairs = zip(first.flat(), second.flat(), strict=True)
    return all(numbers_equal(a, b) or grader.sympy_symbolic_eq(a, b) for a, b in pairs)


def _too_large(expression: Any) -> bool:
    """Whether a number in it has more than BITS bits before its point: too many to write out as an exact fraction."""
    from sympy import Float

    return any(abs(atom._mpf_[2] + atom._mpf_[3]) > BITS for atom in expression.atoms(Float) if atom.is_finite)


def exact(expression: Any) -> Any:
    """The expression with the exact values of its decimals."""
    from sympy import Float, Rational

    if not hasattr(expression, "atoms"):
        return expression
    return expression.xreplace({atom: Rational(str(_decimal(atom))) for atom in expression.atoms(Float)})


def _decimal(value: Any) -> Decimal:
    return Decimal(str(value))


def _places(value: Any) -> int:
    exponent = _decimal(value).normalize().as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0


def _is_zero(difference: Any) -> bool:
    """Whether a constant vanishes: to DIGITS digits, which no neighbour of an answer does."""
    if difference.is_Rational:
        return difference == 0
    try:
        value = difference.evalf(15, maxn=DIGITS)
    except Exception:  # no number: nothing is known about it
        return False
    if not getattr(value, "is_number", False) or not value.is_finite:
        return False
    return bool(abs(value) < 10 ** (20 - DIGITS)) or (value.is_zero is True)


def _approximates(first: Any, second: Any, difference: Any, places: int) -> bool:
    from sympy import Rational

    if places < DECIMALS:
        return False
    try:
        size = max(abs(first.evalf(30)), abs(second.evalf(30)))
        # A fraction stays one: in binary 1e-8 lies below 1e-8, and two neighbouring decimals would be equal.
        distance = abs(difference if difference.is_Rational else difference.evalf(30))
        return bool(distance < Rational(1, 10**places) and distance < size / 10**4) and (
            first.round(DECIMALS) == second.round(DECIMALS)
        )
    except (TypeError, ValueError, AttributeError):
        return False


def correct_math_verify() -> None:
    """Replace math-verify's comparison of numbers in this process, and let its simplification see exact decimals.

    Raises:
        RuntimeError: this version has no such functions.
    """
    from math_verify import grader

    for name in ("sympy_numeric_eq", "sympy_symbolic_eq", "get_pct_val", "safe_sympy_doit"):
        if not hasattr(grader, name):
            raise RuntimeError(f"this math-verify has no grader.{name}: install math-verify==0.9.0")
    grader.sympy_numeric_eq = numbers_equal
    if not isinstance(grader.sympy_symbolic_eq, functools.partial):
        grader.sympy_symbolic_eq = functools.partial(_simplify_to_zero, grader.sympy_symbolic_eq)


def _simplify_to_zero(simplification: Any, first: Any, second: Any) -> bool:
    if None not in (_value(first), _value(second)):
        return False  # two numbers: `numbers_equal` has decided
    # In floating point 10^30 + 1.5 is 10^30.
    return simplification(exact(first), exact(second))
