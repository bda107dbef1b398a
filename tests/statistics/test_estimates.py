"""Estimates from samples, by hand."""

import math

import pytest
import torch

from fdiv.divergences import get_divergence
from fdiv.statistics.estimates import divergence_estimate, mean_and_error


def test_mean_and_error_by_hand():
    mean, error = mean_and_error(torch.tensor([1.0, 3.0, 2.0, 6.0]))
    # deviations −2, 0, −1, 3: Σ² = 14, s² = 14/3, s/√4
    assert mean == 3.0 and error == pytest.approx(math.sqrt(14 / 3) / 2, rel=1e-6)
    mean, error = mean_and_error(torch.tensor([4.0]))
    assert mean == 4.0 and math.isnan(error)
    assert all(math.isnan(value) for value in mean_and_error(torch.tensor([])))
    assert math.isnan(mean_and_error(torch.tensor([1.0, math.nan]))[0])  # nothing is left out silently


def test_divergence_estimate_takes_the_completions_of_a_prompt_as_one():
    log_ratio = torch.tensor([[0.5, -0.5], [0.0, 1.0]]).double()
    terms = get_divergence("forward_kl").generator(log_ratio).mean(1)
    value, error = divergence_estimate(get_divergence("forward_kl"), log_ratio)
    assert value == pytest.approx(terms.mean().item(), rel=1e-12)
    assert error == pytest.approx((terms[0] - terms[1]).abs().item() / 2, rel=1e-12)  # s = |a − b|/√2, over √2
