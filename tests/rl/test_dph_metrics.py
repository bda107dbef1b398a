"""The standard errors of the rehearsal rows, and values that no divergence has."""

import math
from types import SimpleNamespace

import pytest
import torch

from fdiv.divergences import get_divergence
from fdiv.rl.dph.metrics import dph_metrics
from fdiv.statistics.estimates import divergence_estimate, within_bounds

ARGS = SimpleNamespace(max_exponent=10.0, coefficient_clip=None)


def logged(rows, values, divergence="forward_kl"):
    values = torch.tensor(values, dtype=torch.float64)
    columns = dict.fromkeys(("explore_loss", "rehearsal_loss", "tokens", "divergence", "forward_kl"), values)
    counted = torch.ones_like(values)
    examples = columns | {"counted": counted, "row": torch.tensor(rows, dtype=torch.float64)}
    return dph_metrics(examples, values, get_divergence(divergence), ARGS)


def test_a_cached_row_counts_once_however_often_it_is_rehearsed():
    once = logged([3, 1, 8, 2], [1.0, 4.0, 2.0, 7.0])
    thrice = logged([3, 1, 8, 2] * 3, [1.0, 4.0, 2.0, 7.0] * 3)
    expected = torch.tensor([1.0, 4.0, 2.0, 7.0]).std().item() / 2
    for metrics in (once, thrice):
        assert metrics["divergence/forward_kl"] == pytest.approx(3.5)
        assert metrics["divergence/forward_kl_se"] == pytest.approx(expected)
    # a row that moved between its two visits counts by its sum of residuals
    moved = logged([1, 1, 2, 3], [1.0, 3.0, 2.0, 6.0])
    residuals = torch.tensor([1.0 + 3.0 - 6.0, 2.0 - 3.0, 6.0 - 3.0])
    assert moved["divergence/forward_kl_se"] == pytest.approx((residuals.square().sum() * 3 / 2).sqrt().item() / 4)
    assert math.isnan(logged([5, 5], [1.0, 2.0])["divergence/forward_kl_se"])


def test_what_is_above_every_divergence_is_not_shown_as_one():
    """Jensen–Shannon is at most 2 log 2; a mean of f(u) of 2e26 came of rows that were no samples."""
    metrics = logged([1, 2], [1.0, 3e26], "jensen_shannon")
    assert math.isnan(metrics["divergence/jensen_shannon"]) and math.isnan(metrics["divergence/jensen_shannon_se"])
    assert metrics["divergence/forward_kl"] == pytest.approx(1.5e26)  # without bound
    js = get_divergence("jensen_shannon")
    assert within_bounds(js, 1.38, 0.1) == (1.38, 0.1)
    assert all(math.isnan(number) for number in within_bounds(js, 1.39, 0.1))
    assert all(math.isnan(number) for number in divergence_estimate(js, torch.tensor([60.0, 0.0])))
