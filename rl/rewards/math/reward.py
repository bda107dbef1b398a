"""Mathematics, verified by math-verify in killable workers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal

from fdiv.rl.rewards.pool import WorkerPool
from fdiv.rl.rewards.pooled_reward import PooledReward, reasoning_open

__all__ = ["MathReward", "gold_text"]


class MathReward(PooledReward):
    r"""1.0 where the completion's answer equals the gold answer, 0.0 where it does not, None where it is unknown.

    The answer is the last `\boxed{…}`, or a formula after the word "answer"; with `answers: any` also what follows
    `####` or stands in `<answer>…</answer>`, or, failing that, the last number or formula. Reasoning that never ends,
    or a last box that is cut off, leaves no answer. Gold and answer are read by one reader, and equal texts are equal;
    else `math_verify.verify(gold, answer)` decides, which is not symmetric, apart from what it gets wrong: numbers
    that differ by little, bases, units, words, equations that do not hold.

    Golds are texts, numbers, or lists of the parts of one answer (OlympiadBench). A missing one (None, NaN, "N/A", an
    empty text or list) is unusable. One that is no mathematics is compared by its letters: an answer that repeats it
    is correct, others are not scored.

    Verdicts: `correct` 1; `wrong` 0; `no_answer` 0, by definition: an empty completion, or one cut off before its
    answer; `over_time` and `over_memory` 0: the answer ran into its own limit, and the gold alone did not;
    `unusable_gold` None (see `unusable_golds`); `timeout` (by the clock: the machine is busy), `memory` and `crash`
    `failure_score`.

    Args:
        gold: Column of the gold answers: an answer, a text with a boxed one, or GSM8K's `… #### 18`.
        answers: `boxed` or `any`, see above.
        time_limit: Seconds of processor time for one answer.
        wall_limit: Seconds by the clock for one answer; None: 5 × time_limit.
        memory_limit: Bytes of resident memory for a worker (SymPy alone takes 100 MB).
        workers: Worker processes; None: the processors of this rank, at most 8.
        failure_score: Score of an answer that was lost.
        failure_limit: Share of lost answers that ends the run; None: none does.
        name: Name in the logs.

    Raises:
        ValueError: `answers` is neither; a limit is not positive.
        DataError: (when called) no column `gold`.
        WorkerError: (when called) math-verify is not installed: `pip install 'fdiv[rewards]'`.
        RewardError: (when called) more than `failure_limit` of the answers are lost, or no gold can be parsed.
    """

    verdicts: ClassVar[Mapping[str, float | None]] = {
        "correct": 1.0, "wrong": 0.0, "no_answer": 0.0, "over_time": 0.0, "over_memory": 0.0,
        "unusable_gold": None,
    }  # fmt: skip
    own_limits: ClassVar[Mapping[str, str]] = {"timeout": "over_time", "memory": "over_memory", "crash": "wrong"}

    def __init__(
        self,
        gold: str = "solution",
        *,
        answers: Literal["boxed", "any"] = "boxed",
        time_limit: float = 10.0,
        wall_limit: float | None = None,
        memory_limit: int = 1 << 30,
        workers: int | None = None,
        failure_score: float | None = None,
        failure_limit: float | None = 0.05,
        name: str = "math",
    ) -> None:
        if answers not in ("boxed", "any"):
            raise ValueError(f"math reward: answers={answers!r} must be 'boxed' or 'any'")
        pool = WorkerPool(
            Path(__file__).with_name("verifier.py"), {"answers": answers}, workers=workers,
            time_limit=time_limit, wall_limit=wall_limit, memory_limit=memory_limit,
        )  # fmt: skip
        super().__init__(name, pool, failure_score=failure_score, failure_limit=failure_limit)
        self.gold = gold

    def items(
        self, prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[dict[str, Any] | str]:
        golds = self.column(self.gold, columns, len(completions))
        return [
            {"gold": gold_text(gold), "completion": completion, "opened": reasoning_open(prompt)}
            for gold, completion, prompt in zip(golds, completions, prompts, strict=True)
        ]

    @property
    def gold_columns(self) -> tuple[str, ...]:
        """Columns that no row may lack."""
        return (self.gold,)

    def gold_name(self, row: int, columns: Mapping[str, Sequence[Any]]) -> str:
        return str(columns[self.gold][row])


def gold_text(gold: Any) -> str:
    """A gold answer as text: the parts of a list joined by commas, whole floats without their point; "" where it is
    missing (None, NaN, an empty list, a part that is missing) or no answer at all (a mapping)."""
    if hasattr(gold, "tolist"):  # NumPy and torch
        gold = gold.tolist()
    if isinstance(gold, list | tuple):
        parts = [gold_text(part) for part in gold]
        return ", ".join(parts) if all(parts) else ""
    if isinstance(gold, float):
        if math.isnan(gold):
            return ""
        return str(int(gold)) if gold.is_integer() else repr(gold)
    if isinstance(gold, str | int | Decimal | Fraction):
        return str(gold).strip()
    return ""
