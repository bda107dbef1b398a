"""The tasks Pass@k is measured on: benchmarks by name, from the hub or from local files, and files of one's own."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fdiv.errors import DataError
from fdiv.files import read_json_lines
from fdiv.rl.rewards.math.reward import gold_text
from fdiv.rows.checks import check_one_format, check_rows, prompt_fault, shown, text_fault
from fdiv.rows.loading import read_file
from fdiv.rows.sources import Source, source_of

__all__ = ["DATASETS", "EvalTask", "LoadedTasks", "TaskSource", "load_tasks", "tasks_of_rows"]

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
"""Appended to mathematics questions: the prompt of the Qwen2.5-Math evaluations."""


@dataclass(frozen=True)
class EvalTask:
    """One problem.

    Args:
        task_id: unique in its set.
        prompt: the question as text, or a conversation (TRL's list of `{"role", "content"}`).
        answer: the gold answer; what it means is the scorer's affair.
        columns: what the scorer needs besides (`database`, `test`, `entry_point` …).
    """

    task_id: str
    prompt: str | list[dict[str, str]]
    answer: str
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskSource:
    """A benchmark: where it lies and how its rows are read.

    Args:
        hub: dataset on the hub, its configuration and split; None: only from local files.
        local: paths inside the `--data` folder, the first that is there is taken.
        read: row and its number → `EvalTask`.
        scorer: name of the scorer.
        stop: texts that end a completion of a model without a chat template.
        chat: `never` where the prompt is to be continued as it stands.
    """

    hub: tuple[str, str | None, str] | None
    local: tuple[str, ...]
    read: Callable[[Mapping[str, Any], int], EvalTask]
    scorer: str
    stop: tuple[str, ...] = ()
    chat: str = "auto"


class _CellError(ValueError):
    """A cell that a task cannot be made of: its column, and what is wrong as the end of a sentence."""

    def __init__(self, column: str, fault: str) -> None:
        super().__init__(f"column {column!r} {fault}")


def _text(row: Mapping[str, Any], column: str) -> str:
    """The text of a cell without white space around it."""
    fault = text_fault(row[column])
    if fault:
        raise _CellError(column, fault)
    return row[column].strip()


def _gold(row: Mapping[str, Any], column: str) -> str:
    """A gold answer as text: of text, a number, or a list of either."""
    value = row[column]
    text = "" if isinstance(value, bool) else gold_text(value)
    if not text:
        raise _CellError(column, f"is {shown(value)}, no answer")
    return text


def _math(row: Mapping[str, Any], number: int, *, question: Sequence[str], answer: str, id_: str = "id") -> EvalTask:
    column = next((name for name in question if row.get(name) is not None), None)
    if column is None:
        raise KeyError(question[0])
    name = row.get(id_)
    return EvalTask(str(number if name is None else name), _text(row, column) + BOXED, _gold(row, answer))


def _gsm8k(row: Mapping[str, Any], number: int) -> EvalTask:
    gold = _text(row, "answer").rpartition("####")[2].strip().replace(",", "")
    if not gold:
        raise _CellError("answer", "has nothing after ####")
    return EvalTask(str(number), _text(row, "question") + BOXED, gold)


def _svamp(row: Mapping[str, Any], number: int) -> EvalTask:
    body = _text(row, "Body")
    question = f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {_text(row, 'Question')}"
    gold = float(_gold(row, "Answer"))
    return _math({"question": question, "answer": gold, "id": row["ID"]}, number, **_QA)


def _olympiad(row: Mapping[str, Any], number: int) -> EvalTask:
    context = f"{row['context']}\n" if row.get("context") else ""
    whole = {**row, "question": context + _text(row, "question")}
    return _math(whole, number, question=("question",), answer="final_answer")


def _humaneval(row: Mapping[str, Any], number: int) -> EvalTask:
    for name in ("task_id", "prompt", "canonical_solution", "test", "entry_point"):
        _text(row, name)
    columns = {name: row[name] for name in ("test", "entry_point")}
    return EvalTask(row["task_id"], row["prompt"], row["canonical_solution"], columns)


def _defog(row: Mapping[str, Any], number: int, schemas: Mapping[str, str]) -> EvalTask:
    hints = f"\nInstructions: {row['instructions'].strip()}" if (row.get("instructions") or "").strip() else ""
    database = _text(row, "db_name")
    if database not in schemas:
        raise _CellError("db_name", f"is {database!r}, which has no schema")
    prompt = (
        f"SQLite tables:\n{schemas[database]}\n\nQuestion: {_text(row, 'question')}{hints}\n"
        "Answer with one SQLite query in a ```sql block."
    )
    _text(row, "query")
    return EvalTask(str(number), prompt, row["query"], {"database": row["db_name"]})


_QA: dict[str, Any] = {"question": ("question",), "answer": "answer"}
_PROBLEM: dict[str, Any] = {"question": ("problem", "question"), "answer": "answer"}


def _competition(hub: str, split: str, local: tuple[str, ...], **columns: Any) -> TaskSource:
    return TaskSource((hub, None, split), local, partial(_math, **columns), "math")


DATASETS: dict[str, TaskSource] = {
    "gsm8k": TaskSource(
        ("openai/gsm8k", "main", "test"), ("test.jsonl", "gsm8k/test.jsonl"), _gsm8k, "math", ("\nQuestion:",)
    ),
    "math500": _competition(
        "HuggingFaceH4/MATH-500", "test", ("math500/test.jsonl", "test.jsonl"), **_PROBLEM, id_="unique_id"
    ),
    "aime24": _competition("HuggingFaceH4/aime_2024", "train", ("aime24/test.jsonl", "test.jsonl"), **_PROBLEM),
    "aime25": _competition("math-ai/aime25", "test", ("aime25/test.jsonl", "test.jsonl"), **_PROBLEM),
    "amc23": _competition("math-ai/amc23", "test", ("amc23/test.jsonl", "test.jsonl"), **_PROBLEM),
    "olympiadbench": TaskSource(
        ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
        ("olympiadbench/test.jsonl", "test.jsonl"),
        _olympiad,
        "math",
    ),
    "svamp": TaskSource(("ChilleD/SVAMP", None, "test"), ("svamp/test.jsonl", "test.jsonl"), _svamp, "math"),
    "humaneval": TaskSource(
        ("openai/openai_humaneval", None, "test"),
        ("HumanEval.jsonl.gz", "HumanEval.jsonl", "humaneval/HumanEval.jsonl.gz"),
        _humaneval,
        "code",
        ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint("),
        chat="never",
    ),
}
"""Benchmarks by name; `sql_defog` is read by `_load_defog`, from local files only."""

_SQL = "sql_defog"
_DEFOG_QUESTIONS = ("questions_gen_sqlite.csv", "instruct_basic_sqlite.csv", "instruct_advanced_sqlite.csv")


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with what goes with them: the scorer's name, stop texts, `chat_template`, the databases' folder."""

    tasks: list[EvalTask]
    scorer: str
    stop: tuple[str, ...] = ()
    chat: str = "auto"
    databases: str | None = None
    read: int | None = None
    """Tasks of the data set, where `tasks` are a part of them."""


def load_tasks(dataset: str, data: str | None = None, answer_column: str = "answer") -> LoadedTasks:
    """Read a benchmark by name, or a file of one's own.

    Args:
        dataset: one of `DATASETS`, `sql_defog`, or a JSON-lines file with `prompt` (text or conversation), `answer`,
            perhaps `task_id`, and whatever else the scorer needs (`database` for `sql`).
        data: the local folder of a benchmark; None: the hub.
        answer_column: of a file of one's own.
    Raises:
        DataError: no such name, file or folder; a column that is missing; a task given twice; no task.
    """
    if dataset == _SQL:
        if data is None:
            raise DataError(
                "sql_defog is not on the hub: give --data, the folder with questions/, schema/ and sqlite/"
            )
        return _load_defog(Path(data))
    if dataset in DATASETS:
        source = DATASETS[dataset]
        rows, where = _local(source, Path(data), dataset) if data is not None else _from_hub(source, dataset)
        return LoadedTasks(_unique(_read(rows, source.read, where), where), source.scorer, source.stop, source.chat)
    path = Path(dataset)
    if not path.is_file():
        raise DataError(
            f"dataset {dataset!r} is neither a benchmark ({', '.join([*DATASETS, _SQL])}) nor an existing file"
        )
    if data is not None:
        raise DataError(f"--data is the folder of a benchmark by name; {dataset} is a file: leave --data out")
    rows = read_json_lines(path) if path.name.endswith((".json", ".jsonl", ".gz")) else read_file(path)
    return LoadedTasks(tasks_of_rows(rows, Source(dataset, path), answer_column), "exact", chat="never")


def tasks_of_rows(
    rows: Iterable[Mapping[str, Any]], where: str | Source, answer_column: str = "answer"
) -> list[EvalTask]:
    """Tasks of rows with `prompt` and the gold answer; `task_id` is the row's number where there is none.

    Raises:
        DataError: a row without them, or with a prompt that is neither text nor messages; names it.
    """
    where = source_of(rows, where) if isinstance(where, str) else where
    rows = list(rows)
    remedy = f"a task needs `prompt` (text or messages) and `{answer_column}`"
    first = rows[0] if rows and isinstance(rows[0], Mapping) else {}
    check_one_format(first, where, ("prompt",), beside=("question", "answer", "completion", "chosen"))
    check_rows(rows, where, {"prompt": prompt_fault}, remedy, one_kind=("prompt",))
    return _unique(_read(rows, partial(_own, answer_column=answer_column), where), where)


def _own(row: Mapping[str, Any], number: int, answer_column: str) -> EvalTask:
    prompt, answer = row["prompt"], row[answer_column]
    rest = {
        name: value
        for name, value in row.items()
        if name not in ("prompt", "answer", "task_id", "prompts", "completions")
    }
    name = row.get("task_id")
    return EvalTask(str(number if name is None else name), prompt, _own_gold(answer, answer_column), rest)


def _own_gold(answer: Any, column: str) -> str:
    """The gold of a row of one's own: text or a number, whole floats without their point.

    Raises:
        TypeError: anything else, a missing value among it: what it would mean is not known.
    """
    if isinstance(answer, str):
        return answer
    if isinstance(answer, int | float) and not isinstance(answer, bool) and answer == answer:
        return gold_text(answer)
    raise TypeError(
        f'{column} is {answer!r}: give text or a number; the parts of one answer as one text ("1, 3"), and of several '
        "accepted answers one"
    )


def _read(rows: Iterable[Mapping[str, Any]], read: Callable, where: Source) -> list[EvalTask]:
    tasks = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"{where.row(number)} is {shown(row)}, not an object with columns")
        try:
            tasks.append(read(row, number))
        except KeyError as error:
            there = ", ".join(sorted(row))
            raise DataError(f"{where.row(number)}: no column {error.args[0]!r}; it has {there or 'none'}") from None
        except _CellError as error:
            raise DataError(f"{where.row(number)}: {error}") from None
        except (TypeError, ValueError, AttributeError) as error:
            empty = [column for column, value in row.items() if value is None]
            nulls = f" (null here: {', '.join(map(repr, empty))})" if empty else ""
            raise DataError(f"{where.row(number)} cannot be read as a task: {error}{nulls}") from None
    return tasks


