"""TOFU's probability, truth ratio, forget quality and model utility, as functions of per-item losses.

Everything takes length-normalised answer losses, `avg_loss = -(1/|y|) sum_t log p(y_t | x, y_<t)` in nats, with the
end-of-text label counted (Maini et al. 2024, arXiv:2401.06121, section 2.2; open-unlearning, arXiv:2506.12618).
Which variant belongs to which benchmark is written in `fdiv.eval.benchmark.presets`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

TRUTH_RATIO_MEANS = ("geometric", "arithmetic")
_LARGEST_LOG = 709.0  # exp of more is infinite in float64, and infinity is no JSON


def sequence_probability(avg_loss: np.ndarray) -> np.ndarray:
    """Length-normalised probability of an answer, P(y|x)^(1/|y|) = exp(-avg_loss); any shape, underflows to 0."""
    return np.exp(-np.asarray(avg_loss, dtype=np.float64))


def _pair(correct_loss: np.ndarray, wrong_loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    correct, wrong = np.asarray(correct_loss, dtype=np.float64), np.asarray(wrong_loss, dtype=np.float64)
    if wrong.ndim == 1:
        wrong = wrong[:, None]
    if correct.ndim != 1 or wrong.ndim != 2 or len(correct) != len(wrong) or wrong.shape[1] == 0:
        raise ValueError(
            f"expected correct losses [N] and wrong losses [N, K>0], got {correct.shape} and {wrong.shape}"
        )
    if not (np.isfinite(correct).all() and np.isfinite(wrong).all()):
        raise ValueError("answer losses hold NaN or infinity: no truth ratio can be formed from them")
    return correct, wrong


def truth_ratio(
    correct_loss: np.ndarray, wrong_loss: np.ndarray, *, mean: str = "geometric", epsilon: float = 1e-10
) -> np.ndarray:
    """Truth ratio of every item, R = mean_k p(wrong_k) / (p(correct) + epsilon).

    Args:
        correct_loss: [N] losses of the paraphrased (or plain) true answer.
        wrong_loss: [N, K] losses of the K perturbed answers.
        mean: `geometric` takes exp(-mean_k loss_k), as open-unlearning and the TOFU authors' code do; `arithmetic`
            takes mean_k exp(-loss_k), as the TOFU paper writes it.
        epsilon: 1e-10 in open-unlearning; with 0 the ratio is formed in log space, so it never underflows to 0/0.
    Returns:
        [N] ratios, >= 0 and finite: e^709 stands for everything above it.

    Raises:
        ValueError: an unknown `mean`; arrays that do not belong together.
    """
    correct, wrong = _pair(correct_loss, wrong_loss)
    if mean not in TRUTH_RATIO_MEANS:
        raise ValueError(f"mean={mean!r}: choose one of {', '.join(TRUTH_RATIO_MEANS)}")
    if mean == "geometric":
        log_wrong = -wrong.mean(axis=1)
    else:
        log_wrong = np.logaddexp.reduce(-wrong, axis=1) - math.log(wrong.shape[1])
    if epsilon == 0.0:
        return np.exp(np.minimum(log_wrong + correct, _LARGEST_LOG))
    return np.exp(log_wrong) / (np.exp(-correct) + epsilon)


def knowledge_share(correct_loss: np.ndarray, wrong_loss: np.ndarray, epsilon: float = 1e-10) -> np.ndarray:
    """p(correct) / (p(correct) + p(wrong) + epsilon), p(wrong) geometric over the perturbations; [N] in [0, 1].

    This is open-unlearning's `prob_mean` reading of the truth ratio (its report's meta-evaluation).

    Args:
        correct_loss: `[N]`, nats per token. wrong_loss: `[N, K]` of the perturbed answers.
    """
    correct, wrong = _pair(correct_loss, wrong_loss)
    p_correct, p_wrong = np.exp(-correct), np.exp(-wrong.mean(axis=1))
    return p_correct / (p_correct + p_wrong + epsilon)


def closer_to_one(ratio: np.ndarray, epsilon: float = 1e-10) -> float:
    """mean_i min(R_i, 1/(R_i + epsilon)): the forget-set truth ratio, 1 when wrong and true answers are equally
    likely. ValueError for no rows, a negative ratio or NaN."""
    ratio = _ratios(ratio)
    with np.errstate(divide="ignore"):
        return float(np.mean(np.minimum(ratio, 1.0 / (ratio + epsilon))))


def true_better(ratio: np.ndarray) -> float:
    """mean_i max(0, 1 - R_i): the truth ratio of retain, real-author and world-fact rows, 1 when only the truth is
    likely. ValueError for no rows, a negative ratio or NaN."""
    return float(np.mean(np.maximum(0.0, 1.0 - _ratios(ratio))))


def _ratios(ratio: np.ndarray) -> np.ndarray:
    ratio = np.asarray(ratio, dtype=np.float64)
    if not ratio.size or not (ratio >= 0).all():
        raise ValueError(f"truth ratios {ratio.tolist()[:5]}: give at least one, none of them negative or NaN")
    return ratio


def option_probability(correct: np.ndarray, wrong: np.ndarray, epsilon: float = 1e-10) -> np.ndarray:
    """p_true / (p_true + sum_k p_wrong,k + epsilon) per item, from length-normalised probabilities [N] and [N, K].

    Args:
        correct: `[N]`. wrong: `[N, K]`. epsilon: added to the denominator.

    Raises:
        ValueError: every option of a row has probability 0, and `epsilon` is 0.
    """
    correct, wrong = np.asarray(correct, dtype=np.float64), np.asarray(wrong, dtype=np.float64)
    total = correct + wrong.reshape(len(wrong), -1).sum(axis=1) + epsilon
    if (total == 0).any():
        raise ValueError(
            f"item {int(np.argmin(total))}: every option's probability underflows to 0, so the share is 0/0; "
            "a preset with epsilon > 0 (open_unlearning) defines it as 0"
        )
    return correct / total


@dataclass(frozen=True)
class ForgetQuality:
    """Two-sample Kolmogorov-Smirnov test: p-value, statistic D, the method scipy used, and both sample sizes."""

    p_value: float
    statistic: float
    method: str
    sizes: tuple[int, int]


def forget_quality(ratio: np.ndarray, retain_ratio: np.ndarray) -> ForgetQuality:
    """KS test between the truth ratios of a model and of the retain model; p is TOFU's forget quality.

    scipy's exact p-value is used for up to 10,000 rows a side; where it fails, scipy's asymptotic value is taken and
    `method` says so. Raises ValueError for fewer than two rows on a side, where the test says nothing.

    Args:
        ratio: `[N]` truth ratios of the model. retain_ratio: `[M]` of the retain model.
    """
    from scipy.stats import ks_2samp

    ratio, retain_ratio = np.asarray(ratio, dtype=np.float64), np.asarray(retain_ratio, dtype=np.float64)
    if min(len(ratio), len(retain_ratio)) < 2:
        raise ValueError(f"forget quality needs at least two rows a side, got {len(ratio)} and {len(retain_ratio)}")
    if np.isnan(ratio).any() or np.isnan(retain_ratio).any():
        raise ValueError("truth ratios hold NaN")
    method = "exact" if max(len(ratio), len(retain_ratio)) <= 10_000 else "asymp"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        test = ks_2samp(ratio, retain_ratio, method=method)
    if any("Exact calculation unsuccessful" in str(w.message) for w in caught):
        method = "asymp (exact failed)"
    return ForgetQuality(float(test.pvalue), float(test.statistic), method, (len(ratio), len(retain_ratio)))


def model_utility(parts: Mapping[str, float]) -> float:
    """Harmonic mean of the nine parts {probability, ROUGE-L recall, truth ratio} x {retain, real authors, world
    facts}.

    A part of exactly 0 makes the whole 0. Raises ValueError for a negative or non-finite part, or no parts.
    """
    from scipy.stats import hmean

    if not parts:
        raise ValueError("model utility of no parts")
    for name, value in parts.items():
        if value is None or not math.isfinite(value) or value < 0:
            raise ValueError(f"model utility: part {name} is {value}, expected a number >= 0")
    values = np.array(list(parts.values()), dtype=np.float64)
    return 0.0 if (values == 0).any() else float(hmean(values))
