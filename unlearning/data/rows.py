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
from fdiv.files import DATA_FORMATS
from fdiv.filling import fill
from fdiv.rows.checks import answer_fault, check_one_format, check_rows, prompt_fault, text_fault
from fdiv.rows.loading import loaded, read_file
from fdiv.rows.sources import Source, mark_source, source_of

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
        DataError: (a ValueError) a file type that is not read, a damaged file, no such dataset, or no rows.
    """
    path = Path(name)
    if path.is_file():
        rows = read_file(path, split, formats=_FILE_FORMATS)
    elif not path.exists() and (path.is_absolute() or name.startswith(".") or path.suffix in _FILE_FORMATS):
        raise FileNotFoundError(f"{name} does not exist: give the path of a file or directory, or a hub dataset id")
    else:
        import datasets

        rows = loaded(lambda: datasets.load_dataset(name, config, split=split), name)
        mark_source(rows, Source(", ".join(filter(None, (name, config, split)))))
    if len(rows) == 0:
        raise DataError(f"{name} (config {config}, split {split}) has no rows")
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
        DataError: (a ValueError) missing columns, rows that are whole in another format too, a prompt or an answer
            that is empty or neither text nor messages, messages without a chat template.
    """
    columns, source = set(rows.column_names), source_of(rows, f"the {what} rows")
    reads = next((pair for pair in (("prompt", "completion"), ("question", "answer")) if set(pair) <= columns), None)
    if reads is None:
        raise DataError(
            f"the {what} rows have the columns {sorted(columns)}: `prompt` and `completion`, `question` and `answer` "
            "(TOFU), or `text` (MUSE) are needed"
        )
    check_one_format(columns, source, reads)
    if reads == ("prompt", "completion"):
        checks = {"prompt": prompt_fault, "completion": answer_fault}
        check_rows(rows.select_columns(list(reads)), source, checks, one_kind=reads)
        answers = [Answer(row["prompt"], row["completion"], row) for row in rows]
    else:
        check_rows(rows.select_columns(list(reads)), source, dict.fromkeys(reads, text_fault))
        answers = [_question_row(row, prompt_format) for row in rows]
    if not has_chat_template and any(isinstance(answer.prompt, list) for answer in answers):
        raise DataError(
            f"the {what} rows are questions or messages and the tokenizer has no chat template: set "
            "`prompt_format`, for example 'Question: {question}\\nAnswer:'"
        )
    return answers


def _question_row(row: Mapping[str, Any], prompt_format: str | None) -> Answer:
    """A TOFU row as plain text in `prompt_format`, or as messages."""
    question, answer = row["question"], row["answer"]
    if prompt_format is not None:
        return Answer(fill(prompt_format, question=question), " " + answer, row)
    return Answer([{"role": "user", "content": question}], [{"role": "assistant", "content": answer}], row)


def plain_text(text: Text) -> str:
    """The plain text of a string or of messages."""
    return text if isinstance(text, str) else " ".join(message["content"] for message in text)
