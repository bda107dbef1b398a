"""Independent 50-digit references: each generator as DESIGN's table prints it, in mpmath, with its derivative by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mpmath as mp

mp.mp.dps = 50


class Reference(NamedTuple):
    """f(t) and f'(t) of one entry, the inverse t(v) of f', and the table's f''(1), f(0⁺), f'(0⁺), f'(∞)."""

    spec: str | dict
    f: Callable
    df: Callable
    inverse: Callable | None
    curvature: float | None
    at_zero: float
    derivative_at_zero: float
    slope_at_infinity: float


_inf = float("inf")


def _js_f(t):
    return t * mp.log(t) - (1 + t) * mp.log((1 + t) / 2)


def _skew(w):
    w = mp.mpf(w)

    def m(t):
        return w * t + 1 - w

    return Reference(
        {"name": "skew_jensen_shannon", "weight": float(w)},
        lambda t: w * t * mp.log(t) - m(t) * mp.log(m(t)),
        lambda t: w * mp.log(t / m(t)),
        lambda v: (1 - w) * mp.exp(v / w) / (1 - w * mp.exp(v / w)),
        float(w * (1 - w)),
        float(-(1 - w) * mp.log(1 - w)),
        -_inf,
        float(-w * mp.log(w)),
    )


def _alpha(a):
    a = mp.mpf(a)
    return Reference(
        {"name": "alpha", "alpha": float(a)},
        lambda t: (t ** (1 - a) - (1 - a) * t - a) / (a * (a - 1)),
        lambda t: (1 - t**-a) / a,
        lambda v: (1 - a * v) ** (-1 / a),
        1.0,
        float(1 / (1 - a)),
        -_inf,
        float(1 / a),
    )


def _omega(z):
    """w with w + log w = z; for z < −200, w = e^z to 50 digits."""
    if z < -200:
        return mp.exp(z)
    return mp.lambertw(mp.exp(z)).real


REFERENCES = [
    Reference("reverse_kl", lambda t: t * mp.log(t) - t + 1, mp.log, mp.exp, 1, 1, -_inf, _inf),
    Reference("forward_kl", lambda t: -mp.log(t) + t - 1, lambda t: 1 - 1 / t, lambda v: 1 / (1 - v), 1, _inf, -_inf, 1),
    Reference(
        "jensen_shannon", _js_f, lambda t: mp.log(2 * t / (1 + t)), lambda v: mp.exp(v) / (2 - mp.exp(v)),
        0.5, float(mp.log(2)), -_inf, float(mp.log(2)),
    ),
    Reference(
        "jeffreys", lambda t: (t - 1) * mp.log(t), lambda t: mp.log(t) + 1 - 1 / t, lambda v: 1 / _omega(1 - v),
        2, _inf, -_inf, _inf,
    ),
    Reference(
        "squared_hellinger", lambda t: (mp.sqrt(t) - 1) ** 2, lambda t: 1 - 1 / mp.sqrt(t), lambda v: 1 / (1 - v) ** 2,
        0.5, 1, -_inf, 1,
    ),
    Reference(
        "neyman_chi2", lambda t: (1 - t) ** 2 / t, lambda t: 1 - t**-2, lambda v: 1 / mp.sqrt(1 - v),
        2, _inf, -_inf, 1,
    ),
    Reference("pearson_chi2", lambda t: (t - 1) ** 2, lambda t: 2 * (t - 1), lambda v: 1 + v / 2, 2, 1, -2, _inf),
    Reference(
        "chi2_kl", lambda t: (t - 1) ** 2 / 2 + t * mp.log(t) - t + 1, lambda t: t - 1 + mp.log(t),
        lambda v: _omega(1 + v), 2, 1.5, -_inf, _inf,
    ),
    Reference(
        "le_cam", lambda t: (t - 1) ** 2 / (t + 1), lambda t: (t - 1) * (t + 3) / (t + 1) ** 2,
        lambda v: 2 / mp.sqrt(1 - v) - 1, 1, 1, -3, 1,
    ),
    Reference("total_variation", lambda t: abs(t - 1) / 2, lambda t: mp.sign(t - 1) / 2, None, None, 0.5, -0.5, 0.5),
    *(_alpha(a) for a in (0.01, 0.1, 0.3, 0.5, 0.75, 0.99)),
    *(_skew(w) for w in (0.05, 0.3, 0.5, 0.9)),
]  # fmt: skip

IDS = [r.spec if isinstance(r.spec, str) else "-".join(str(v) for v in r.spec.values()) for r in REFERENCES]
