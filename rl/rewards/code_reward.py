"""Python programs, verified in a sandbox by tests that run in another. Off unless asked for."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from fdiv.errors import DataError
from fdiv.rl.rewards.completions import tested_names
from fdiv.rl.rewards.pool import WorkerPool
from fdiv.rl.rewards.pooled_reward import PooledReward, reasoning_open
from fdiv.rl.rewards.sandbox import check_sandbox
from fdiv.rl.rewards.sandbox.interpreter import numpy_folders

__all__ = ["CodeReward"]


class CodeReward(PooledReward):
    """1.0 where the completion's program passes its tests, else 0.0. It runs code that a model wrote: off by default.

    The program is the answer (`find_program`: its last block that defines what is tested, after the imports and
    helpers of the prompt and of its earlier blocks). It runs in a sandbox: no file of this machine but the
    interpreter, no network, no other process, no environment, no right, limits of time, memory and files, and nothing
    of the answer before (`fdiv.rl.rewards.sandbox`). **What is left to attack is the kernel**: for models that you do
    not trust at all, run the whole trainer in a virtual machine. `sandbox="none"` leaves the limits and the
    filter of system calls: programs may read what the trainer's user may.

    The tests never enter the program's process. They run in a second sandbox, where each function of the program is a
    proxy: it sends the arguments, and rebuilds the result as built-in types, so that `==` is Python's own; an argument
    that the function changed is changed. Iterators and objects are proxies too; one never equals a value. An exception
    arrives as the nearest built-in class. What a function prints is printed to the tests' standard output.

    The column `test` holds the tests: Python code; a list of it (MBPP's lists of asserts); or inputs and outputs of a
    script (`{"inputs": […], "outputs": […]}`, also as JSON text, or a list of `{"input": …, "output": …}`), which is
    run once for each input and has to print the output, white space at the ends of lines aside. Names that the tests
    use and do not define are the program's. Where there is a column `entry_point`, `check(ENTRY_POINT)` is called:
    HumanEval's format; the prompt's imports and its finished functions, ENTRY_POINT aside, are then the tests' as
    well, whatever the program makes of them. An answer that does not define ENTRY_POINT continues the prompt, if that
    is plain text.

    Verdicts: `correct` 1. 0 by definition: `wrong` (a failed test, an exception, an early exit, over its memory),
    `over_time` (as HumanEval counts it), `no_answer` (an empty or cut-off completion). `unusable_gold` None: no tests,
    or tests that do not compile, call nothing of the program, cannot import what they need, or run into the limits of
    time or memory before they call it. `crash`: the program's process ended by a signal that
    this class did not send; `timeout`, `memory`, `crash` of the process that watches the program: `failure_score`.

    Args:
        allow_execution: True to allow running what the model wrote.
        sandbox: `bubblewrap`, or `none`.
        numpy: Programs and tests may import numpy, the one of this environment, read-only; False: the standard library
            alone. Arrays and their scalars cross between the two as values.
        test: Column of the tests.
        entry_point: Column of the name of the function; ignored where the dataset has none.
        setup: Column of code, or a list of it, that runs before the tests and in their process; ignored where the
            dataset has none.
        time_limit: Seconds of wall time for one answer, its tests and the start of its sandbox included.
        memory_limit: Bytes of address space for one program.
        workers: Programs that run at a time; None: the processors of this rank, at most 8.
        failure_score: Score of an answer that was lost.
        failure_limit: Share of lost answers that ends the run; None: none does.
        name: Name in the logs.

    Raises:
        ValueError: `allow_execution` is not True; a limit is not positive; (when called) an entry point that is no
            name.
        SandboxError: bubblewrap is not installed, or does not work on this machine; `numpy`, and it is not installed.
        DataError: (when called) no column `test`, or tests of another form.
        WorkerError: (when called) not even a right program runs under the limits.
    """

    verdicts: ClassVar[Mapping[str, float | None]] = {
        "correct": 1.0, "wrong": 0.0, "over_time": 0.0, "no_answer": 0.0, "unusable_gold": None,
    }  # fmt: skip

    def __init__(
        self,
        *,
        allow_execution: bool = False,
        sandbox: str = "bubblewrap",
        numpy: bool = False,
        test: str = "test",
        entry_point: str = "entry_point",
        setup: str = "setup",
        time_limit: float = 5.0,
        memory_limit: int = 512 << 20,
        workers: int | None = None,
        failure_score: float | None = None,
        failure_limit: float | None = 0.05,
        name: str = "code",
    ) -> None:
        if allow_execution is not True:
            raise ValueError(
                "code reward: it runs programs that a model wrote, and its sandbox shares this machine's kernel (see "
                "CodeReward); where that is acceptable, say so with allow_execution: true"
            )
        if not (time_limit > 0 and memory_limit > 0):
            raise ValueError(f"code reward: time_limit={time_limit}, memory_limit={memory_limit} must be positive")
        check_sandbox(sandbox)
        if numpy:
            numpy_folders()
        pool = WorkerPool(
            Path(__file__).with_name("sandbox") / "judge.py",
            {"sandbox": sandbox, "numpy": bool(numpy), "program_time": time_limit, "memory": memory_limit},
            workers=workers, time_limit=2 * time_limit + 10, wall_limit=2 * time_limit + 10, writes_files=True,
        )  # fmt: skip
        super().__init__(name, pool, failure_score=failure_score, failure_limit=failure_limit)
        self.test, self.entry_point, self.setup = test, entry_point, setup

    def items(
        self, prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[dict[str, Any] | str]:
        tests = self.column(self.test, columns, len(completions))
        names, setups = (
            self.column(name, columns, len(completions)) if name in columns else [""] * len(completions)
            for name in (self.entry_point, self.setup)
        )
        return [self._item(*row) for row in zip(prompts, completions, tests, names, setups, strict=True)]

    def _item(self, prompt: Any, completion: str, test: Any, entry_point: str, setup: Any) -> dict[str, Any] | str:
        tests = self._tests(test)
        if not tests:
            return "unusable_gold"
        if entry_point and not entry_point.isidentifier():
            raise ValueError(f"reward {self.__name__!r}: entry point {entry_point!r} is not the name of a function")
        item = {"completion": completion, "prompt": prompt, "opened": reasoning_open(prompt)}
        if isinstance(tests, list):
            return {**item, "names": [], "continues": False, "cases": tests}
        setup = _joined(setup)
        return {
            **item, "names": [entry_point] if entry_point else _tested_names(f"{setup}\n{tests}"),
            "continues": bool(entry_point), "tests": tests, "setup": setup, "entry_point": entry_point or "",
        }  # fmt: skip

    def _tests(self, test: Any) -> str | list[tuple[str, str]]:
        """Tests as code, or as pairs of input and output; empty where there are none."""
        if hasattr(test, "tolist"):
            test = test.tolist()
        if isinstance(test, str) and test.lstrip().startswith("{"):
            with contextlib.suppress(ValueError):
                test = json.loads(test)
        if test is None or isinstance(test, str):
            return (test or "").strip()
        pairs = None
        if isinstance(test, Mapping):
            if {"inputs", "outputs"} <= test.keys() and len(test["inputs"]) == len(test["outputs"]):
                pairs = zip(test["inputs"], test["outputs"], strict=True)
        elif isinstance(test, list | tuple):
            if all(isinstance(part, str) for part in test):
                return _joined(test).strip()
            if all(isinstance(case, Mapping) and {"input", "output"} <= case.keys() for case in test):
                pairs = ((case["input"], case["output"]) for case in test)
        if pairs is not None:
            return [(_joined(given), _joined(printed)) for given, printed in pairs]
        raise DataError(
            f"reward {self.__name__!r}: column {self.test!r} must hold Python code, a list of it, or a script's input "
            "and output ({'inputs': [...], 'outputs': [...]} or [{'input': ..., 'output': ...}]), got "
            f"{str(test)[:80]!r}"
        )

    @property
    def gold_columns(self) -> tuple[str, ...]:
        """Columns that no row may lack."""
        return (self.test,)

    def gold_name(self, row: int, columns: Mapping[str, Sequence[Any]]) -> str:
        return str(columns[self.test][row])


def _joined(text: str | Sequence[str] | None) -> str:
    return text if isinstance(text, str) else "\n".join(text or ())


@functools.lru_cache(maxsize=4096)
def _tested_names(test: str) -> list[str]:
    return sorted(tested_names(test))
