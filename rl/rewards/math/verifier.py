"""The worker side of `MathReward`: one gold answer and one completion.

Loaded by path in a worker process of a `WorkerPool`, which supplies the time and memory limits: math-verify's own rest
on signals and are switched off. It sees only text.
"""

from __future__ import annotations

import logging
from typing import Any

from .comparison import correct_math_verify, equal, usable
from .extraction import final_answer, gold_answer
from .reading import read

__all__ = ["answer", "prepare"]

_settings: dict[str, Any] = {}


def prepare(settings: dict[str, Any]) -> None:
    """Import math-verify and let it build its parser once, so that every worker forked from here has them.

    Raises:
        RuntimeError: this version of math-verify cannot be corrected.
    """
    _settings.update(settings)
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # its warning that the caller must see to the time
    correct_math_verify()  # this process is the verifier's own
    for gold, completion in ((r"\frac{1}{2}", r"\boxed{0.5}"), ("(0, x^2)", r"\boxed{(0, \frac{\sqrt{4}}{4})}")):
        answer({"gold": gold, "completion": completion, "opened": False})


def answer(item: dict[str, Any]) -> dict[str, Any]:
    """`{"verdict": correct | wrong | no_answer | unusable_gold}` for `{"gold": …, "completion": …, "opened": …}`.

    A gold that is no mathematics is usable by its letters alone: an answer that repeats it is correct, about others
    nothing is known. Without a completion the gold is tried alone.
    """
    gold = read(gold_answer(item["gold"]))
    can_be_compared = usable(gold)
    if gold.missing:
        return {"verdict": "unusable_gold", "detail": "there is no answer in it"}
    if item["completion"] is None:
        equal(gold, read("1"))
        found = None
    else:
        found = final_answer(item["completion"], plain=_settings.get("answers") == "any", opened=item["opened"])
        if found is not None and equal(gold, read(found)):
            return {"verdict": "correct"}
    if not can_be_compared:
        return {"verdict": "unusable_gold", "detail": "it is no mathematics, and only its own letters match it"}
    return {"verdict": "no_answer" if found is None else "wrong"}
