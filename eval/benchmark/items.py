"""From one text's scoring record to the per-item values of a log: probability, ES, EM and the attacks' scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fdiv.eval.benchmark.presets import Preset
from fdiv.eval.metrics.membership import min_k_plus_plus_score, min_k_score, reference_score, zlib_score
from fdiv.eval.metrics.memorization import exact_memorization, extraction_strength

__all__ = ["attack_rows", "memorization_rows", "probability_row"]

Record = Mapping[str, Any]


def probability_row(record: Record | Sequence[Record]) -> dict[str, Any]:
    """`prob` = exp(-avg_loss) and `avg_loss`; lists for a sequence of records; null where a text has no labels."""
    if isinstance(record, Mapping):
        loss = record["avg_loss"]
        return {"prob": None if loss is None else math.exp(-loss), "avg_loss": loss}
    rows = [probability_row(one) for one in record]
    if any(row["avg_loss"] is None for row in rows):
        return {"prob": None, "avg_loss": None}
    return {"prob": [row["prob"] for row in rows], "avg_loss": [row["avg_loss"] for row in rows]}


def _kept(record: Record, name: str, preset: Preset) -> list[Any]:
    return record[name][:-1] if preset.drop_last_label else record[name]


def memorization_rows(records: Mapping[int, Record], preset: Preset) -> dict[str, dict[str, Any]]:
    """`extraction_strength` and `exact_memorization` of token-level records by index."""
    hits = {str(i): _kept(record, "is_top1", preset) for i, record in records.items()}
    strength = {i: {"score": extraction_strength(h, floor=preset.extraction_floor)} for i, h in hits.items()}
    return {
        "extraction_strength": {"value_by_index": strength},
        "exact_memorization": {"value_by_index": {i: {"score": exact_memorization(h)} for i, h in hits.items()}},
    }


def attack_rows(
    sides: Mapping[str, Mapping[int, Record]],
    texts: Mapping[str, Mapping[int, str]],
    preset: Preset,
    reference: Mapping[str, Mapping[int, Record]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores of LOSS, ZLIB, Min-K, Min-K++ and, with a reference model's records, Reference.

    Args:
        sides: `forget` and `holdout`: token-level records by index.
        texts: the scored text of each, for ZLIB.
        preset: which labels and how many tokens count.
        reference: the reference model's records of the same texts.
    """
    metrics: dict[str, dict[str, Any]] = {}

    def put(attack: str, side: str, index: int, score: float | None) -> None:
        node = metrics.setdefault(f"mia_{attack}", {}).setdefault(side, {"value_by_index": {}})
        node["value_by_index"][str(index)] = {"score": score}

    for side, records in sides.items():
        for index, record in records.items():
            loss = record["avg_loss"]
            put("loss", side, index, loss)
            put("zlib", side, index, None if loss is None else zlib_score(loss, texts[side][index]))
            log_probs, mean, variance = (_kept(record, name, preset) for name in ("log_probs", "mean", "variance"))
            put("min_k", side, index, min_k_score(log_probs, at_least_one=preset.at_least_one_token))
            plus = min_k_plus_plus_score(log_probs, mean, variance, at_least_one=preset.at_least_one_token)
            put("min_k_plus_plus", side, index, plus)
            if reference is not None:
                other = reference[side][index]["avg_loss"]
                put("reference", side, index, None if loss is None or other is None else reference_score(loss, other))
    return metrics
