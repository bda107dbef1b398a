"""Pass@k and its relatives, from the number of samples and the number of correct ones of every problem.

Counts in, numbers out: no texts, no models. Problem i has n_i samples, c_i of them correct; every estimator is the
average over all subsets of k of the n samples (sampled without replacement), hence unbiased for what k fresh samples
would give, and defined for k ≤ n only. Values come per problem, `[N]` for one k and `[N, K]` for several; average
them over problems, and give them to `bootstrap_standard_error`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

__all__ = [
    "KeepExplore",
    "bootstrap_standard_error",
    "g_pass_at_k",
    "keep_and_explore",
    "majority_at_n",
    "mean_at_n",
    "mg_pass_at_k",
    "pass_at_k",
    "pass_hat_k",
]

_NEAR = 1e-9
_CHUNK = 1_000_000


def pass_at_k(num_correct, num_samples, k: int | Sequence[int]) -> np.ndarray:
    r"""Probability that at least one of k samples is correct: 1 − C(n−c, k)/C(n, k) (arXiv:2107.03374, eq. 1).

    Computed as −expm1(Σ_{i<k} log1p(−c/(n−i))): no factorial is formed, so n may be in the thousands, and a small
    value keeps its relative precision. All k share one running sum over the distinct pairs (n, c).

    Args:
        num_correct: c, `[N]` whole numbers, 0 ≤ c ≤ n.
        num_samples: n, `[N]`, or one number for all problems.
        k: one k, or several.
    Returns:
        `[N]` for one k, `[N, K]` for several.
    Raises:
        ValueError: counts that are no such numbers, k < 1, or a problem with fewer than k samples.
    """
    return _per_pair(_any_correct, num_correct, num_samples, k)


def pass_hat_k(num_correct, num_samples, k: int | Sequence[int]) -> np.ndarray:
    """pass^k, the probability that all of k samples are correct: C(c, k)/C(n, k). Arguments as of `pass_at_k`."""
    return _per_pair(_all_correct, num_correct, num_samples, k)


def mean_at_n(num_correct, num_samples) -> np.ndarray:
    """Share of correct samples c/n, `[N]`; the same number as pass@1.

    Args:
        num_correct: c, `[N]`. num_samples: n, `[N]`, or one number.
    """
    correct, samples = _counts(num_correct, num_samples)
    _check_k(samples, np.array([1]))
    return correct / samples


def g_pass_at_k(num_correct, num_samples, k: int, threshold: float) -> np.ndarray:
    """G-Pass@k_τ: probability that at least ⌈τk⌉ of k samples are correct (arXiv:2412.13147), `[N]`.

    The tail of a hypergeometric distribution; τ → 0 is pass@k, τ = 1 is pass^k. ⌈τk⌉ is at least 1, and a product
    within 1e-9 of a whole number is that number (0.07 · 100 is 7, not 8).

    Args:
        num_correct, num_samples, k: as of `pass_at_k`, one k.
        threshold: τ, 0 < τ ≤ 1.

    Raises:
        ValueError: a threshold outside (0, 1]; what `pass_at_k` refuses.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: τ of G-Pass@k must lie in (0, 1]")
    needed = max(1, math.ceil(threshold * k - _NEAR))
    return _per_pair(lambda n, c, largest: _tail(n, c, largest, needed), num_correct, num_samples, k)


def mg_pass_at_k(num_correct, num_samples, k: int) -> np.ndarray:
    """mG-Pass@k: (2/k) Σ_{i=⌈k/2⌉+1}^{k} G-Pass@k_{i/k} (arXiv:2412.13147), `[N]`; needs k ≥ 2.

    Twice the area under G-Pass@k over τ from ½ to 1. For odd k the sum has (k−1)/2 terms, so the best value is
    (k−1)/k, as in the paper's formula.

    Args:
        num_correct: c, `[N]`. num_samples: n, `[N]`, or one number. k: at least 2.

    Raises:
        ValueError: k below 2; what `pass_at_k` refuses.
    """
    if k < 2:
        raise ValueError(f"k={k}: mG-Pass@k needs k of at least 2")
    half = math.ceil(k / 2)

    def area(n: np.ndarray, c: np.ndarray, largest: int) -> np.ndarray:
        return sum(_tail(n, c, largest, needed) for needed in range(half + 1, k + 1)) * 2 / k

    return _per_pair(area, num_correct, num_samples, k)


