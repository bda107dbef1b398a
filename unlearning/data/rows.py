"""Forget and retain rows: TOFU, MUSE or one's own, from the hub or from files.

Three row formats are read, told apart by their columns:

* `prompt`, `completion`: TRL's prompt-completion type, plain strings or lists of messages;
* `question`, `answer`: TOFU. Rendered with the tokenizer's chat template, or with `prompt_format`;
* `text`: MUSE's raw corpora. Cut into chunks of `max_length` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fdiv.errors import DataError
from fdiv.files import DATA_FORMATS, one_line, read_json_lines
from fdiv.sealed import check_listed

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Answer", "load_rows", "plain_text", "read_answers"]

Text = str | list[dict[str, str]]
_FILE_FORMATS = {**DATA_FORMATS, ".txt": "text"}


class Answer(NamedTuple):
    """A prompt and an answer to it, both plain strings or both lists of messages; `row` keeps the other columns."""

    prompt: Text
    completion: Text
    row: Mapping[str, Any]

    def with_completion(self, text: str) -> Answer:
        """The same prompt with `text` as the answer, in the format of the present one (role, leading white space)."""
        if isinstance(self.completion, list):
            return self._replace(completion=[{"role": "assistant", "content": text}])
        space = " " if self.completion[:1].isspace() and not text[:1].isspace() else ""
        return self._replace(completion=space + text)


def load_rows(name: str, config: str | None = None, split: str = "train") -> Dataset:
    """A dataset from the hub by name, or from a local file (json, jsonl, parquet, csv, txt) or directory.

    Args:
        name: hub id (`locuslab/TOFU`, `muse-bench/MUSE-News`) or path.
        config: the hub's configuration (TOFU: `forget10`, `retain90`; MUSE: `raw`, `scal`, `sust`).
        split: its split (TOFU: `train`; MUSE: `forget`, `retain1`).

    Raises:
        FileNotFoundError: `name` looks like a path and does not exist.
        ValueError: a file type that is not read, or no rows.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path = Path(name)
    if path.is_file():
        if path.suffix not in _FILE_FORMATS:
            raise ValueError(
                f"{name}: cannot read {path.suffix!r} files, use one of {', '.join(sorted(_FILE_FORMATS))}"
            )
        check_listed(path)
        try:
            rows = load_dataset(_FILE_FORMATS[path.suffix], data_files={split: str(path)}, split=split)
        except (OSError, ValueError, DatasetsError) as error:
            if _FILE_FORMATS[path.suffix] == "json":
                read_json_lines(path)  # names the line that is no JSON
            raise DataError(f"cannot read the rows of {name}: {one_line(error)}") from error
    elif not path.exists() and (path.is_absolute() or name.startswith(".") or path.suffix in _FILE_FORMATS):
        raise FileNotFoundError(f"{name} does not exist: give the path of a file or directory, or a hub dataset id")
    else:
        rows = load_dataset(name, config, split=split)
    if len(rows) == 0:
        raise ValueError(f"{name} (config {config}, split {split}) has no rows")
    return rows


def read_answers(rows: Dataset, *, prompt_format: str | None, has_chat_template: bool, what: str) -> list[Answer]:
    """Bring prompt-completion or TOFU rows into one form.

    Args:
        rows: with columns `prompt`, `completion` or `question`, `answer`.
        prompt_format: for TOFU rows, a format string with `{question}` (the answer follows after a space); None
            makes messages of them, for the tokenizer's chat template.
        has_chat_template: whether the tokenizer has one.
        what: how error messages name the rows ("forget", "retain").

    Raises:
        ValueError: missing columns, an empty prompt or answer, messages without a chat template.
    """
    columns = set(rows.column_names)
    for pair in (("prompt", "completion"), ("question", "answer")):
        if set(pair) <= columns:
            _check_filled(rows, pair, what)
            break
    if {"prompt", "completion"} <= columns:
        answers = [Answer(row["prompt"], row["completion"], row) for row in rows]
    elif {"question", "answer"} <= columns and prompt_format is not None:
        answers = [Answer(prompt_format.format(question=r["question"]), " " + r["answer"], r) for r in rows]
    elif {"question", "answer"} <= columns:
        answers = [
            Answer(
                [{"role": "user", "content": row["question"]}], [{"role": "assistant", "content": row["answer"]}], row
            )
            for row in rows
        ]
    else:
        raise ValueError(
            f"the {what} rows have the columns {sorted(columns)}: `prompt` and `completion`, `question` and `answer` "
            "(TOFU), or `text` (MUSE) are needed"
        )
    for position, answer in enumerate(answers):
        if not answer.prompt or not plain_text(answer.completion).strip():
            raise ValueError(f"{what} row {position} has an empty prompt or answer: fill it in or leave the row out")
        if isinstance(answer.prompt, list) and not has_chat_template:
            raise ValueError(
                f"the {what} rows are questions or messages and the tokenizer has no chat template: set "
                "`prompt_format`, for example 'Question: {question}\\nAnswer:'"
            )
    return answers


def _check_filled(rows: Dataset, columns: tuple[str, str], what: str) -> None:
    for column in columns:
        for number, value in enumerate(rows[column]):
            if not isinstance(value, (str, list)):
                raise ValueError(f"{what} row {number}: column {column!r} is {value!r:.60}, not text or messages")


def plain_text(text: Text) -> str:
    """The plain text of a string or of messages."""
    return text if isinstance(text, str) else " ".join(message["content"] for message in text)
