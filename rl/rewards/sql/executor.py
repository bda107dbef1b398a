"""The worker side of `SQLReward`: run a gold query and an answer on a read-only SQLite database and compare the rows.

Loaded by path in a worker process of a `WorkerPool`. In the process: a read-only immutable database, `query_only`, an
authorizer, SQLite's own limits, a heap limit and a progress handler. The handler does not run inside one opcode, so
the pool's limits of time and memory stand behind all of it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import runpy
import sqlite3
import time
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["Guard", "answer", "ordered_at_top", "prepare", "same_rows", "statements"]

EXACT = 1e-12
"""Relative tolerance where a whole number takes part: integers are exact, a whole float is off by rounding alone."""

LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 1_000_000,  # bytes of one text, blob or row
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 20_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 200,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 200,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 50,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 100_000,
    sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 32,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1_000,
    sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER: 0,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
FUNCTIONS = frozenset(
    """
    abs avg ceil ceiling char coalesce concat concat_ws count cume_dist date datetime degrees dense_rank exp
    first_value floor format glob group_concat hex ifnull iif instr json json_array json_array_length json_extract
    json_group_array json_group_object json_object json_type json_valid julianday lag last_value lead length like
    likelihood likely ln log log10 log2 lower ltrim max min mod nth_value ntile nullif octet_length percent_rank pi
    pow power printf quote radians rank replace round row_number rtrim sign sqrt string_agg strftime substr substring
    sum time timediff total trim trunc typeof unhex unicode unixepoch unlikely upper acos acosh asin asinh atan atan2
    atanh cos cosh sin sinh soundex tan tanh -> ->>
    """.split()
)
"""What a query may call: deterministic functions of its arguments (`date('now')` apart). No random, no extensions."""

# By path: importing it as part of the package would bring the whole package into the worker.
extract_sql = runpy.run_path(str(Path(__file__).parent.with_name("completions.py")))["extract_sql"]

_settings: dict[str, Any] = {}


def prepare(settings: dict[str, Any]) -> None:
    """Set SQLite's heap limit for the process (and, by inheritance, for the workers forked from it)."""
    _settings.update(settings)
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.execute(f"PRAGMA hard_heap_limit={int(settings['heap'])}")


class Guard:
    """What a query may do, and what it did: the tables it read, what was denied, whether it ran out of time."""

    def __init__(self, tables: frozenset[str], deadline: float) -> None:
        self.tables, self.deadline = tables, deadline
        self.read: set[str] = set()
        self.denied = ""
        self.expired = False

    def authorize(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        """SELECT, recursion, listed functions, and the tables of the database; the schema's own tables are not."""
        if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE):
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_FUNCTION and second.lower() in FUNCTIONS:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_READ:
            table = first.lower()
            if table in self.tables:
                self.read.add(table)
                return sqlite3.SQLITE_OK
            # No column: `SELECT count(*) FROM x`, where x may be a common table expression.
            if not second and table not in _modules() and not table.startswith(("sqlite_", "pragma_")):
                return sqlite3.SQLITE_OK
        self.denied = self.denied or f"action {action} on {second or first}"
        return sqlite3.SQLITE_DENY

    def interrupt(self) -> bool:
        """True once the time is over."""
        self.expired = time.process_time() > self.deadline
        return self.expired


@functools.cache
def _modules() -> frozenset[str]:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        return frozenset(name.lower() for (name,) in connection.execute("PRAGMA module_list"))


def _connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{Path(path).resolve().as_uri()}?mode=ro&immutable=1", uri=True)
    connection.execute("PRAGMA trusted_schema=OFF")
    connection.execute("PRAGMA temp_store=MEMORY")
    connection.execute("PRAGMA query_only=ON")
    return connection


def _tables(connection: sqlite3.Connection) -> frozenset[str]:
    query = "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
    return frozenset(name.lower() for (name,) in connection.execute(query))


def run(connection: sqlite3.Connection, query: str, most: int) -> tuple[list[tuple], Guard]:
    """At most `most` rows of `query`, under a guard.

    Raises:
        sqlite3.Error: what SQLite says about the query; `TimeoutError`: out of time; `MemoryError`: out of heap.
    """
    guard = Guard(_tables(connection), time.process_time() + _settings["query_time"])
    for limit, value in LIMITS.items():
        connection.setlimit(limit, value)
    connection.set_authorizer(guard.authorize)
    connection.set_progress_handler(guard.interrupt, 1000)
    try:
        cursor = connection.execute(query)
        rows = cursor.fetchmany(most)
        cursor.close()
    except sqlite3.Error as error:
        if guard.expired:
            raise TimeoutError(f"more than {_settings['query_time']} s of processor time") from error
        if guard.denied:
            raise PermissionError(guard.denied) from error
        raise
    finally:
        connection.set_progress_handler(None, 0)
        connection.set_authorizer(None)
    return rows, guard


