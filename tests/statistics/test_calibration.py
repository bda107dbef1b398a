"""Expected calibration error: counted by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fdiv.statistics.calibration import (
    expected_calibration_error,
    length_normalised_calibration,
    margin_calibration,
    reliability_bins,
)


def test_ece_by_hand():
    """Two bins in use: (0.1, 0.2] has confidences .15, .2, one right; (0.8, 0.9] has .85, .85, .9, all right.

    ECE = 2/5·|1/2 − .175| + 3/5·|1 − 13/15| = .13 + .08 = .21.
    """
    confidence = torch.tensor([0.15, 0.2, 0.85, 0.85, 0.9], dtype=torch.float64)
    correct = torch.tensor([1, 0, 1, 1, 1])
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.21, abs=1e-12)
    bins = reliability_bins(confidence, correct)
    assert bins.count.tolist() == [0, 2, 0, 0, 0, 0, 0, 0, 3, 0]
    assert bins.accuracy[1].item() == 0.5 and bins.confidence[1].item() == pytest.approx(0.175)
    assert math.isnan(bins.accuracy[0].item())


def test_edges_belong_to_the_lower_bin_and_zero_to_the_first():
    edges = torch.arange(11, dtype=torch.float64) / 10
    assert reliability_bins(edges, torch.ones(11)).count.tolist() == [2] + [1] * 9


def test_one_bin_is_the_gap_of_the_means():
    confidence = torch.tensor([0.2, 0.4, 0.9])
    assert expected_calibration_error(confidence, torch.tensor([1, 0, 1]), bins=1) == pytest.approx(2 / 3 - 0.5)


def test_perfect_and_worst():
    assert expected_calibration_error(torch.ones(7), torch.ones(7)) == 0.0
    assert expected_calibration_error(torch.ones(7), torch.zeros(7)) == 1.0


def test_ece_is_not_the_mean_of_batch_eces():
    """Why it is computed over the whole evaluation set: two batches, each off, together calibrated."""
    confidence, correct = torch.full((4,), 0.75), torch.tensor([1, 1, 1, 0])
    assert expected_calibration_error(confidence, correct) == 0.0
    halves = [expected_calibration_error(confidence[i : i + 2], correct[i : i + 2]) for i in (0, 2)]
    assert sum(halves) / 2 == pytest.approx(0.25)


def test_length_normalised_form():
    """Confidences e^-0.5 = .6065 (right) and e^-2 = .1353 (wrong): ECE = ½(1 − .6065) + ½(.1353)."""
    chosen, rejected = torch.tensor([-0.5, -2.0]), torch.tensor([-1.0, -1.5])
    expected = 0.5 * (1 - math.exp(-0.5)) + 0.5 * math.exp(-2.0)
    assert length_normalised_calibration(chosen, rejected) == pytest.approx(expected, abs=1e-9)


def test_margin_form():
    """σ(|±2|) = .8808: one right, one wrong, bin accuracy ½; the tie has confidence ½ and counts as half right."""
    margin = torch.tensor([2.0, -2.0, 0.0])
    sigma = 1 / (1 + math.exp(-2.0))
    assert margin_calibration(margin) == pytest.approx(2 / 3 * (sigma - 0.5), abs=1e-9)
    assert margin_calibration(torch.zeros(5)) == 0.0
    assert margin_calibration(torch.full((3,), 1e4)) == pytest.approx(0.0, abs=1e-12)


def test_bad_input():
    with pytest.raises(ValueError, match="bins=0"):
        reliability_bins(torch.ones(1), torch.ones(1), bins=0)
    with pytest.raises(ValueError, match="outside"):
        reliability_bins(torch.tensor([1.5]), torch.ones(1))
    with pytest.raises(ValueError, match="outside"):
        reliability_bins(torch.tensor([math.nan]), torch.ones(1))
    with pytest.raises(ValueError, match="equally many"):
        reliability_bins(torch.ones(2), torch.ones(3))