def _unique(tasks: list[EvalTask], where: Source) -> list[EvalTask]:
    if not tasks:
        raise DataError(f"{where} holds no task")
    seen: set[str] = set()
    for task in tasks:
        if task.task_id in seen:
            raise DataError(f"{where}: task {task.task_id!r} stands there twice")
        seen.add(task.task_id)
    return tasks


def _local(source: TaskSource, folder: Path, name: str) -> tuple[Iterable[Mapping[str, Any]], Source]:
    for path in [folder / local for local in source.local] if folder.is_dir() else [folder]:
        if path.is_file():
            return read_json_lines(path), Source(str(path), path)
    raise DataError(f"--data {folder}: {name} needs one of {', '.join(source.local)} in it")


def _from_hub(source: TaskSource, name: str) -> tuple[Iterable[Mapping[str, Any]], Source]:
    import datasets

    hub, config, split = source.hub
    try:
        return datasets.load_dataset(hub, config, split=split), Source(f"{hub} ({split})")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{name}: cannot load {hub} from the hub: {reason}; give local files with --data, or a connection"
        ) from None


def _load_defog(folder: Path) -> LoadedTasks:
    files = [folder / "questions" / name for name in _DEFOG_QUESTIONS]
    missing = [path for path in (*files, folder / "schema", folder / "sqlite") if not path.exists()]
    if missing:
        raise DataError(f"--data {folder}: sql_defog needs {missing[0].relative_to(folder)} in it")
    schemas = {path.stem: _schema(path) for path in sorted((folder / "schema").glob("*.json"))}
    tasks: list[EvalTask] = []
    for path in files:
        with path.open(encoding="utf-8", newline="") as file:
            read = _read(csv.DictReader(file), partial(_defog, schemas=schemas), Source(str(path), path))
        kind = path.stem.removesuffix("_sqlite")
        tasks += [EvalTask(f"{kind}/{task.task_id}", task.prompt, task.answer, task.columns) for task in read]
    return LoadedTasks(_unique(tasks, Source(str(folder))), "sql", databases=str(folder / "sqlite"))


def _schema(path: Path) -> str:
    """`CREATE TABLE`-like lines of one of defog-data's schema files."""
    tables = json.loads(path.read_text(encoding="utf-8"))["table_metadata"]
    lines = []
    for table, columns in tables.items():
        listed = ", ".join(f"{column['column_name']} {column['data_type']}" for column in columns)
        lines.append(f"{table}({listed})")
    return "\n".join(lines)
