"""Calibration: how far confidence and accuracy lie apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ReliabilityBins",
    "expected_calibration_error",
    "length_normalised_calibration",
    "margin_calibration",
    "reliability_bins",
]


class ReliabilityBins(NamedTuple):
    """Per bin: `count`, mean `confidence` and `accuracy` (NaN in an empty bin), each `[bins]`."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as a field's name may
    confidence: Tensor
    accuracy: Tensor


def reliability_bins(confidence: Tensor, correct: Tensor, bins: int = 10) -> ReliabilityBins:
    """Sort examples into `bins` equal bins of [0, 1].

    Bin k = 0, 1, … holds the confidences in (k/bins, (k+1)/bins]; 0 goes to the first.

    Args:
        confidence: `[N]`, in [0, 1].
        correct: `[N]`, bool or 0/1 (0.5 for a tie is allowed).
        bins: number of bins, ≥ 1.

    Raises:
        ValueError: no examples, different shapes, a confidence outside [0, 1] or NaN, or `bins` < 1.
    """
    if bins < 1:
        raise ValueError(f"bins={bins}: calibration needs at least one bin")
    confidence, correct = confidence.detach().double().flatten(), correct.detach().double().flatten()
    if confidence.numel() == 0 or confidence.shape != correct.shape:
        raise ValueError(f"need equally many confidences and outcomes, got {len(confidence)} and {len(correct)}")
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError("a confidence lies outside [0, 1] or is NaN: pass probabilities")
    edges = torch.arange(1, bins, dtype=torch.float64, device=confidence.device) / bins
    index = torch.bucketize(confidence, edges)
    zeros = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    count = zeros.index_add(0, index, torch.ones_like(confidence))
    return ReliabilityBins(
        count, zeros.index_add(0, index, confidence) / count, zeros.index_add(0, index, correct) / count
    )


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 10) -> float:
    """ECE = Σ_b (n_b/N)·|accuracy_b − confidence_b| over equal-width bins (Naeini et al. 2015; Guo et al. 2017).

    Arguments and errors as in `reliability_bins`. 0 is perfectly calibrated, 1 the worst.
    """
    counted = reliability_bins(confidence, correct, bins)
    gap = (counted.accuracy - counted.confidence).abs().nan_to_num(0.0)
    return ((counted.count / counted.count.sum()) * gap).sum().item()


def length_normalised_calibration(
    chosen_mean_log_prob: Tensor, rejected_mean_log_prob: Tensor, bins: int = 10
) -> float:
    """The f-DPO paper's ECE: confidence = exp(mean-token log-prob of chosen), correct = that mean above rejected's.

    Args:
        chosen_mean_log_prob: `[N]`, log π(y_w|x)/|y_w|, ≤ 0.
        rejected_mean_log_prob: `[N]`, the same of y_l.
        bins: number of equal bins of [0, 1] (the paper's code uses 10).
    """
    confidence = chosen_mean_log_prob.double().exp().clamp(max=1.0)
    return expected_calibration_error(confidence, chosen_mean_log_prob > rejected_mean_log_prob, bins)


def margin_calibration(margin: Tensor, bins: int = 10) -> float:
    """ECE of the implied preference probability: P(y_w ≻ y_l) = σ(margin), margin = β(f′(u_w) − f′(u_l)).

    The model predicts the preference with the larger implicit reward, so confidence = σ(|margin|) ∈ [½, 1] and
    correct = margin > 0; an exact tie is a coin toss: confidence ½, correct ½.
    """
    correct = (margin > 0).double() + 0.5 * (margin == 0).double()
    return expected_calibration_error(torch.sigmoid(margin.double().abs()), correct, bins)
