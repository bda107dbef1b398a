"""Estimates from samples: quantiles of log-ratios, divergences with their standard errors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fdiv.divergences import Divergence

__all__ = [
    "clustered_mean",
    "density_weight_quantiles",
    "divergence_estimate",
    "log_ratio_quantiles",
    "mean_and_error",
    "weighted_mean",
    "within_bounds",
]


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of `values[N]` and its standard error s/√N with s² = Σ (v − mean)²/(N − 1).

    Returns:
        (mean, standard error); both NaN for N = 0, the error NaN for N = 1.
    """
    error = values.std(correction=1).item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return (values.mean().item() if len(values) else math.nan), error


_QUANTILES = (("p05", 0.05), ("p50", 0.50), ("p95", 0.95))


def log_ratio_quantiles(name: str, log_ratio: Tensor) -> dict[str, float]:
    """The 5, 50 and 95 % quantiles of `log_ratio` (any shape, nats) as `log_ratio/{name}_p05` … `_p95`.

    Linear interpolation between order statistics, as in numpy.
    """
    return _quantiles(f"log_ratio/{name}", log_ratio)


def density_weight_quantiles(name: str, divergence: Divergence, log_ratio: Tensor) -> dict[str, float]:
    """The 5, 50 and 95 % quantiles of t·f''(t) at `log_ratio` = log t, as `density_weight/{name}_p05` … `_p95`.

    Which samples f listens to: equal quantiles say all alike, a wide range a few. Empty where f has no curvature.
    """
    try:
        weight = divergence.density_weight(log_ratio)
    except ValueError:  # total variation: f'' is 0 beside a corner
        return {}
    return _quantiles(f"density_weight/{name}", weight)


def _quantiles(name: str, values: Tensor) -> dict[str, float]:
    probabilities = torch.tensor([p for _, p in _QUANTILES], dtype=values.dtype, device=values.device)
    found = torch.quantile(values.flatten(), probabilities).tolist()
    return {f"{name}_{suffix}": value for (suffix, _), value in zip(_QUANTILES, found, strict=True)}


def divergence_estimate(divergence: Divergence, log_ratio: Tensor) -> tuple[float, float]:
    """D_f(π‖π_ref) = E_{y~π_ref}[f(π/π_ref)] and its standard error, from completions of π_ref.

    Args:
        divergence: f.
        log_ratio: log π − log π_ref, `[N]`, or `[N, K]` with the K completions of one prompt in a row: the standard
            error is that of the N row means, since completions of one prompt are not independent draws of (prompt,
            completion).

    Returns:
        (value, standard error); the latter is NaN for N = 1. Both are NaN where the mean is above every D_f.
    """
    terms = divergence.generator(log_ratio.reshape(log_ratio.size(0), -1)).mean(-1)
    return within_bounds(divergence, *mean_and_error(terms))


def within_bounds(divergence: Divergence, value: float, error: float) -> tuple[float, float]:
    """(value, error), or NaN for both where `value` is above f(0⁺) + f'(∞), the largest D_f there is.

    A mean that large rests on too few samples, or on rows that are no samples, to be an estimate of D_f.
    """
    if value > divergence.at_zero + divergence.slope_at_infinity:
        return math.nan, math.nan
    return value, error


def clustered_mean(values: Tensor, weight: Tensor, cluster_ids: Tensor) -> tuple[float, float]:
    """The self-normalised mean Σ w v / Σ w of weighted samples, and its standard error over clusters (prompts).

    The delta method with the residuals w·(v − mean) summed within each cluster, so that samples of one prompt need not
    be independent: √(C/(C−1)·Σ_c (Σ_i r_ci)²) / Σ w over C clusters. Samples of a single one count as independent.

    Args:
        values: `[N]`. weight: `[N]`, ≥ 0. cluster_ids: `[N]`, equal within a cluster.

    Returns:
        (mean, standard error); NaN without samples or weight, the error NaN for a single sample.
    """
    total = weight.sum()
    if len(values) == 0 or total == 0:
        return math.nan, math.nan
    mean = (weight * values).sum() / total
    residual = weight * (values - mean)
    inverse = cluster_ids.unique(return_inverse=True)[1]
    clusters = int(inverse.max()) + 1
    if clusters > 1:
        residual = residual.new_zeros(clusters).index_add(0, inverse, residual)
    count = len(residual)
    if count < 2:
        return mean.item(), math.nan
    error = (residual.square().sum() * count / (count - 1)).sqrt() / total
    return mean.item(), error.item()


def weighted_mean(values: Tensor, weight: Tensor) -> tuple[float, float]:
    """The self-normalised mean Σ w v / Σ w under π of samples with weights w = π/q, and its standard error.

    The standard error is the delta method's, √(Σ w² (v − mean)²) / Σ w; NaN for fewer than two samples.
    """
    total = weight.sum()
    if len(values) == 0 or total == 0:
        return math.nan, math.nan
    mean = (weight * values).sum() / total
    error = (weight * (values - mean)).square().sum().sqrt() / total
    correction = math.sqrt(len(values) / (len(values) - 1)) if len(values) > 1 else math.nan
    return mean.item(), error.item() * correction
