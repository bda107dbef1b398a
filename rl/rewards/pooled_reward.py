"""What the rewards of this package share: TRL's signature, a worker pool, a score per verdict, and the counts."""

from __future__ import annotations

import json
import logging
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fdiv.errors import DataError, RewardError
from fdiv.inference.prompting import completion_text
from fdiv.rl.rewards.pool import Outcome, WorkerPool

__all__ = ["PooledReward", "reasoning_open"]

log = logging.getLogger(__name__)

LOST = ("timeout", "memory", "crash")
WINDOW = 1000  # answers over which the share of lost ones is taken
ENOUGH = 200  # answers before that share means anything
ALL_UNUSABLE = 64  # golds, all of them unusable, after which the wrong column is the likely reason
NAMED_GOLDS = 100


class PooledReward:
    """A reward function of TRL whose verdicts come from killable worker processes.

    `reward(prompts, completions, **columns)` returns one score per completion: 1.0, 0.0, or None where there is no
    verdict. TRL reads None as "not scored": the row has no part in the group's mean and brings no gradient.

    A subclass gives `verdicts`, the score of each verdict, and `items`; and, where an answer that runs into its own
    limits is wrong, the verdicts for that (`own_limits`).

    Args:
        name: Name in TRL's logs.
        pool: The workers.
        failure_score: Score of an answer that was lost (time, memory, a crash). None, or a number of your own choice.
        failure_limit: Share of lost answers among the last 1,000 (from the 200th on) above which `RewardError` is
            raised; None: never.

    Raises:
        ValueError: `failure_limit` is not in [0, 1].
    """

    verdicts: ClassVar[Mapping[str, float | None]] = {}
    own_limits: ClassVar[Mapping[str, str]] = {}
    """The verdict on an answer that used up its own time or memory, or that the worker failed on (`crash`: nested too
    deeply, for instance), by the outcome's status."""

    def __init__(
        self, name: str, pool: WorkerPool, *, failure_score: float | None = None, failure_limit: float | None = 0.05
    ) -> None:
        if failure_limit is not None and not 0.0 <= failure_limit <= 1.0:
            raise ValueError(f"{name}: failure_limit={failure_limit} must be a share in [0, 1], or None")
        self.__name__, self.pool = name, pool
        self.failure_score, self.failure_limit = failure_score, failure_limit
        self.counts: Counter[str] = Counter()
        self.unusable_golds: dict[str, str] = {}
        self._recent: deque[bool] = deque(maxlen=WINDOW)
        self._gold_reasons: dict[str, str] = {}

    def items(
        self, prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[dict[str, Any] | str]:
        """For each completion what the worker is sent, or a verdict that needs no worker."""
        raise NotImplementedError

    def gold_name(self, row: int, columns: Mapping[str, Sequence[Any]]) -> str:
        """How the gold of a row is named in messages."""
        raise NotImplementedError

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        texts = [completion_text(completion) for completion in completions]
        items = self.items(prompts, texts, columns)
        sent = [row for row, item in enumerate(items) if not isinstance(item, str)]
        outcomes = dict(zip(sent, self.pool.map([items[row] for row in sent]), strict=True))
        outcomes |= self._blamed({row: items[row] for row in sent}, outcomes)
        scores: list[float | None] = []
        for row, item in enumerate(items):
            if row not in outcomes:
                verdict = item
            elif outcomes[row].status == "ok":
                verdict = outcomes[row].value["verdict"]
                if verdict == "unusable_gold":
                    self._name_gold(self.gold_name(row, columns), outcomes[row].value["detail"])
            else:
                verdict = outcomes[row].status
                log.warning("%s: answer %d not scored (%s: %s)", self.__name__, row, verdict, outcomes[row].detail)
            self.counts[verdict] += 1
            self._recent.append(verdict in LOST)
            scores.append(self.failure_score if verdict in LOST else self.verdicts[verdict])
        if columns.get("log_metric") is not None and scores:
            columns["log_metric"](f"{self.__name__}/not_scored", sum(score is None for score in scores) / len(scores))
        self._check_losses()
        return scores

    def _blamed(self, items: Mapping[int, dict[str, Any]], outcomes: Mapping[int, Outcome]) -> dict[int, Outcome]:
        """New outcomes for the items that ran into a limit or lost their worker.

        What is no item's own doing (the clock on a busy machine, a worker that was killed) is tried once more. Of what
        used up its own time or memory, made the worker raise, or failed by the clock twice, the gold alone is tried:
        where it passes, the answer is to blame; where it does not, the gold is unusable.
        """
        if not self.own_limits:
            return {}
        again = [row for row, outcome in outcomes.items() if outcome.status in LOST and not outcome.own]
        found = dict(zip(again, self.pool.map([items[row] for row in again]), strict=True))
        suspects = {
            row: {**items[row], "completion": None}
            for row, outcome in (outcomes | found).items()
            if outcome.status in self.own_limits and (outcome.own or (row in found and outcome.status != "crash"))
        }
        keys = {row: json.dumps(item, sort_keys=True) for row, item in suspects.items()}
        unknown = {key: suspects[row] for row, key in keys.items() if key not in self._gold_reasons}
        for key, outcome in zip(unknown, self.pool.map(list(unknown.values())), strict=True):
            value = outcome.value or {}
            unusable = value.get("verdict") == "unusable_gold"
            if outcome.status == "ok" or outcome.own:
                self._gold_reasons[key] = value["detail"] if unusable else outcome.detail
        for row, key in keys.items():
            if (reason := self._gold_reasons.get(key)) is None:  # the gold, too, failed by the clock: nothing is known
                continue
            verdict = "unusable_gold" if reason else self.own_limits[(found.get(row) or outcomes[row]).status]
            found[row] = Outcome("ok", {"verdict": verdict, "detail": reason})
        return found

    def summary(self) -> dict[str, int]:
        """Counts since the beginning: `answers`, `scored`, each verdict, `timeout`, `memory`, `crash`, `restarts`."""
        table = {**self.verdicts, **dict.fromkeys(LOST, self.failure_score)}
        return {
            "answers": self.counts.total(),
            "scored": sum(self.counts[verdict] for verdict, score in table.items() if score is not None),
            **{verdict: self.counts[verdict] for verdict in table},
            "restarts": self.pool.restarts,
        }

    def close(self) -> None:
        """End the worker processes; the next call starts new ones."""
        self.pool.close()

    def column(self, name: str, columns: Mapping[str, Any], rows: int) -> Sequence[Any]:
        """A column of the dataset, as TRL hands it over.

        Raises:
            DataError: it is not there, or has another length than the completions.
        """
        if name not in columns:
            there = ", ".join(sorted(key for key, value in columns.items() if isinstance(value, list | tuple)))
            raise DataError(f"reward {self.__name__!r}: the dataset has no column {name!r}; it has: {there or 'none'}")
        if len(columns[name]) != rows:
            raise DataError(
                f"reward {self.__name__!r}: {len(columns[name])} values of {name!r} for {rows} completions"
            )
        return columns[name]

    def _name_gold(self, gold: str, reason: str) -> None:
        if gold in self.unusable_golds or len(self.unusable_golds) >= NAMED_GOLDS:
            return
        self.unusable_golds[gold] = reason
        log.warning("%s: gold answer %r is unusable, its rows are not scored: %s", self.__name__, gold[:200], reason)

    def _check_losses(self) -> None:
        unusable = self.counts["unusable_gold"]
        if unusable >= ALL_UNUSABLE and unusable == self.counts.total():
            gold, reason = next(iter(self.unusable_golds.items()))
            raise RewardError(
                f"reward {self.__name__!r}: all {unusable} gold answers so far are unusable, the first being "
                f"{gold[:80]!r} ({reason}); is it the right column?"
            )
        lost = sum(self._recent)
        if self.failure_limit is not None and len(self._recent) >= ENOUGH:
            if lost > self.failure_limit * len(self._recent):
                counts = ", ".join(f"{verdict} {self.counts[verdict]}" for verdict in LOST)
                raise RewardError(
                    f"reward {self.__name__!r}: {lost} of the last {len(self._recent)} answers could not be scored "
                    f"({counts}), more than failure_limit={self.failure_limit}; raise the limits of time or memory, "
                    "or failure_limit"
                )


def reasoning_open(prompt: Any) -> bool:
    """Whether a prompt ends in an open `<think>`, so that a completion begins inside the reasoning."""
    if not isinstance(prompt, str):
        prompt = str(prompt[-1].get("content") or "") if prompt and prompt[-1].get("role") == "assistant" else ""
    return prompt.rstrip().endswith(("<think>", "<thinking>", "<reasoning>", "[THINK]"))
