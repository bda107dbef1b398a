"""Fits λ of a distributional target a(x)·exp(λ·φ(x)) to wanted moments, from weighted samples (GDC, arXiv:2012.11635).

Self-normalised importance sampling: with samples x_i of a proposal q and w_i = a(x_i)/q(x_i), the moments of one
prompt's target are Σ w e^{λ·φ} φ / Σ w e^{λ·φ}. Matching their mean over prompts, as training weighs prompts, is the
minimum of the mean over prompts of log Σ w e^{λ·φ} − λ·μ̄, which is convex; a trust-region Newton method finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fdiv.errors import MomentError

__all__ = ["MomentFit", "fit_moments"]


@dataclass(frozen=True)
class MomentFit:
    """λ and what it rests on."""

    coefficients: tuple[float, ...]
    """λ, one per feature."""
    moments: tuple[float, ...]
    """The moments λ gives on the samples, means over prompts."""
    proposal_moments: tuple[float, ...]
    """The moments under the base, λ = 0."""
    effective_samples: float
    """1 / Σ s², s the shares of the samples: equal for prompts, w e^{λ·φ}/Σ within each."""


def fit_moments(
    features: np.ndarray | Sequence[Sequence[float]],
    moments: Sequence[float],
    log_weight: np.ndarray | Sequence[float] | None = None,
    *,
    prompts: np.ndarray | Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    tolerance: float = 1e-5,
    min_effective_samples: float = 10.0,
) -> MomentFit:
    """λ with mean over prompts of E_{a·exp(λφ)}[φ] = `moments`, estimated on the samples.

    A prompt without a sample of a rare feature cannot be moved: give some multiples of 1/(base rate) samples each.

    Args:
        features: `[N, K]`, φ of each sample.
        moments: `[K]`, the wanted moments μ̄.
        log_weight: `[N]`, log a − log q for samples of q; None for samples of a. −inf leaves a sample out.
        prompts: `[N]`, equal for the samples of one prompt; prompts count by their number of samples, not by their Z.
            None: all samples are of one prompt.
        names: `[K]`, for messages.
        tolerance: largest gap between a moment and what is wanted.
        min_effective_samples: fewest effective samples λ may rest on.

    Raises:
        MomentError: a moment outside or at the edge of the values seen, moments that no reweighting of the samples
            has jointly, or fewer effective samples than asked for.
        ValueError: shapes that do not fit, or a feature that is not finite.
    """
    from scipy.optimize import minimize

    phi = np.asarray(features, dtype=np.float64)
    wanted = np.asarray(moments, dtype=np.float64)
    log_w = np.zeros(len(phi)) if log_weight is None else np.asarray(log_weight, dtype=np.float64)
    if phi.ndim != 2 or wanted.shape != phi.shape[1:] or log_w.shape != phi.shape[:1]:
        raise ValueError(
            f"features {phi.shape}, moments {wanted.shape} and log_weight {log_w.shape} must be [N, K], [K] and [N]"
        )
    groups = np.zeros(len(phi), dtype=np.int64) if prompts is None else np.asarray(prompts)
    if groups.shape != phi.shape[:1]:
        raise ValueError(f"prompts {groups.shape} must have one entry for each of the {len(phi)} samples")
    if not np.isfinite(phi).all():
        raise ValueError("a feature is NaN or infinite: every sample needs a finite value")
    kept = log_w > -np.inf
    phi, log_w = phi[kept], log_w[kept]
    _, group, counts = np.unique(groups, return_inverse=True, return_counts=True)
    shown, group = np.unique(group[kept], return_inverse=True)
    counts = counts[shown]
    names = list(names or (f"feature {number}" for number in range(len(wanted))))
    _check_reach(phi, wanted, names)

    part = counts / counts.sum()

    def weights(coefficients: np.ndarray) -> tuple[np.ndarray, float]:
        """Shares of the samples, and the mean over prompts of the log-partition function."""
        exponent = log_w + phi @ coefficients
        top = np.full(len(counts), -np.inf)
        np.maximum.at(top, group, exponent)
        log_total = top + np.log(np.bincount(group, np.exp(exponent - top[group])))
        return np.exp(exponent - log_total[group]) * part[group], float(part @ log_total)

    def value(coefficients: np.ndarray) -> float:
        return weights(coefficients)[1] - coefficients @ wanted

    def gap(coefficients: np.ndarray) -> np.ndarray:
        return weights(coefficients)[0] @ phi - wanted

    def covariance(coefficients: np.ndarray) -> np.ndarray:
        share = weights(coefficients)[0]
        means = np.stack([np.bincount(group, share * column) for column in phi.T], axis=1) / part[:, None]
        centred = phi - means[group]
        return (centred * share[:, None]).T @ centred

    start = np.zeros(len(wanted))
    found = minimize(value, start, jac=gap, hess=covariance, method="trust-exact", options={"gtol": tolerance / 10}).x
    share, _ = weights(found)
    reached = share @ phi
    if np.abs(reached - wanted).max() > tolerance:
        raise MomentError(
            f"moments out of reach: λ = {_shown(found)} gives {_shown(reached)} instead of {_shown(wanted)} "
            f"({', '.join(names)}). No reweighting of the {len(phi)} samples has these moments together: draw more "
            "samples, use a proposal that shows them, or ask for other moments"
        )
    effective = 1.0 / float(np.square(share).sum())
    if effective < min_effective_samples:
        raise MomentError(
            f"λ = {_shown(found)} rests on {effective:.1f} effective samples of {len(phi)}, fewer than "
            f"{min_effective_samples:g}: draw more samples, or use a proposal in which {', '.join(names)} is less rare"
        )
    base, _ = weights(start)
    return MomentFit(tuple(found.tolist()), tuple(reached.tolist()), tuple((base @ phi).tolist()), effective)


def _check_reach(phi: np.ndarray, wanted: np.ndarray, names: list[str]) -> None:
    if not len(phi):
        raise MomentError("no sample has a positive weight: λ cannot be fitted")
    for name, column, moment in zip(names, phi.T, wanted, strict=True):
        low, high = column.min(), column.max()
        if low < moment < high:
            continue
        seen = f"the {len(column)} samples show values from {low:g} to {high:g}"
        if moment in (low, high) and low < high:
            raise MomentError(
                f"moment {moment:g} of {name!r} is at the edge of what is possible ({seen}): λ would be infinite. Use "
                "a pointwise target, or a hybrid one with it among the factors"
            )
        raise MomentError(
            f"moment {moment:g} of {name!r} is out of reach: {seen}. Draw more samples, use a proposal that shows it, "
            "or ask for another moment"
        )


def _shown(values: np.ndarray) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"