def majority_at_n(
    answers: Sequence[Sequence[Hashable | None]], correct: Sequence[Sequence[bool | None]]
) -> np.ndarray:
    """maj@n: whether the most frequent answer of a problem's n samples is correct, `[N]`.

    Equal answers vote together. None, no answer found, does not vote. Several answers with equally many votes share
    the problem: the value is the fraction of them that is correct, which is what a fair draw among them would give.
    Where samples with one answer were judged differently, the answer counts as correct by the share of those judged
    so; samples that were not judged (None) vote but say nothing about correctness. A problem without any answer, or
    whose winning answer was never judged, counts 0.

    Args:
        answers: per problem, per sample, the answer in a normal form that makes equal answers equal.
        correct: per problem, per sample, whether the sample is correct.
    """
    return np.array([_majority(a, c) for a, c in zip(answers, correct, strict=True)], dtype=float)


def bootstrap_standard_error(values, *, resamples: int = 1000, seed: int = 0) -> np.ndarray | float:
    """Standard error of the mean over problems, by resampling the problems with replacement.

    As the number of resamples grows it goes to the population standard deviation over √N. NaN for a single problem,
    which says nothing about the spread over problems.

    Args:
        values: `[N]`, or `[N, K]` for K statistics of the same problems (resampled together).
        resamples: number of bootstrap samples.
        seed: the same seed, the same number.
    Returns:
        A number for `[N]`, `[K]` for `[N, K]`.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return np.full(values.shape[1:], np.nan) if values.ndim > 1 else math.nan
    weights = (w / len(values) for w in _resampled(len(values), resamples, seed))
    error = np.concatenate([w @ values for w in weights]).std(axis=0, ddof=1)
    return error if values.ndim > 1 else float(error)


class KeepExplore(NamedTuple):
    """Rates against the base model with standard errors; None where no problem can be kept or explored."""

    keep: float | None
    keep_se: float | None
    explore: float | None
    explore_se: float | None


def keep_and_explore(base_pass, pass_, *, resamples: int = 1000, seed: int = 0) -> KeepExplore:
    r"""Keep rate and explore rate of a model against its base (arXiv:2509.07430).

    Keep rate: the fraction of the problems the base solves that the model still solves. Explore rate: the fraction of
    the problems the base does not solve that the model solves. "Solved" is: at least one of k samples correct. With
    n = k samples, b and p below are 0 or 1 and the rates are ratios of two counts; with n > k they are the ratios of
    the expected counts over subsets of k samples of either model, Σ b p / Σ b and Σ (1−b) p / Σ (1−b).

    Args:
        base_pass: b, pass@k of the base per problem, `[N]`.
        pass_: p, pass@k of the model on the same problems, `[N]`.
        resamples, seed: of the bootstrap over problems.

    Raises:
        ValueError: the two are not lists of one length.
    """
    base, own = np.asarray(base_pass, dtype=float), np.asarray(pass_, dtype=float)
    if base.shape != own.shape or base.ndim != 1:
        raise ValueError(f"pass@k of the base, {base.shape}, and of the model, {own.shape}, must be two equal lists")
    keep, keep_se = _ratio(base * own, base, resamples, seed)
    explore, explore_se = _ratio((1 - base) * own, 1 - base, resamples, seed)
    return KeepExplore(keep, keep_se, explore, explore_se)


# ---------------------------------------------------------------- the estimators on distinct pairs (n, c)
def _log_none(samples: np.ndarray, hits: np.ndarray, largest: int) -> np.ndarray:
    """log C(n−h, k)/C(n, k) for k = 1 … largest, `[U, largest]`: no hit among k draws without replacement."""
    remaining = samples[:, None] - np.arange(largest)
    with np.errstate(divide="ignore"):
        return np.log1p(-np.minimum(1.0, hits[:, None] / remaining)).cumsum(axis=1)


def _any_correct(samples: np.ndarray, correct: np.ndarray, largest: int) -> np.ndarray:
    return -np.expm1(_log_none(samples, correct, largest))


def _all_correct(samples: np.ndarray, correct: np.ndarray, largest: int) -> np.ndarray:
    return np.exp(_log_none(samples, samples - correct, largest))


def _tail(samples: np.ndarray, correct: np.ndarray, k: int, needed: int) -> np.ndarray:
    """P(at least `needed` of k correct), `[U, 1]`."""
    from scipy.stats import hypergeom

    return hypergeom.sf(needed - 1, samples, correct, k)[:, None]


def _per_pair(estimate, num_correct, num_samples, k: int | Sequence[int]) -> np.ndarray:
    """`estimate(n, c, largest k)` on the distinct pairs of counts, spread over problems; its last axis is k."""
    correct, samples = _counts(num_correct, num_samples)
    wanted = np.atleast_1d(np.asarray(k))
    if wanted.dtype.kind not in "iu" or wanted.ndim != 1:
        raise ValueError(f"k={k!r}: give whole numbers")
    _check_k(samples, wanted)
    # One number for a pair makes `unique` fast; c ≤ n, so the pairs cannot meet.
    pairs, where = np.unique(samples * (samples.max() + 1) + correct, return_inverse=True)
    n, c = np.divmod(pairs, samples.max() + 1)
    largest = int(wanted.max())
    table = estimate(n, c, largest)  # of k = 1 … largest, or of one k
    table = table[:, wanted - 1] if table.shape[1] == largest else table
    values = table.take(where, axis=0)
    return values if np.ndim(k) else values[:, 0]


def _counts(num_correct, num_samples) -> tuple[np.ndarray, np.ndarray]:
    correct = np.asarray(num_correct)
    if correct.ndim != 1 or not len(correct):
        raise ValueError(
            f"num_correct has shape {correct.shape}: give one count per problem, and at least one problem"
        )
    samples = np.broadcast_to(np.asarray(num_samples), correct.shape)
    for name, counts in (("num_correct", correct), ("num_samples", samples)):
        if counts.dtype.kind not in "iu":
            raise ValueError(f"{name} holds {counts.dtype}: counts are whole numbers")
    bad = np.flatnonzero((correct < 0) | (correct > samples))
    if len(bad):
        i = bad[0]
        raise ValueError(
            f"problem {i}: {correct[i]} of {samples[i]} samples correct: needs 0 ≤ num_correct ≤ num_samples"
        )
    return correct.astype(np.int64), samples.astype(np.int64)


def _check_k(samples: np.ndarray, wanted: np.ndarray) -> None:
    if not len(wanted) or wanted.min() < 1:
        raise ValueError(f"k={wanted.tolist()}: must be at least 1")
    short = np.flatnonzero(samples < wanted.max())
    if len(short):
        raise ValueError(
            f"k={wanted.max()} is more than the {samples[short[0]]} samples of problem {short[0]}: k cannot be "
            "sampled from fewer; sample more, or lower k"
        )


def _majority(answers: Sequence[Hashable | None], correct: Sequence[bool | None]) -> float:
    votes: dict[Hashable, int] = {}
    judged: dict[Hashable, list[bool]] = {}
    for answer, right in zip(answers, correct, strict=True):
        if answer is not None:
            votes[answer] = votes.get(answer, 0) + 1
            if right is not None:
                judged.setdefault(answer, []).append(right)
    most = max(votes.values(), default=0)
    winners = [answer for answer, count in votes.items() if count == most]
    shares = [np.mean(judged[answer]) if answer in judged else 0.0 for answer in winners]
    return float(np.mean(shares)) if shares else 0.0


# ---------------------------------------------------------------- bootstrap
def _resampled(problems: int, resamples: int, seed: int):
    """How often each problem is in a resample, `[some resamples, N]` at a time, so that memory stays bounded."""
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK // problems)
    for start in range(0, resamples, step):
        drawn = generator.integers(problems, size=(min(step, resamples - start), problems))
        yield np.stack([np.bincount(row, minlength=problems) for row in drawn]).astype(float)


def _ratio(part: np.ndarray, whole: np.ndarray, resamples: int, seed: int) -> tuple[float | None, float | None]:
    """Σ part / Σ whole and its bootstrap standard error; (None, None) where the whole is empty."""
    if not whole.sum() > 0:
        return None, None
    parts, wholes = zip(*((w @ part, w @ whole) for w in _resampled(len(part), resamples, seed)), strict=True)
    parts, wholes = np.concatenate(parts), np.concatenate(wholes)
    usable = wholes > 0  # a resample without any such problem has no rate
    spread = (parts[usable] / wholes[usable]).std(ddof=1) if usable.sum() > 1 and len(part) > 1 else None
    return float(part.sum() / whole.sum()), None if spread is None else float(spread)
