"""Which verified samples of a prompt are rehearsed, and what each row weighs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

__all__ = ["WEIGHTS", "distinct_first", "row_weights"]

#: What counts the same in the rehearsal loss: each prompt, each mode of a prompt, or each cached sample.
WEIGHTS = ("prompts", "modes", "samples")


def distinct_first(modes: Sequence[Hashable], most: int) -> list[int]:
    """Positions of up to `most` samples, in order: the first of each mode, then the second of each, and so on.

    >>> distinct_first(["a", "a", "b", "a"], 3)
    [0, 1, 2]
    """
    rounds: Counter[Hashable] = Counter()
    order = []
    for position, mode in enumerate(modes):
        order.append((rounds[mode], position))
        rounds[mode] += 1
    return sorted(position for _, position in sorted(order)[:most])


def row_weights(rows: Sequence[tuple[int, Hashable]], uniform_over: str) -> list[float]:
    """Weights of the rows of a cache, with mean 1.

    With R rows, of which row r belongs to a prompt (a mode of a prompt) with m_r rows, among G prompts (modes) with
    rows: w_r = R/(G·m_r), so that every prompt (mode) has the same total. Over samples every row weighs 1. A pass over
    the cache then has the mean Σ w_r ℓ_r / R, in which each prompt, mode or sample counts the same.

    Args:
        rows: (prompt, mode) of each row.
        uniform_over: one of `WEIGHTS`.

    Raises:
        ValueError: another word.
    """
    if uniform_over not in WEIGHTS:
        raise ValueError(f"weights={uniform_over!r}: must be one of {', '.join(WEIGHTS)}")
    if uniform_over == "samples":
        return [1.0] * len(rows)
    groups = [prompt for prompt, _ in rows] if uniform_over == "prompts" else list(rows)
    size: Mapping[Hashable, int] = Counter(groups)
    return [len(rows) / (len(size) * size[group]) for group in groups]
