"""The scoring pass: is a completion correct? True, False, or None where it cannot be decided."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fdiv.catalog import REWARDS, build_reward
from fdiv.errors import DataError
from fdiv.eval.pass_at_k.data import EvalTask
from fdiv.inference.batches import run_batches
from fdiv.inference.cache import ItemCache
from fdiv.rl.rewards.math.extraction import final_answer
from fdiv.rl.rewards.math.reading import read
from fdiv.rl.rewards.pooled_reward import reasoning_open

__all__ = ["SCORERS", "Scorer", "boxed_answer", "make_scorer", "math_answer", "score_completions"]

SCORERS = REWARDS  # its name in release 0.1: there is one table of what scores a completion

Reward = Callable[..., Sequence[float | None]]


def exact_match(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the completion is the gold answer, surrounding white space apart."""
    return [float(text.strip() == gold.strip()) for text, gold in zip(completions, answer, strict=True)]


def _stripped(completion: str, *, opened: bool = False) -> str | None:
    return completion.strip() or None


def math_answer(completion: str, *, opened: bool = False) -> str | None:
    r"""The answer in a completion, found and read as the `math` scorer does, without white space; None: there is none.

    The vote of maj@n on mathematics: texts that are equal in this form are one answer (½ and 0.5 are two).

    Args:
        completion: the text.
        opened: the prompt has opened the reasoning.
    """
    found = final_answer(completion, plain=True, opened=opened)
    answer = None if found is None else read(found)
    return None if answer is None or answer.missing else answer.key or None


boxed_answer = math_answer  # its name in release 0.1


@dataclass(frozen=True)
class Scorer:
    """A reward function, and how a completion's answer is read for maj@n (None: no vote)."""

    name: str
    reward: Reward
    answer: Callable[..., str | None] | None

    def close(self) -> None:
        """End worker processes, where the reward has some."""
        close = getattr(self.reward, "close", None)
        if close is not None:
            close()


def make_scorer(
    name: str,
    *,
    databases: str | None = None,
    allow_code_execution: bool = False,
    sandbox: str | None = None,
    numpy: bool = False,
) -> Scorer:
    """The scorer of a name.

    Args:
        name: one of `fdiv.catalog.REWARDS`, or `module:function` with TRL's signature,
            `reward(prompts, completions, **columns) -> scores`; it gets `answer` and the file's own columns.
        databases: SQLite file, or folder with one per `database` of the tasks; for `sql`.
        allow_code_execution: must be True for `code`, which runs what the model wrote.
        sandbox: where `code` runs it, `bubblewrap` or `none`; None: bubblewrap.
        numpy: programs and tests of `code` may import numpy.
    Raises:
        DataError: an unknown name, one that needs further keys, no database, code execution not allowed, `sandbox` or
            `numpy` for another scorer, a sandbox that does not work here.
    """
    if name != "code" and (sandbox is not None or numpy):
        raise DataError(f"{'numpy' if numpy else 'sandbox'} goes with the scorer 'code', not with {name!r}")
    if name == "code" and not allow_code_execution:
        raise DataError(
            "scorer 'code' runs programs written by the model on this machine: read what CodeReward does and does not "
            "protect from, then pass --allow_code_execution (in a recipe: allow_code_execution: true)"
        )
    if name == "sql" and databases is None:
        raise DataError(
            "scorer 'sql' needs --databases: an SQLite file, or a folder with one per database of the tasks"
        )
    keys = {
        "math": {"gold": "answer", "answers": "any", "failure_limit": None},
        "sql": {"database": databases, "gold": "answer", "database_column": "database", "failure_limit": None},
        "code": {
            "allow_execution": True, "failure_limit": None, "numpy": numpy, "sandbox": sandbox or "bubblewrap",
        },
    }.get(name, {})  # fmt: skip
    try:
        reward = build_reward({"name": name, **keys}, "scorer")
    except ValueError as error:
        raise DataError(str(error)) from error
    return Scorer(name, reward, {"math": math_answer, "exact": _stripped}.get(name))


@dataclass(frozen=True)
class _Unit:
    """One completion to score, as the batched pass wants it."""

    key: str
    task: EvalTask
    completion: str
    group: str = ""
    rows: int = 1

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    @property
    def length(self) -> int:
        return 0


def score_completions(
    scorer: Scorer,
    samples: Mapping[str, tuple[EvalTask, str]],
    *,
    batch_size: int = 256,
    cache: ItemCache | None = None,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Score completions by key; call it on all processes.

    A completion is correct where its score is at least 1; None stays None, and anything but a number is refused.

    Returns:
        By key: `correct` (True, False or None), and `answer` where the scorer reads one.
    Raises:
        DataError: the reward gives another number of scores, or one that is no number.
    """

    def compute(batch: list[_Unit]) -> list[dict[str, Any]]:
        names = {name for unit in batch for name in unit.task.columns}
        columns = {name: [unit.task.columns.get(name) for unit in batch] for name in sorted(names)}
        scores = scorer.reward(
            prompts=[unit.task.prompt for unit in batch],
            completions=[unit.completion for unit in batch],
            answer=[unit.task.answer for unit in batch],
            **columns,
        )
        if len(scores) != len(batch):
            raise DataError(f"scorer {scorer.name!r} gave {len(scores)} scores for {len(batch)} completions")
        return [_verdict(scorer, unit, score) for unit, score in zip(batch, scores, strict=True)]

    units = [_Unit(key, task, text) for key, (task, text) in samples.items()]
    cache = ItemCache(None, "scores", "") if cache is None else cache
    return run_batches(units, compute, batch_size=batch_size, cache=cache, title="scoring", progress=progress)


def _verdict(scorer: Scorer, unit: _Unit, score: Any) -> dict[str, Any]:
    if score is not None:
        score = float(score)
        if score != score:
            raise DataError(f"scorer {scorer.name!r} gave NaN for task {unit.task.task_id!r}; None means not scored")
    found: dict[str, Any] = {"key": unit.key, "correct": None if score is None else score >= 1.0}
    return found | (
        {"answer": scorer.answer(unit.completion, opened=reasoning_open(unit.task.prompt))}
        if scorer.answer is not None
        else {}
    )
