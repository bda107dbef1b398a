"""MUSE's rows, from the hub by name or from local files in muse_bench's layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdiv.errors import DataError
from fdiv.eval.tofu.data import load_rows
from fdiv.files import folded
from fdiv.inference.cache import fingerprint
from fdiv.rows.checks import check_one_format, check_rows, text_fault
from fdiv.rows.sources import source_of

__all__ = ["MuseRows", "load_muse_rows"]

_PARTS = {
    "forget_knowmem": ("knowmem", "forget_qa", ("question", "answer")),
    "forget_examples": ("knowmem", "forget_qa_icl", ("question", "answer")),
    "retain_knowmem": ("knowmem", "retain_qa", ("question", "answer")),
    "retain_examples": ("knowmem", "retain_qa_icl", ("question", "answer")),
    "verbmem": ("verbmem", "forget", ("prompt", "gt")),
    "forget": ("privleak", "forget", ("text",)),
    "holdout": ("privleak", "holdout", ("text",)),
}


@dataclass
class MuseRows:
    """Question rows with few-shot examples, verbatim prompts with their true continuation, and texts for the attacks.

    `missing` says, by part, why a part is empty.
    """

    corpus: str
    forget_knowmem: list[dict[str, Any]]
    forget_examples: list[dict[str, Any]]
    retain_knowmem: list[dict[str, Any]]
    retain_examples: list[dict[str, Any]]
    verbmem: list[dict[str, Any]]
    forget: list[dict[str, Any]]
    holdout: list[dict[str, Any]]
    missing: dict[str, str]

    def forget_digest(self) -> str:
        """Fingerprint of the forget side: what makes two logs comparable."""
        return fingerprint(self.forget_knowmem, self.verbmem, self.forget)


def _local_folder(source: str, corpus: str) -> str:
    inside = Path(source) / corpus.lower()
    return str(inside if inside.is_dir() else source)


def _folded_row(row: dict[str, Any], columns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(folded(row[name]) for name in columns)


def load_muse_rows(corpus: str = "News", source: str | None = None) -> MuseRows:
    """Rows of one corpus.

    Args:
        corpus: `News`, `Books`, or the name of one's own.
        source: hub dataset (default `muse-bench/MUSE-CORPUS`) or a local folder with `knowmem/forget_qa.json`,
            `knowmem/forget_qa_icl.json`, the same for retain, `verbmem/forget.json`, `privleak/forget.json` and
            `privleak/holdout.json` (in it or in its sub-folder `corpus`).
    Raises:
        DataError: nothing is there, a column is missing, or forget and retain or holdout rows overlap.
    """
    source = source or f"muse-bench/MUSE-{corpus}"
    local = Path(source).is_dir()
    folder = _local_folder(source, corpus) if local else source
    parts: dict[str, list[dict[str, Any]]] = {}
    missing: dict[str, str] = {}
    for part, (name, split, columns) in _PARTS.items():
        try:
            rows = load_rows(folder, f"{name}/{split}") if local else load_rows(folder, name, split)
        except FileNotFoundError as error:
            parts[part], missing[part] = [], str(error)
            continue
        origin = source_of(rows, f"{name}/{split}")
        rows = [{"text": row} if isinstance(row, str) else row for row in rows]
        if not rows:
            raise DataError(f"{folder}: {name}/{split} has no rows")
        check_one_format(rows[0] if isinstance(rows[0], dict) else (), origin, columns)
        check_rows(rows, origin, dict.fromkeys(columns, text_fault), f"a row needs {', '.join(columns)}")
        parts[part] = rows
    if not any(parts[name] for name in ("forget_knowmem", "verbmem", "forget")):
        raise DataError(f"{folder} holds no MUSE data: {missing['forget_knowmem']}")
    for own, other in (("forget_knowmem", "retain_knowmem"), ("forget", "holdout")):
        columns = _PARTS[own][2]
        there = {_folded_row(row, columns) for row in parts[other]}
        both = [row for row in parts[own] if _folded_row(row, columns) in there]
        if both:
            text = both[0][columns[0]][:60]
            raise DataError(
                f"{len(both)} rows of {own} stand in {other} too, for example {text!r}: they must not overlap"
            )
    return MuseRows(corpus=corpus, missing=missing, **parts)
