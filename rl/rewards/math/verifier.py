"""The worker side of `MathReward`: math-verify on one gold answer and one completion.

Loaded by path in a worker process of a `WorkerPool`, which supplies the time and memory limits: math-verify's own rest
on signals and are switched off. It sees only text.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

__all__ = ["answer", "gold_text", "prepare"]

DELIMITERS = ("\\boxed", "$", "\\(", "\\[")
SENTENCE = re.compile(r"[^\W\d_]{2,}\s+[^\W\d_]{2,}")

_settings: dict[str, Any] = {}


def prepare(settings: dict[str, Any]) -> None:
    """Import math-verify and let it build its parser once, so that every worker forked from here has them."""
    _settings.update(settings)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # its warning that the caller must see to the time
    answer({"gold": r"\frac{1}{2}", "completion": r"\boxed{(0, x^2 = 1)} and \boxed{\frac{\sqrt{4}}{4}}"})
    parsed_gold.cache_clear()


def gold_text(gold: str) -> str | None:
    r"""What math-verify is given as gold: LaTeX with delimiters, or None where there is no answer to be seen.

    What follows the last `####` (GSM8K) counts alone. A gold with `\boxed` or `$` is taken as it is; one without is
    the answer as a whole and is boxed here: math-verify would read a bare `x+1` as 1. A bare sentence is no answer.
    """
    gold = gold.rpartition("####")[2].strip()
    if not gold:
        return None
    if any(delimiter in gold for delimiter in DELIMITERS):
        return gold
    return None if "\\" not in gold and SENTENCE.search(gold) else rf"\boxed{{{gold}}}"


@functools.lru_cache(maxsize=1024)
def parsed_gold(gold: str) -> tuple[Any, ...]:
    """The gold's readings, a SymPy object among them; () where it has none."""
    from math_verify import LatexExtractionConfig, parse
    from sympy import Basic, MatrixBase

    text = gold_text(gold)
    if text is None:
        return ()
    readings = parse(text, [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)
    # A text that only matches itself is left over when the LaTeX is malformed: nothing to verify against.
    return tuple(readings) if any(isinstance(reading, Basic | MatrixBase) for reading in readings) else ()


def _parsed_completion(completion: str) -> list[Any]:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    boxed = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
    )
    readings = parse(completion, [boxed], extraction_mode="first_match", parsing_timeout=None)
    if readings or _settings.get("answers", "boxed") == "boxed":
        return readings
    completion = completion.rpartition("####")[2]
    return parse(completion, [LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=None)


def answer(item: dict[str, str]) -> dict[str, Any]:
    """`{"verdict": correct | wrong | no_answer | unusable_gold}` for `{"gold": …, "completion": …}`."""
    from math_verify import verify

    gold = parsed_gold(item["gold"])
    if not gold:
        return {"verdict": "unusable_gold", "detail": "math-verify finds no answer in it"}
    readings = _parsed_completion(item["completion"])
    if not readings:
        return {"verdict": "no_answer"}
    # verify is not symmetric: the gold comes first.
    return {"verdict": "correct" if verify(list(gold), readings, timeout_seconds=None) else "wrong"}
