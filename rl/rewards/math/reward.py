"""Mathematics, verified by math-verify in killable workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from fdiv.rl.rewards.pooled_reward import PooledReward
from fdiv.rl.rewards.worker_pool import WorkerPool

__all__ = ["MathReward"]


class MathReward(PooledReward):
    r"""1.0 where the completion's answer equals the gold answer, 0.0 where it does not, None where nobody knows.

    The answer is the last `\boxed{…}`, or LaTeX after words like "the final answer is" (as in TRL's
    `accuracy_reward`); with `answers: any` also the number after `####` or, failing that, the last number or formula.
    Equality is `math_verify.verify(gold, answer)`, which is not symmetric.

    Verdicts: `correct` 1; `wrong` 0; `no_answer` 0, by definition: an empty completion, or one cut off before its
    answer; `unusable_gold` None: the gold cannot be parsed (see `unusable_golds`); `timeout`, `memory` and `crash`
    `failure_score`. An expression that math-verify gives up on, without hanging or crashing, is wrong.

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
        "correct": 1.0, "wrong": 0.0, "no_answer": 0.0, "unusable_gold": None,
    }  # fmt: skip

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
            {"gold": "" if gold is None else str(gold), "completion": completion}
            for gold, completion in zip(golds, completions, strict=True)
        ]

    def gold_name(self, row: int, columns: Mapping[str, Sequence[Any]]) -> str:
        return str(columns[self.gold][row])