def statements(script: str) -> list[str]:
    """The statements of a script, split at the semicolons that end them."""
    parts, start = [], 0
    for position, character in enumerate(script):
        if character == ";" and sqlite3.complete_statement(script[start : position + 1]):
            parts.append(script[start:position].strip())
            start = position + 1
    parts.append(script[start:].strip())
    return [part for part in parts if part]


def ordered_at_top(query: str) -> bool:
    """Whether the outermost SELECT has an ORDER BY."""
    bare = re.sub(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/", " ", query, flags=re.S)
    while (flat := re.sub(r"\([^()]*\)", " ", bare)) != bare:
        bare = flat
    return re.search(r"\border\s+by\b", bare, re.IGNORECASE) is not None


def _close(first: Any, second: Any, tolerance: float) -> bool:
    """Equality of two values: whole numbers (keys, counts, sums of integers) exactly, others within the tolerance."""
    if isinstance(first, int) and isinstance(second, int):
        return first == second
    if isinstance(first, int | float) and isinstance(second, int | float):
        both_whole = float(first).is_integer() and float(second).is_integer()
        if both_whole or isinstance(first, int) or isinstance(second, int):
            tolerance = min(tolerance, EXACT)
        return first == second or math.isclose(first, second, rel_tol=tolerance, abs_tol=tolerance * 1e-3)
    return type(first) is type(second) and first == second


def _rows_close(first: Sequence[Any], second: Sequence[Any], tolerance: float) -> bool:
    return len(first) == len(second) and all(_close(a, b, tolerance) for a, b in zip(first, second, strict=True))


def _matched(sides: list[tuple[int, tuple]], columns: Sequence[int], tolerance: float) -> bool:
    """Whether gold rows (side 0) and answer rows (side 1), which differ in these columns of numbers alone, pair up.

    Rows are sorted and cut wherever two neighbours are not close; each piece goes on to the next column. Sorting whole
    rows instead would let numbers that are equal but for rounding drag the rest of their row out of place.
    """
    if not columns:
        return 2 * sum(side for side, _ in sides) == len(sides)
    sides = sorted(sides, key=lambda entry: entry[1][columns[0]])
    start = 0
    for end in range(1, len(sides) + 1):
        if end == len(sides) or not _close(sides[end - 1][1][columns[0]], sides[end][1][columns[0]], tolerance):
            if not _matched(sides[start:end], columns[1:], tolerance):
                return False
            start = end
    return True


def same_rows(golds: list[tuple], answers: list[tuple], tolerance: float, *, ordered: bool = False) -> bool:
    """Whether two results hold the same rows, each as often; in the same order where `ordered`.

    Columns count by position. Numbers are close within the relative tolerance, integer or not; text, blobs and NULL
    are equal or not, and a text is no number. Numbers that a chain of close ones links count as close.
    """
    if len(golds) != len(answers):
        return False
    if ordered:
        return all(_rows_close(gold, answer, tolerance) for gold, answer in zip(golds, answers, strict=True))
    groups: defaultdict[tuple, list[tuple[int, tuple]]] = defaultdict(list)
    for side, rows in enumerate((golds, answers)):
        for row in rows:  # numbers meet in one group, whatever their type
            key = tuple("number" if isinstance(value, int | float) else (type(value), value) for value in row)
            groups[key].append((side, row))
    return all(
        _matched(entries, [column for column, kind in enumerate(key) if kind == "number"], tolerance)
        for key, entries in groups.items()
    )


_copies: OrderedDict[tuple[str, int], tuple[int, tuple[sqlite3.Connection, ...]]] = OrderedDict()


def _halves(path: Path) -> tuple[sqlite3.Connection, ...]:
    """Two copies of the database in memory, each with half of the rows of every table (even, odd rowids).

    The copies made last are kept, as many as fit into half of the heap.
    """
    key = (str(path), path.stat().st_mtime_ns)
    if key in _copies:
        _copies.move_to_end(key)
        return _copies[key][1]
    size = 2 * path.stat().st_size
    while _copies and size + sum(kept for kept, _ in _copies.values()) > _settings["heap"] // 2:
        for copy in _copies.popitem(last=False)[1][1]:
            copy.close()
    copies = tuple(_half(path, parity) for parity in (0, 1))
    _copies[key] = (size, copies)
    return copies


def _half(path: Path, parity: int) -> sqlite3.Connection:
    copy = sqlite3.connect(":memory:", isolation_level=None)
    with contextlib.closing(_connect(str(path))) as source:
        source.backup(copy)
    copy.execute("BEGIN")
    for (trigger,) in copy.execute("SELECT name FROM sqlite_master WHERE type='trigger'").fetchall():
        copy.execute(f"DROP TRIGGER {_quoted(trigger)}")  # it may refuse that rows go
    for (table,) in copy.execute("SELECT name FROM sqlite_master WHERE type='table'").fetchall():
        if not table.lower().startswith("sqlite_"):
            with contextlib.suppress(sqlite3.Error):  # a virtual table: it stays whole
                _delete_half(copy, table, parity)
    copy.execute("COMMIT")
    copy.execute("PRAGMA query_only=ON")
    return copy


def _delete_half(copy: sqlite3.Connection, table: str, parity: int) -> None:
    """Delete the rows of even or odd rowids; of a table without them, those of even or odd places by primary key."""
    columns = copy.execute(f"PRAGMA table_info({_quoted(table)})").fetchall()
    key = ", ".join(_quoted(name) for _, name, _, _, _, place in columns if place)
    try:
        copy.execute(f"DELETE FROM {_quoted(table)} WHERE rowid % 2 = {parity}")
    except sqlite3.OperationalError:  # WITHOUT ROWID
        numbered = f"SELECT {key}, row_number() OVER (ORDER BY {key}) AS place FROM {_quoted(table)}"
        half = f"SELECT {key} FROM ({numbered}) WHERE place % 2 = {parity}"
        copy.execute(f"DELETE FROM {_quoted(table)} WHERE ({key}) IN ({half})")


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def reads_a_table(connection: sqlite3.Connection, query: str, guard: Guard) -> bool:
    """Whether a query that ran under `guard` opens a table or an index of the database.

    The authorizer sees names alone, so a common table expression called like a table looks like it; the program that
    SQLite compiles does not open anything for that.
    """
    if not guard.read:
        return False
    try:
        program = connection.execute(f"EXPLAIN {query}").fetchall()
    except (
        sqlite3.Error,
        sqlite3.Warning,
    ):  # the query is an EXPLAIN: the guard's word is what there is
        return True
    return any(row[1] == "VOpen" or (row[1] == "OpenRead" and row[4] == 0) for row in program)


def _compare(connection: sqlite3.Connection, gold: str, query: str, *, half: bool) -> str:
    """The verdict of one gold query on one database; the gold's own faults raise `LookupError`."""
    try:
        rows, by_gold = run(connection, gold, _settings["max_rows"] + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError, PermissionError, TimeoutError) as error:
        raise LookupError(f"{type(error).__name__}: {error}") from error
    if len(rows) > _settings["max_rows"]:
        raise LookupError(f"more than max_rows={_settings['max_rows']} rows")
    if not rows and not half:
        raise LookupError("no rows: every answer without rows would match")
    try:
        # One row more than the gold is enough to know.
        found, by_answer = run(connection, query, len(rows) + 1)
    except TimeoutError:
        return "over_time"
    except PermissionError:
        return "denied"
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError):
        return "invalid"  # SQLite refuses it: syntax, names, lengths, two statements, text that is not UTF-8
    if reads_a_table(connection, gold, by_gold) and not reads_a_table(connection, query, by_answer):
        return "reads_no_table"
    ordered = _settings["ordered"] == "gold" and ordered_at_top(gold)
    return "correct" if same_rows(rows, found, _settings["tolerance"], ordered=ordered) else "wrong"


