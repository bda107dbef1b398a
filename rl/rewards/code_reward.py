"""Python programs, verified by running their tests in a limited subprocess. Off unless asked for."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from fdiv.rl.rewards.completions import tested_names
from fdiv.rl.rewards.pooled_reward import PooledReward, reasoning_open
from fdiv.rl.rewards.worker_pool import WorkerPool

__all__ = ["CodeReward"]


class CodeReward(PooledReward):
    """1.0 where the completion's program passes its tests, else 0.0. It runs code that a model wrote: off by default.

    **This is not a security boundary.** The program runs with limits of time, memory, file size, open files and
    processes (no fork, no thread), in its own session and temporary folder, with an empty environment, and as `nobody`
    where the trainer is root. It can still read every file that its user may read, and write where that user may; use
    the network; attack the kernel; and cheat: an object equal to everything passes `assert f(x) == y`, and a program
    that looks for the token of its run in its own process finds it. For models or prompts that you do not trust, run
    the whole trainer in a container or virtual machine without network and secrets.

    Program and tests are the answer (`find_program`: its last block that defines what is tested, after the imports and
    helpers of the prompt and of its earlier blocks), the column `test` (text, or MBPP's list of asserts), and, where
    there is a column `entry_point`, the call `check(ENTRY_POINT)`: HumanEval's format. An answer that does not define
    ENTRY_POINT continues the prompt, if that is plain text. A run passes when it comes to its end and delivers a
    random token, which it is only then given; what it prints or its exit status does not matter.

    Verdicts: `correct` 1. 0 by definition: `wrong` (a failed test, an exception, an early exit, over its memory),
    `over_time` (as HumanEval counts it), `no_answer` (an empty or cut-off completion). `unusable_gold` None: no tests.
    `timeout`, `memory`, `crash` of the process that watches the program: `failure_score`.

    Args:
        allow_execution: True to allow running what the model wrote.
        test: Column of the tests.
        entry_point: Column of the name of the function; ignored where the dataset has none.
        time_limit: Seconds of wall time for one program, its interpreter's start included.
        memory_limit: Bytes of address space for one program.
        workers: Programs that run at a time; None: the processors of this rank, at most 8.
        failure_score: Score of an answer that was lost.
        failure_limit: Share of lost answers that ends the run; None: none does.
        name: Name in the logs.

    Raises:
        ValueError: `allow_execution` is not True; a limit is not positive; (when called) an entry point that is no
            name.
        DataError: (when called) no column `test`.
        WorkerError: (when called) not even a right program runs under the limits.
    """

    verdicts: ClassVar[Mapping[str, float | None]] = {
        "correct": 1.0, "wrong": 0.0, "over_time": 0.0, "no_answer": 0.0, "unusable_gold": None,
    }  # fmt: skip

    def __init__(
        self,
        *,
        allow_execution: bool = False,
        test: str = "test",
        entry_point: str = "entry_point",
        time_limit: float = 5.0,
        memory_limit: int = 512 << 20,
        workers: int | None = None,
        failure_score: float | None = None,
        failure_limit: float | None = 0.05,
        name: str = "code",
    ) -> None:
        if allow_execution is not True:
            raise ValueError(
                "code reward: it runs programs that a model wrote, and its limits are no security boundary (see "
                "CodeReward); where that is acceptable, say so with allow_execution: true"
            )
        if time_limit <= 0 or memory_limit <= 0:
            raise ValueError(f"code reward: time_limit={time_limit}, memory_limit={memory_limit} must be positive")
        pool = WorkerPool(
            Path(__file__).with_name("python_runner.py"), {"program_time": time_limit, "memory": memory_limit},
            workers=workers, time_limit=time_limit + 10,
            wall_limit=time_limit + 10, writes_files=True,
        )  # fmt: skip
        super().__init__(name, pool, failure_score=failure_score, failure_limit=failure_limit)
        self.test, self.entry_point = test, entry_point

    def items(
        self, prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[dict[str, Any] | str]:
        tests = self.column(self.test, columns, len(completions))
        names = [""] * len(completions)
        if self.entry_point in columns:
            names = self.column(self.entry_point, columns, len(completions))
        return [self._item(*row) for row in zip(prompts, completions, tests, names, strict=True)]

    def _item(self, prompt: Any, completion: str, test: Any, entry_point: str) -> dict[str, Any] | str:
        test = tests_text(test)
        if not test.strip():
            return "unusable_gold"
        if entry_point and not entry_point.isidentifier():
            raise ValueError(f"reward {self.__name__!r}: entry point {entry_point!r} is not the name of a function")
        call = f"\ncheck({entry_point})\n" if entry_point else "\n"
        return {
            "completion": completion, "prompt": prompt, "opened": reasoning_open(prompt),
            "names": [entry_point] if entry_point else _tested_names(test), "continues": bool(entry_point),
            "tests": f"{test}\n{call}",
        }  # fmt: skip

    def gold_name(self, row: int, columns: Mapping[str, Sequence[Any]]) -> str:
        return str(columns[self.test][row])


def tests_text(test: Any) -> str:
    """Tests as one text: a text, or a list of asserts (MBPP). "" where there are none."""
    if hasattr(test, "tolist"):
        test = test.tolist()
    if isinstance(test, list | tuple):
        return "\n".join(part for part in test if isinstance(part, str))
    return test if isinstance(test, str) else ""


@functools.lru_cache(maxsize=4096)
def _tested_names(test: str) -> list[str]:
    return sorted(tested_names(test))
