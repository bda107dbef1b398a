"""From scores of single rows to the numbers of a report: memorisation above chance, what is kept, leakage.

A row's **chance** is what the model before unlearning gives its answer under the question of another row: what the
answer's wording earns by itself. An unlearning has nothing to gain below it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fdiv.eval.benchmark.items import memorization_rows
from fdiv.eval.benchmark.presets import get_preset
from fdiv.eval.metrics.leakage import leak_at_k
from fdiv.eval.metrics.membership import auc, min_k_plus_plus_score, min_k_score
from fdiv.statistics.estimates import mean_and_error

__all__ = [
    "FORGOTTEN_AT",
    "RowScores",
    "at_chance",
    "defined_mean",
    "forgotten",
    "kept",
    "leak_values",
    "membership",
    "row_scores",
    "set_values",
]

FORGOTTEN_AT = 0.9
"""`forgotten` at which a run stops. A model that never saw the rows has about as much: their subjects alone make
answers likelier than chance."""

RowScores = dict[str, float | None]
"""Of one row: `probability`, `extraction_strength`, `exact_memorization`, and with token scores `min_k`,
`min_k_plus_plus`; None where the row has no label."""

_PRESET = get_preset("open_unlearning")
# How far above chance a row is known, and the probability per token below which it is not in any case. A model that
# memorised TOFU rows has all of them above, of two that never saw them 35 of 40 and 14 of 16 rows are at chance.
_NATS, _STRENGTH, _LEAST = 1.0, 0.1, 0.05
_ROUNDING = 1e-12  # spread of equal values
_UNKNOWN = 0.01  # probability per token of text that a model does not know


def row_scores(record: Mapping[str, Any]) -> RowScores:
    """The scores of one text from its record of `fdiv.inference.scoring.score_texts` (with `is_top1`); extraction
    strength, exact memorisation and Min-K as in open-unlearning, the last label left out."""
    loss = record["avg_loss"]
    memory = memorization_rows({0: record}, _PRESET)
    scores: RowScores = {"probability": None if loss is None else math.exp(-loss)}
    for name, node in memory.items():
        scores[name] = None if loss is None else node["value_by_index"]["0"]["score"]
    if "log_probs" in record:
        log_probs, mean, variance = (record[name][:-1] for name in ("log_probs", "mean", "variance"))
        scores["min_k"] = min_k_score(log_probs)
        scores["min_k_plus_plus"] = min_k_plus_plus_score(log_probs, mean, variance)
    return scores


def defined_mean(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard error s/√N of the values that are defined; None where they are not (N < 1, N < 2)."""
    found = torch.tensor([value for value in values if value is not None], dtype=torch.float64)
    mean, error = mean_and_error(found)
    if math.isnan(error):
        return (mean if len(found) else None), None
    return mean, 0.0 if error < _ROUNDING else error


def set_values(prefix: str, rows: Sequence[RowScores], names: Sequence[str]) -> dict[str, float | None]:
    """`PREFIX_NAME` and `PREFIX_NAME_se`: means over rows."""
    found: dict[str, float | None] = {}
    for name in names:
        found[f"{prefix}{name}"], found[f"{prefix}{name}_se"] = defined_mean([row.get(name) for row in rows])
    return found


def at_chance(rows: Sequence[RowScores], chance: Sequence[RowScores]) -> list[int]:
    """Numbers of the rows that the model does not look to know: under its own question an answer is neither e times
    likelier per token than under another one (or is less likely than a twentieth), nor is a tenth more of it completed
    from its beginning."""
    found = []
    for number, (row, other) in enumerate(zip(rows, chance, strict=True)):
        if row["probability"] is None or other["probability"] is None:
            continue
        tiny = np.finfo(float).tiny
        gain = math.log(max(row["probability"], tiny)) - math.log(max(other["probability"], tiny))
        stronger = (row["extraction_strength"] or 0.0) - (other["extraction_strength"] or 0.0)
        if (gain < _NATS or row["probability"] < _LEAST) and stronger <= _STRENGTH:
            found.append(number)
    return found


def _excess(value: float | None, chance: float | None) -> float:
    """(value − chance)/(1 − chance) within [0, 1]: 0 at chance or below, 1 for what is known whole."""
    if value is None or chance is None or chance >= 1:
        return 0.0
    return min(1.0, max(0.0, (value - chance) / (1.0 - chance)))


def forgotten(rows: Sequence[RowScores], chance: Sequence[RowScores]) -> float:
    """1 − mean over rows, and over probability and extraction strength, of what they have above chance, of all they
    could have: 1 where every row is at chance or below, 0 where every row is known whole."""
    names = ("probability", "extraction_strength")
    left = [_excess(row[name], other[name]) for row, other in zip(rows, chance, strict=True) for name in names]
    return 1.0 - float(np.mean(left))


def kept(*sets: Sequence[RowScores]) -> float | None:
    """Geometric mean over the sets of (mean probability of their rows + 0.01), so that its ratio to an earlier one is
    the mean of the sets' ratios; the 0.01 keeps a set that the model never knew from deciding it. Sets without rows
    are left out; None without any."""
    means = [defined_mean([row["probability"] for row in rows])[0] for rows in sets if rows]
    found = [mean for mean in means if mean is not None]
    return math.exp(sum(math.log(mean + _UNKNOWN) for mean in found) / len(found)) if found else None


def leak_values(leaked: Sequence[int], samples: int, seed: int = 0) -> dict[str, float | None]:
    """`leak@1` and `leak@SAMPLES` with their standard errors."""
    found: dict[str, float | None] = {}
    for k in sorted({1, samples}):
        rate = leak_at_k(list(leaked), samples, k, seed=seed)
        found[f"leak@{k}"] = rate.value
        found[f"leak@{k}_se"] = None if math.isnan(rate.error) else 0.0 if rate.error < _ROUNDING else rate.error
    return found


def membership(forget: Sequence[RowScores], holdout: Sequence[RowScores]) -> dict[str, float | None]:
    """`mia_min_k`, `mia_min_k_plus_plus`: AUC of holdout against forget rows; None where a side has no score."""
    found: dict[str, float | None] = {}
    for name in ("min_k", "min_k_plus_plus"):
        sides = [[row[name] for row in rows if row.get(name) is not None] for rows in (forget, holdout)]
        found[f"mia_{name}"] = auc(*sides) if all(sides) else None
    return found