def _on_halves(path: Path, gold: str, query: str) -> str:
    """`correct`, or `wrong_on_half`; a half on which the gold itself fails decides nothing."""
    for copy in _halves(path):
        try:
            if _compare(copy, gold, query, half=True) != "correct":
                return "wrong_on_half"
        except LookupError:
            continue
    return "correct"


def answer(item: dict[str, Any]) -> dict[str, Any]:
    """The verdict for `{"database": path, "gold": script, "completion": text, "halves": bool}`; the best one over the
    gold's statements. Without a completion the gold is run alone: `correct`, or `unusable_gold`."""
    path = Path(item["database"])
    query = None if item["completion"] is None else extract_sql(item["completion"], opened=item["opened"])
    if query == "":
        return {"verdict": "no_answer"}
    verdicts, reason = [], "no statement in it"
    with contextlib.closing(_connect(str(path))) as connection:
        for gold in statements(item["gold"]):
            try:
                verdict = _compare(connection, gold, gold if query is None else query, half=False)
                if verdict == "correct" and item["halves"] and query is not None:
                    verdict = _on_halves(path, gold, query)
            except LookupError as error:
                reason = str(error)
                continue
            verdicts.append(verdict)
            if verdict in ("correct", "over_time", "denied", "invalid"):
                break  # all but the first are the answer's own fault, the same for every gold
    if not verdicts:
        return {"verdict": "unusable_gold", "detail": reason}
    return {"verdict": verdicts[-1]}
