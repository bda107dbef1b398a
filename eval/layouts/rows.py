"""The rows of a layout, as TOFU's or MUSE's measures take them; other wordings of forget rows joined to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fdiv.errors import DataError
from fdiv.eval.benchmark.sources import Rows
from fdiv.eval.unlearning.attacks.rows import asked, kind, prompt_rows
from fdiv.files import folded
from fdiv.rows.sources import mark_source, source_of

if TYPE_CHECKING:
    from fdiv.eval.layouts.layout import Layout
    from fdiv.eval.muse.data import MuseRows
    from fdiv.eval.tofu.data import TofuRows

__all__ = ["layout_rows", "paraphrased"]

_NAMES = {"ra": "real_authors", "wf": "world_facts"}
_WORDINGS = ("paraphrase", "paraphrased_question", "paraphrased_prompt")
_ANSWERS = ("paraphrased_answer", "perturbed_answer")


def layout_rows(layout: Layout, source: str | None = None) -> TofuRows | MuseRows:
    """All row sets of a layout whose variables are filled in.

    Args:
        layout: of either kind. source: a local copy, or another dataset, in place of its own.

    Raises:
        DataError: see `fdiv.eval.tofu.data.question_rows`, `fdiv.eval.muse.data.text_rows` and `paraphrased`.
    """
    if layout.kind == "texts":
        from fdiv.eval.muse.data import text_rows

        return text_rows(layout.name, lambda part: layout.read(part, source), f"benchmark {layout.name!r}")
    from fdiv.eval.tofu.data import question_rows

    def read(row_set: str) -> tuple[str, Rows]:
        name, rows = layout.read(_NAMES.get(row_set, row_set), source)
        found = _pairs(rows)
        if row_set == "forget" and "paraphrase" in layout.sets:
            found = paraphrased(found, layout.read("paraphrase", source)[1])
        return name, found

    return question_rows(layout.name, read, f"the forget set of benchmark {layout.name!r}")


def _pairs(rows: Rows) -> Rows:
    """Rows of messages as prompt and completion; running text cut in two; the others as they were read."""
    found = []
    for row in rows:
        present = {column for column, value in row.items() if value is not None} if isinstance(row, Mapping) else set()
        whole = {"prompt", "completion"} <= present or {"question", "answer"} <= present
        if not whole and "text" in present and isinstance(row["text"], str) and row["text"].strip():
            row = prompt_rows([row])[0]
        elif not whole and "messages" in present and kind(row) == "messages":
            asked(row)  # refuses messages that do not end with an answer
            others = {column: value for column, value in row.items() if column != "messages"}
            row = {**others, "prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
        found.append(row)
    return mark_source(Rows(found), source_of(rows, "rows"))


def paraphrased(forget: Rows, others: Rows) -> Rows:
    """The forget rows with what `others` say of them: `paraphrase` (the question in other words, a list where there
    are several), `paraphrased_answer`, `perturbed_answer`.

    A row of `others` belongs to the forget row of its `id`; without one to that of its question or prompt, where it
    has a `paraphrase` beside it; else to the row of its place, its own question and answer being the other wording.

    Raises:
        DataError: a row that belongs to no forget row; another number of rows, where their places count.
    """
    origin = source_of(others, "paraphrase")
    found = [dict(row) for row in forget]
    for index, row in enumerate(others):
        if not isinstance(row, Mapping):
            raise DataError(f"{origin.row(index)} is {row!r:.60}, not an object with columns")
        place = _place(row, found, index, len(others), origin.row(index))
        wording = next((row[column] for column in _WORDINGS if row.get(column)), None)
        wording = _own(row, ("question", "prompt")) if wording is None else wording
        texts = [wording] if isinstance(wording, str) else list(wording or ())
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(f"{origin.row(index)}: the paraphrase {wording!r:.60} is no text and no list of texts")
        found[place]["paraphrase"] = [*found[place].get("paraphrase", ()), *texts]
        for column in _ANSWERS:
            if row.get(column) is not None:
                found[place][column] = row[column]
    return mark_source(Rows(found), source_of(forget, "forget"))


def _own(row: Mapping[str, Any], columns: Sequence[str]) -> str | None:
    return next((row[column] for column in columns if isinstance(row.get(column), str)), None)


def _place(row: Mapping[str, Any], forget: Sequence[Mapping[str, Any]], index: int, count: int, where: str) -> int:
    """The number of the forget row that a row is another wording of."""
    if row.get("id") is not None and any(other.get("id") is not None for other in forget):
        same = [number for number, other in enumerate(forget) if str(other.get("id")) == str(row["id"])]
        said = f"id {row['id']!r}"
    elif any(row.get(column) for column in _WORDINGS) and _own(row, ("question", "prompt")):
        text = folded(str(_own(row, ("question", "prompt"))))
        same = [number for number, other in enumerate(forget) if folded(asked(other)) == text]
        said = "its question"
    else:
        if count != len(forget):
            raise DataError(
                f"{where}: {count} paraphrases for {len(forget)} forget rows, and no `id` or question says which "
                "belong together: give each an `id`, or as many rows in the same order"
            )
        return index
    if not same:
        raise DataError(f"{where}: no forget row has {said}")
    return same[0]
