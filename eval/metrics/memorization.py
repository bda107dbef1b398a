"""Extraction strength and exact memorisation, from teacher-forced argmax hits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def extraction_strength(is_top1: Sequence[bool] | np.ndarray, *, floor: bool = True) -> float:
    """ES = 1 - k/L: the share of the answer that teacher forcing reproduces to its end (Carlini et al. 2021,
    arXiv:2012.07805).

    Args:
        is_top1: [L] whether the argmax equals the label at each answer position (the caller has dropped what its
            preset drops).
        floor: True is open-unlearning's loop, which stops at k = L-1 even when the last token misses, so its lowest
            value is 1/L; False lets k reach L, so ES can be 0.
    Returns:
        ES in [0, 1]; 0 for an empty answer, as open-unlearning.
    """
    hits = np.asarray(is_top1, dtype=bool)
    if hits.size == 0:
        return 0.0
    misses = np.flatnonzero(~hits)
    first_kept = 0 if misses.size == 0 else int(misses[-1]) + 1
    if floor:
        first_kept = min(first_kept, hits.size - 1)
    return 1.0 - first_kept / hits.size


def exact_memorization(is_top1: Sequence[bool] | np.ndarray) -> float | None:
    """Share of answer positions whose teacher-forced argmax is the label (Tirumala et al. 2022); None for an empty
    answer.

    Args:
        is_top1: `[L]`, whether each token of the answer is the likeliest one.
    """
    hits = np.asarray(is_top1, dtype=bool)
    return float(hits.mean()) if hits.size else None
