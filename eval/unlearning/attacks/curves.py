"""The curve of an attack that has steps, in one number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["curve_area"]


def curve_area(steps: Sequence[int], values: Sequence[float]) -> float:
    """Area below a relearning curve by trapezoids, divided by its width: the mean height of the curve.

    Args:
        steps: rising; 0 first, whose value is that of the model before the attack.
        values: one per step.

    Raises:
        ValueError: fewer than two points, steps that do not rise, another number of values.
    """
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    if len(x) < 2 or len(x) != len(y) or not (np.diff(x) > 0).all():
        raise ValueError(
            f"a curve needs two or more rising steps with a value each, got {list(steps)}, {list(values)}"
        )
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))
