"""What became of the rows of an evaluation, read off the texts it scores and the prompts it continues."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fdiv.inference.greedy import GenerationRequest
from fdiv.inference.scoring import ScoringRequest
from fdiv.rows.report import RowReport

__all__ = ["selected_rows", "set_reports"]


def selected_rows(count: int, max_rows: int | None, max_items: int | None) -> list[int]:
    """Row indices that count: the preset's first `max_rows`, thinned evenly to `max_items`."""
    count = count if max_rows is None else min(count, max_rows)
    if max_items is None or max_items >= count:
        return list(range(count))
    return sorted({int(i) for i in np.linspace(0, count - 1, max_items).round()})


def set_reports(
    sets: Mapping[str, tuple[str, int]],
    scoring: Sequence[ScoringRequest],
    generation: Sequence[GenerationRequest],
    limit: int | None,
    *,
    max_length: int | None = None,
    lengths: Mapping[str, int] | None = None,
) -> list[RowReport]:
    """A report for each set of rows.

    Args:
        sets: beginning of a request's key, up to the first `_` or `/` (or a longer one that is listed) → name of the
            set, and how many rows it has.
        scoring, generation: requests; the part of a key behind the first `/` begins with the row's number.
        limit: the model's context in tokens; None: not known.
        max_length, lengths: bound on a scored text, and tokens of each before the cut, by key.

    A row without labels in one of its texts, or with a text beyond the model's context, carries no signal.
    """
    lengths = lengths or {}
    found: dict[str, dict[str, list[tuple[int, int, bool]]]] = {}
    for key, tokens, empty in _texts(scoring, generation, lengths):
        name, _, rest = key.partition("/")
        begin = name if name in sets else next((b for b in (*_heads(name),) if b in sets), None)
        if begin is not None:
            found.setdefault(begin, {}).setdefault(rest.split("/")[0], []).append((tokens, lengths.get(key, 0), empty))
    reports = []
    for begin, rows in found.items():
        name, read = sets[begin]
        texts = [text for row in rows.values() for text in row]
        empty = sum(any(nothing for _, _, nothing in row) for row in rows.values())
        beyond = sum(
            any(limit is not None and tokens > limit for tokens, _, _ in row) and not any(no for _, _, no in row)
            for row in rows.values()
        )
        cut = sum(max_length is not None and any(whole > max_length for _, whole, _ in row) for row in rows.values())
        signal = {
            "without a label in one of their texts": empty,
            f"longer than the model's context of {limit} tokens": beyond,
        }
        longest = max(max(tokens, whole) for tokens, whole, _ in texts)
        reports.append(RowReport(name, read, read - len(rows), {}, max_length, cut, longest, signal))
    return reports


def _texts(
    scoring: Iterable[ScoringRequest], generation: Iterable[GenerationRequest], lengths: Mapping[str, int]
) -> Iterable[tuple[str, int, bool]]:
    """(key, tokens, without a label) of every request."""
    for request in scoring:
        yield request.key, len(request.text.input_ids), request.text.label_count == 0
    for request in generation:
        yield request.key, len(request.prompt_ids), False


def _heads(name: str) -> Iterable[str]:
    """`forget_knowmem_ROUGE` → `forget_knowmem`, `forget`: longest first."""
    parts = name.split("_")
    return ("_".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
