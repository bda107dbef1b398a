"""MUSE's rows, from the hub by name or from local files in muse_bench's layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdiv.errors import DataError
from fdiv.eval.benchmark.sources import Rows
from fdiv.eval.layouts.layout import load_layout
from fdiv.files import folded
from fdiv.inference.cache import fingerprint
from fdiv.rows.checks import check_one_format, check_rows, text_fault
from fdiv.rows.sources import source_of

__all__ = ["MuseRows", "load_muse_rows", "text_rows"]

_COLUMNS = {
    **dict.fromkeys(
        ("forget_knowmem", "forget_examples", "retain_knowmem", "retain_examples"), ("question", "answer")
    ),
    "verbmem": ("prompt", "gt"),
    **dict.fromkeys(("forget", "holdout"), ("text",)),
}
"""Part → its columns; where each part is, says the layout `muse`."""


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
    layout = load_layout("muse").filled({"corpus": corpus})
    folder = _local_folder(source, corpus) if source is not None and Path(source).is_dir() else source
    return text_rows(corpus, lambda part: layout.read(part, folder), folder or str(layout.source))


def text_rows(corpus: str, read: Callable[[str], tuple[str, Rows]], source: str) -> MuseRows:
    """The parts of a benchmark of texts, checked.

    Args:
        corpus: its name. read: (name, rows) of a part; FileNotFoundError with the reason where there are none.
        source: what errors call the whole.

    Raises:
        DataError: see `load_muse_rows`.
    """
    parts: dict[str, list[dict[str, Any]]] = {}
    missing: dict[str, str] = {}
    for part, columns in _COLUMNS.items():
        try:
            name, rows = read(part)
        except FileNotFoundError as error:
            parts[part], missing[part] = [], str(error)
            continue
        origin = source_of(rows, name)
        rows = [{"text": row} if isinstance(row, str) else row for row in rows]
        if not rows:
            raise DataError(f"{source}: {name} has no rows ({part})")
        check_one_format(rows[0] if isinstance(rows[0], dict) else (), origin, columns)
        check_rows(rows, origin, dict.fromkeys(columns, text_fault), f"a row needs {', '.join(columns)}")
        parts[part] = rows
    if not any(parts[name] for name in ("forget_knowmem", "verbmem", "forget")):
        raise DataError(f"{source} holds no MUSE data: {missing['forget_knowmem']}")
    for own, other in (("forget_knowmem", "retain_knowmem"), ("forget", "holdout")):
        columns = _COLUMNS[own]
        there = {_folded_row(row, columns) for row in parts[other]}
        both = [row for row in parts[own] if _folded_row(row, columns) in there]
        if both:
            text = both[0][columns[0]][:60]
            raise DataError(
                f"{len(both)} rows of {own} stand in {other} too, for example {text!r}: they must not overlap"
            )
    return MuseRows(corpus=corpus, missing=missing, **parts)
