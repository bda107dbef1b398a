"""Python programs, verified by running their tests in a limited subprocess. Off unless asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from fdiv.rl.rewards.completions import extract_python
from fdiv.rl.rewards.pooled_reward import PooledReward
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

    Program and tests are the answer (`extract_python`), the column `test`, and, where there is a column `entry_point`,
    the call `check(ENTRY_POINT)`: HumanEval's format. An answer without `def ENTRY_POINT` continues the prompt, if
    that is plain text. A run passes when it comes to its end and delivers a random token, which it is only then
    given; what it prints or its exit status does not matter.

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

    def _item(self, prompt: Any, completion: str, test: str, entry_point: str) -> dict[str, str] | str:
        if not (test or "").strip():
            return "unusable_gold"
        if entry_point and not entry_point.isidentifier():
            raise ValueError(f"reward {self.__name__!r}: entry point {entry_point!r} is not the name of a function")
        program = extract_python(completion)
        if not program.strip():
            return "no_answer"
        defined = re.search(rf"^\s*(async\s+)?def\s+{re.escape(entry_point)}\b", program, re.MULTILINE)
        if entry_point and not defined and isinstance(prompt, str):
            program = prompt + program
        call = f"\ncheck({entry_point})\n" if entry_point else "\n"
        return {"program": f"{program}\n\n{test}\n{call}"}

    def gold_name(self, row: int, columns: Mapping[str, Sequence[Any]]) -> str:
        return str(columns[self.test][row])
