"""A row of an evaluation: a question and an answer under any of the trainers' column names, checked and read alike.

`question`, `answer` are rendered by the settings' prompt format; `prompt`, `completion` as text are taken as they
stand, as lists of messages they go through the chat template. TOFU's `paraphrased_answer` and `perturbed_answer` may
stand beside either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fdiv.errors import DataError
from fdiv.eval.unlearning.attacks.rows import encode
from fdiv.inference.prompting import EncodedText, PromptFormat
from fdiv.rows.checks import Check, answer_fault, check_one_format, check_rows, prompt_fault, text_fault, texts_fault
from fdiv.rows.sources import Source, source_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Row", "as_read", "checked_rows", "encode_row", "forget_columns"]

Row = dict[str, Any]
_PAIRS = (("prompt", "completion"), ("question", "answer"))
_EXTRAS = ("paraphrased_answer", "perturbed_answer")


def checked_rows(rows: Sequence[Any], name: str, row_set: str) -> tuple[list[Row], dict[str, str]]:
    """Rows with `question` and `answer` as text, and why metrics of the set are not defined, by metric.

    Args:
        rows: as read.
        name: how messages name the set.
        row_set: `forget`, `retain`, `ra`, `wf` or `holdout`.
    Raises:
        DataError: no rows, a row without question or answer, one without the paraphrase or the perturbed answers that
            others have, messages of another shape.
    """
    source = source_of(rows, name)
    if not rows:
        raise DataError(f"{source}: no rows")
    check_rows(rows, source, {}, "a row has columns")
    present = {column for row in rows for column, value in row.items() if value is not None}
    pair = next((pair for pair in _PAIRS if present.issuperset(pair)), _PAIRS[1])
    if "text" in present and not present.intersection(column for one in _PAIRS for column in one):
        raise DataError(f"{source} has raw `text`, not questions and answers: `fdiv eval muse` measures on texts")
    for index, row in enumerate(rows):
        own = [column for column, value in row.items() if value is not None]
        if set(pair) <= set(own):
            check_one_format(own, Source(source.row(index)), pair)
    extras = [] if row_set == "holdout" else [column for column in _EXTRAS if column in present]
    _check_cells(rows, source, pair, extras)
    unused = {*_EXTRAS} - {*extras}
    kept = [{column: value for column, value in row.items() if column not in unused} for row in rows]
    read = [_with_question(row, pair, source.row(index)) for index, row in enumerate(kept)]
    return read, _reasons(name, row_set, extras)


def _check_cells(rows: Sequence[Row], source: Source, pair: Sequence[str], extras: Sequence[str]) -> None:
    """Every cell that is read, and one number of perturbed answers."""
    checks: dict[str, Check] = dict.fromkeys((*pair, *extras), text_fault)
    if pair == _PAIRS[0]:
        checks |= {"prompt": prompt_fault, "completion": answer_fault}
    if "perturbed_answer" in extras:
        checks["perturbed_answer"] = texts_fault
    one_kind = pair if pair == _PAIRS[0] else ()
    check_rows(rows, source, checks, f"a row needs {', '.join((*pair, *extras))}", one_kind=one_kind)
    if "perturbed_answer" in extras:
        count = len(rows[0]["perturbed_answer"])
        for index, row in enumerate(rows):
            if len(row["perturbed_answer"]) != count:
                raise DataError(
                    f"{source.row(index)}: column 'perturbed_answer' has {len(row['perturbed_answer'])} perturbed "
                    f"answers, the first row {count}: expected one number"
                )


def _reasons(name: str, row_set: str, extras: Sequence[str]) -> dict[str, str]:
    """Which metrics a set's missing columns leave undefined, and why."""
    if row_set == "holdout":
        return {}
    wanted = _EXTRAS if row_set in ("forget", "retain") else _EXTRAS[1:]
    lacking = [column for column in wanted if column not in extras]
    if not lacking:
        return {}
    reason = f"the rows of {name} have no {' and no '.join(lacking)}"
    truth = "forget_truth_ratio" if row_set == "forget" else f"{row_set}_Truth_Ratio"
    metrics = {
        "paraphrased_answer": (f"{row_set}_Q_A_PARA_Prob", truth),
        "perturbed_answer": (f"{row_set}_Q_A_PERT_Prob", f"{row_set}_Q_A_Prob_normalised", truth),
    }
    return {metric: reason for column in lacking for metric in metrics[column]}


def _with_question(row: Row, pair: Sequence[str], where: str) -> Row:
    """The row with `question` and `answer` as text, and `asked`: `format`, `text` or `messages`."""
    prompt, answer = (row[column] for column in pair)
    if isinstance(prompt, str) and isinstance(answer, str):
        if pair != _PAIRS[0]:
            return {**row, "asked": "format"}
        others = {column: _spaced(row[column], answer) for column in _EXTRAS if column in row}
        return {**row, **others, "question": prompt, "answer": answer, "asked": "text"}
    both = isinstance(prompt, list) and isinstance(answer, list)
    for message in [*prompt, *answer] if both else []:
        parts = [message.get(part) for part in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(part, str) for part in parts):
            raise DataError(f"{where}: {repr(message)[:60]} is no message with the texts `role` and `content`")
    if not both or len(answer) != 1:
        raise DataError(
            f"{where}: {pair[0]} and {pair[1]} must both be text, or messages with one answer; they are "
            f"{repr(prompt)[:60]} and {repr(answer)[:60]}"
        )
    return {**row, "question": prompt[-1]["content"], "answer": answer[0]["content"], "asked": "messages"}


def _spaced(text: Any, answer: str) -> Any:
    """`text`, or each of a list, with the leading space that `answer` has: the prompt ends where it begins."""
    if isinstance(text, list):
        return [_spaced(one, answer) for one in text]
    return " " + text if answer[:1].isspace() and not text[:1].isspace() else text


def encode_row(row: Row, answer: str, prompt: PromptFormat, tokenizer: PreTrainedTokenizerBase) -> EncodedText:
    """The row's prompt with `answer`, encoded as the trainers encode rows of its columns."""
    return encode(row, tokenizer, prompt, answer)


def as_read(row: Row) -> Row:
    """The row under the columns it was read from, as attacks take it."""
    own = {column: value for column, value in row.items() if column != "asked"}
    if row["asked"] != "format":
        own = {column: value for column, value in own.items() if column not in _PAIRS[1]}
    return own


def forget_columns(row: Row) -> list[Any]:
    """What a forget row's fingerprint is made of."""
    pair = [row["question"], row["answer"]] if row["asked"] == "format" else [row["prompt"], row["completion"]]
    return [*pair, *(row.get(column) for column in _EXTRAS)]
