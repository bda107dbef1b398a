"""Membership-inference scores, their AUC, and PrivLeak.

Sign convention of open-unlearning: a *higher* score means *less* likely a member, holdout rows are the positive
class, so AUC = 1 when the forget rows are far more likely than the holdout rows, 0.5 when they cannot be told apart.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import numpy as np

ATTACKS = ("loss", "zlib", "reference", "gradnorm", "min_k", "min_k_plus_plus")


def zlib_score(avg_loss: float, text: str) -> float:
    """avg_loss / len(zlib.compress(text)) (Carlini et al. 2021, arXiv:2012.07805)."""
    return avg_loss / len(zlib.compress(text.encode("utf-8")))


def reference_score(avg_loss: float, reference_avg_loss: float) -> float:
    """loss - reference model's loss: calibrates for how hard the text is."""
    return avg_loss - reference_avg_loss


def gradnorm_score(parameter_norms: Iterable[float]) -> float:
    """Mean over parameters of the norm of the loss gradient (arXiv:2402.17012); ValueError when nothing has a
    gradient.

    Args:
        parameter_norms: the norm of the loss's gradient for every parameter that has one.
    """
    norms = np.fromiter(parameter_norms, dtype=np.float64)
    if norms.size == 0:
        raise ValueError("gradient-norm score: no parameter has a gradient (are all parameters frozen?)")
    return float(norms.mean())


def _lowest_mean(values: np.ndarray, k: float, at_least_one: bool) -> float | None:
    if not 0 < k <= 1:
        raise ValueError(f"Min-K share k={k}: expected 0 < k <= 1")
    count = int(len(values) * k)
    if at_least_one:
        count = max(1, count)
    if len(values) == 0 or count == 0:
        return None
    return float(np.mean(np.sort(values)[:count]))


def min_k_score(log_probs: Sequence[float] | np.ndarray, k: float = 0.4, *, at_least_one: bool = True) -> float | None:
    """Min-K% (Shi et al. 2024, arXiv:2310.16789): minus the mean of the lowest k of the token log-probs [L].

    `at_least_one=False` is MUSE's own count int(k*L), which may be 0; then, and for L=0, the score is None.

    Args:
        log_probs: `[L]`, of the tokens, in nats. k: the share of tokens that count, 0 < k ≤ 1.
    """
    lowest = _lowest_mean(np.asarray(log_probs, dtype=np.float64), k, at_least_one)
    return None if lowest is None else -lowest


def min_k_plus_plus_score(
    log_probs: Sequence[float] | np.ndarray,
    mean: Sequence[float] | np.ndarray,
    variance: Sequence[float] | np.ndarray,
    k: float = 0.4,
    *,
    minimum_variance: float = 1e-6,
    at_least_one: bool = True,
) -> float | None:
    """Min-K%++ (Zhang et al. 2025, arXiv:2404.02936): Min-K of (log p - mu) / sigma.

    mu and sigma^2 are the mean and variance of log p(z) for z sampled from the model's own next-token distribution,
    [L] each; sigma^2 is clamped from below.

    Args:
        log_probs: `[L]`, of the tokens, in nats. mean, variance: see above.
        k: the share of tokens that count, 0 < k ≤ 1. at_least_one: as of `min_k_score`.
        minimum_variance: what the variance is raised to.
    """
    log_probs, mean, variance = (np.asarray(x, dtype=np.float64) for x in (log_probs, mean, variance))
    scores = (log_probs - mean) / np.sqrt(np.maximum(variance, minimum_variance))
    lowest = _lowest_mean(scores, k, at_least_one)
    return None if lowest is None else -lowest


def auc(forget_scores: Sequence[float] | np.ndarray, holdout_scores: Sequence[float] | np.ndarray) -> float:
    """P(holdout score > forget score) + ½ P(equal): area under the ROC curve with holdout as the positive class.

    Raises ValueError for an empty side or a NaN score: there is no default AUC.

    Args:
        forget_scores: `[N]`. holdout_scores: `[M]`; higher means less familiar.
    """
    from scipy.stats import rankdata

    forget, holdout = np.asarray(forget_scores, dtype=np.float64), np.asarray(holdout_scores, dtype=np.float64)
    if not len(forget) or not len(holdout):
        raise ValueError(f"AUC needs rows on both sides, got {len(forget)} forget and {len(holdout)} holdout scores")
    both = np.concatenate([forget, holdout])
    if np.isnan(both).any():
        raise ValueError("AUC: a membership score is NaN")
    rank_sum = rankdata(both)[len(forget) :].sum()
    return float((rank_sum - len(holdout) * (len(holdout) + 1) / 2) / (len(forget) * len(holdout)))


def privleak(model_auc: float, retain_auc: float, *, epsilon: float = 1e-10) -> float:
    """PrivLeak = 100 ((1-AUC) - (1-AUC_retain)) / (1-AUC_retain + epsilon), in percent (Shi et al. 2024,
    arXiv:2407.06460).

    0 is the retain model's level, -100 a model that still knows every forget row. MUSE's own code has epsilon = 0 and
    writes A for 1-AUC. Raises ValueError for a retain AUC of 1, where epsilon alone would be the denominator, and for
    an AUC outside [0, 1].

    Args:
        model_auc: Min-K AUC of the model, 0 to 1. retain_auc: that of the retrained model.
    """
    score, reference = 1.0 - model_auc, 1.0 - retain_auc
    for name, value in (("model", model_auc), ("retain model", retain_auc)):
        if not 0 <= value <= 1:
            raise ValueError(f"PrivLeak: the AUC of the {name} is {value}, expected a number in [0, 1]")
    if reference < 1e-9:  # 1 but for rounding: an AUC is a multiple of ½ over the number of pairs
        raise ValueError("PrivLeak: the retain model's AUC is 1, so the ratio has no finite value")
    return (score - reference) / (reference + epsilon) * 100.0


def relative_difference(model_auc: float, retain_auc: float, *, epsilon: float = 1e-10) -> float:
    """open-unlearning's `rel_diff`: 100 (AUC - AUC_retain) / (AUC_retain + epsilon)."""
    return (model_auc - retain_auc) / (retain_auc + epsilon) * 100.0
