"""SQL, verified by execution on a read-only SQLite database in killable workers."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from fdiv.errors import DataError
from fdiv.files import home_path
from fdiv.rl.rewards.pool import WorkerPool
from fdiv.rl.rewards.pooled_reward import PooledReward, reasoning_open

__all__ = ["SQLReward"]

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class SQLReward(PooledReward):
    """1.0 where the completion's query gives the gold query's rows, 0.0 where it does not, None where it is unknown.

    The query is found by `extract_sql`, in the worker. Rows are compared as multisets: how often a row comes counts,
    the order of rows does not (see `ordered`), columns count by position and not by name, whole numbers exactly, other
    numbers within `tolerance`, text exactly and never as a number. A gold of several statements (`a; b; c`) accepts
    the rows of any of them.

    A query may SELECT (WITH and recursion included) from the tables and views of its own database and call a list of
    deterministic functions; everything else is refused: writes, ATTACH, PRAGMA and its table-valued forms, the
    `sqlite_` tables, extensions, `random()`, a second statement, texts and blobs beyond 1 MB. The database is opened
    read-only and immutable, in a worker with limits of time and memory.

    Verdicts: `correct` 1. 0 by definition: `wrong`, `no_answer` (an empty or cut-off completion), `invalid` (SQLite
    refuses it), `denied` (the guard does), `reads_no_table` (the gold reads tables and the answer none: a written-out
    result), `wrong_on_half` (see `check_on_halves`), `over_time` and `over_memory` (it ran into its own limit). None:
    `unusable_gold`: it fails, runs into a limit, has more than `max_rows` rows, or none at all, which any query that
    finds nothing would match. `timeout` (by the clock: the machine is busy), `memory`, `crash`: `failure_score`.

    Args:
        database: An SQLite file; or a folder with `NAME.sqlite`, `NAME.db`, or `NAME/NAME.sqlite` (Spider, BIRD), one
            of them per row of the dataset.
        gold: Column of the gold queries.
        database_column: Column of the names, where `database` is a folder.
        ordered: `never`: rows are a multiset; `gold`: where the gold query has an outermost ORDER BY, their order
            counts. Ties have no order: rows that tie under `gold` can be judged wrong.
        check_on_halves: Compare also on two copies of the database in memory, with the even or the odd rows of every
            table alone. A result that is written out (`SELECT 42 FROM t LIMIT 1`) fails there; so does a query that is
            right only by coincidence. None: where the copies fit into a quarter of `memory_limit`; databases that are
            too large are named in the log.
        tolerance: Relative tolerance of numbers that are not whole.
        max_rows: Most rows of a gold query.
        time_limit: Seconds of processor time for one query, by SQLite's progress handler. The worker is killed after
            8 · time_limit + 1 of them (without halves 4 · time_limit + 1), or five times that by the clock, with one
            answer.
        memory_limit: Bytes of resident memory for a worker; half of it is SQLite's heap limit.
        workers: Worker processes; None: the processors of this rank, at most 8.
        failure_score: Score of an answer that was lost.
        failure_limit: Share of lost answers that ends the run; None: none does.
        name: Name in the logs.

    Raises:
        DataError: no such database; (when called) no such column, or a name without a database.
        ValueError: `ordered` is neither; a limit is not positive.
        RewardError: (when called) more than `failure_limit` of the answers are lost, or no gold can be used.
    """

    verdicts: ClassVar[Mapping[str, float | None]] = {
        "correct": 1.0, "wrong": 0.0, "no_answer": 0.0, "invalid": 0.0, "denied": 0.0, "reads_no_table": 0.0,
        "wrong_on_half": 0.0, "over_time": 0.0, "over_memory": 0.0, "unusable_gold": None,
    }  # fmt: skip

    own_limits: ClassVar[Mapping[str, str]] = {"timeout": "over_time", "memory": "over_memory", "crash": "wrong"}

    def __init__(
        self,
        database: str | Path,
        gold: str = "query",
        *,
        database_column: str = "db_id",
        ordered: Literal["never", "gold"] = "never",
        check_on_halves: bool | None = None,
        tolerance: float = 1e-6,
        max_rows: int = 10_000,
        time_limit: float = 5.0,
        memory_limit: int = 256 << 20,
        workers: int | None = None,
        failure_score: float | None = None,
        failure_limit: float | None = 0.05,
        name: str = "sql",
    ) -> None:
        if ordered not in ("never", "gold"):
            raise ValueError(f"sql reward: ordered={ordered!r} must be 'never' or 'gold'")
        for key, value in (("time_limit", time_limit), ("max_rows", max_rows)):
            if not value > 0:
                raise ValueError(f"sql reward: {key}={value} must be positive")
        self.database = home_path(database)
        if not self.database.exists():
            raise DataError(f"sql reward: database {self.database}: no such file or folder")
        settings = {
            "query_time": time_limit, "heap": memory_limit // 2, "max_rows": max_rows, "ordered": ordered,
            "tolerance": tolerance,
        }  # fmt: skip
        pool = WorkerPool(
            Path(__file__).with_name("executor.py"), settings, workers=workers,
            time_limit=(4 if check_on_halves is False else 8) * time_limit + 1, memory_limit=memory_limit,
        )  # fmt: skip
        super().__init__(name, pool, failure_score=failure_score, failure_limit=failure_limit)
        self.gold, self.database_column = gold, database_column
        self.check_on_halves, self.memory_limit = check_on_halves, memory_limit
        self._halves: dict[Path, bool] = {}

    def items(
        self, prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[dict[str, Any] | str]:
        golds = self.column(self.gold, columns, len(completions))
        if self.database.is_file():
            paths = [self.database] * len(completions)
        else:
            paths = [self._path(name) for name in self.column(self.database_column, columns, len(completions))]
        return [
            {
                "database": str(path.resolve()),
                "gold": gold if isinstance(gold, str) else "",
                "completion": completion,
                "halves": self._on_halves(path),
                "opened": reasoning_open(prompt),
            }
            for path, gold, completion, prompt in zip(paths, golds, completions, prompts, strict=True)
        ]

    def _on_halves(self, path: Path) -> bool:
        """Whether the two copies of a database fit.

        Raises:
            ValueError: they do not, and `check_on_halves` is True.
        """
        if self.check_on_halves is False:
            return False
        if path not in self._halves:
            size = 2 * path.stat().st_size
            self._halves[path] = size <= self.memory_limit // 4
            if not self._halves[path]:
                reason = (
                    f"two copies of {path.name} in memory take {size >> 20} MiB, more than a quarter of "
                    f"memory_limit={self.memory_limit >> 20} MiB"
                )
                if self.check_on_halves:
                    raise ValueError(f"{self.__name__}: check_on_halves: {reason}; raise memory_limit")
                log.warning("%s: answers are not checked on halves: %s", self.__name__, reason)
        return self._halves[path]

    def _path(self, name: str) -> Path:
        # A name is data: it must not lead out of the folder.
        if not NAME.fullmatch(str(name)):
            raise DataError(f"sql reward: {name!r} in column {self.database_column!r} is no name of a database")
        for path in (f"{name}.sqlite", f"{name}.db", f"{name}/{name}.sqlite"):
            if (self.database / path).is_file():
                return self.database / path
        raise DataError(f"sql reward: no {name}.sqlite, {name}.db or {name}/{name}.sqlite in {self.database}")

    @property
    def gold_columns(self) -> tuple[str, ...]:
        """Columns that no row may lack."""
        return (self.gold,) if self.database.is_file() else (self.gold, self.database_column)

    def gold_name(self, row: int, columns: Mapping[str, Sequence[Any]]) -> str:
        return str(columns[self.gold][row])
