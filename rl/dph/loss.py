"""DPH-RL's losses: pure functions of per-token log-ratios, per-row tensors out (Li et al. 2025, arXiv:2509.07430).

A log-ratio is log π_θ(y_t|x, y_<t) − log π_ref(y_t|x, y_<t), in nats; u is its exponential.

Rehearsal rows are samples of π_ref, a fixed distribution, so autograd through f(u) is the right gradient:
∇E_ref[f(u)] = E_ref[c(u)·∇log π_θ] with the coefficient c(u) = u·f′(u). On samples of the policy itself it would not
be; see `js_on_policy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fdiv.divergences import get_divergence
from fdiv.divergences.saturation import as_float, check_max_exponent, saturating_expm1, soft_cap

if TYPE_CHECKING:
    from fdiv.divergences import Divergence

__all__ = [
    "REHEARSAL_LEVELS",
    "check_rehearsal_divergence",
    "js_on_policy",
    "js_on_reference",
    "rehearsal_capped",
    "rehearsal_coefficient",
    "rehearsal_loss",
    "rehearsal_penalty",
    "rehearsal_weight",
]

#: Where f is taken: of every token's ratio, or of the whole completion's.
REHEARSAL_LEVELS = ("token", "sequence")


def check_rehearsal_divergence(divergence: str | Mapping[str, Any] | Divergence, level: str = "token") -> Divergence:
    """The divergence `divergence` specifies, checked for rehearsal at `level`.

    Every divergence of the registry is valid here, at both levels. What rehearsal needs is that π = π_ref is a
    minimum of the loss on ANY set of reference samples, also on the finite, truncated and correct-only set that is
    cached: f(1) = 0 ≤ f(u) for each u. The registry's generators are centred (f(1) = f′(1) = 0, f convex), so each
    term has its minimum at u = 1; an uncentred f, such as −log u or u·log u, agrees only in the exact expectation
    and would raise or lower the probability of cached samples for ever. The ends of f decide how well it works, not
    whether it is right: with f(0⁺) < ∞ the coefficient vanishes on forgotten tokens, and total variation, with no
    curvature, keeps |c| ≈ ½ however close u is to 1.

    Raises:
        ValueError: unknown or ambiguous name, missing parameter (from `get_divergence`), another level.
    """
    if level not in REHEARSAL_LEVELS:
        raise ValueError(f"level={level!r}: rehearsal is taken at level 'token' or 'sequence'")
    return get_divergence(divergence)


def rehearsal_loss(
    log_ratio: Tensor,
    mask: Tensor,
    divergence: str | Mapping[str, Any] | Divergence,
    level: str = "token",
    *,
    max_exponent: float | None = None,
    coefficient_clip: float | None = None,
) -> Tensor:
    """Rehearsal on samples of π_ref: f(u) with u = π_θ/π_ref (DPH-RL, arXiv:2509.07430).

    `token`: the mean over the row's tokens of f(u_t); its expectation is the average, over the positions of reference
    samples, of the divergence between the two next-token distributions. `sequence`: f of the product of all u_t; its
    expectation is D_f between the distributions of whole completions. Only for `forward_kl` do the two agree, and
    then for the SUM over tokens (chain rule).

    Args:
        log_ratio: `[B, T]`, log π_θ − log π_ref of the tokens of reference samples, with gradient.
        mask: `[B, T]`, bool or 0/1: the tokens that count. What stands elsewhere, NaN included, is never read.
        divergence: any spec of `get_divergence`; see `check_rehearsal_divergence`.
        level: `"token"` or `"sequence"`.
        max_exponent: overflow cap: f is exact where its exponents (u, u², 1/u …) stay below it, and goes on
            logarithmically above. None: the registry's own, 60.
        coefficient_clip: M > 0 bounds |c(u)|, the factor of ∇log π_θ, at M and keeps its sign, so that a token far
            off still pulls back; the value stays exact. At level `sequence` it bounds the one coefficient of the row.
            The gradient is then that of another penalty with the same single minimum, u = 1 (as in Huber's loss).
            None: no bound. The share of clipped tokens is the mean of |`rehearsal_coefficient`| > M.

    Returns:
        `[B]`, ≥ 0; 0 for a row whose mask is empty. float32 for half-precision input, float64 is kept.

    Raises:
        ValueError: as `check_rehearsal_divergence`; shapes that differ; `coefficient_clip` ≤ 0; `max_exponent`
            outside (0, 80].
    """
    divergence = check_rehearsal_divergence(divergence, level)

    def penalty(log_u: Tensor) -> Tensor:
        return rehearsal_penalty(log_u, divergence, max_exponent=max_exponent, coefficient_clip=coefficient_clip)

    return _per_row(log_ratio, mask, level, penalty)


def rehearsal_penalty(
    log_ratio: Tensor,
    divergence: str | Mapping[str, Any] | Divergence,
    *,
    max_exponent: float | None = None,
    coefficient_clip: float | None = None,
) -> Tensor:
    """f(u) of every ratio, not averaged: what `rehearsal_loss` takes of tokens or of whole completions.

    Args:
        log_ratio: log u, any shape, with gradient, finite wherever it counts.
        divergence, max_exponent, coefficient_clip: as in `rehearsal_loss`.

    Returns:
        The shape of `log_ratio`, ≥ 0; float32 for half-precision input, float64 is kept.

    Raises:
        ValueError: an unknown divergence; `coefficient_clip` ≤ 0; `max_exponent` outside (0, 80].
    """
    divergence, log_u = get_divergence(divergence), as_float(log_ratio, "log_ratio")
    if coefficient_clip is None:
        return divergence.generator(_capped_log_ratio(log_u, divergence, max_exponent))
    if not coefficient_clip > 0:
        raise ValueError(f"coefficient_clip={coefficient_clip}: the bound must be above 0, or None for no bound")
    coefficient = rehearsal_coefficient(log_u, divergence, max_exponent=max_exponent)
    with torch.no_grad():
        value = divergence.generator(_capped_log_ratio(log_u, divergence, max_exponent))
    return _with_coefficient(value, coefficient.clamp(-coefficient_clip, coefficient_clip), log_u)


def rehearsal_coefficient(
    log_ratio: Tensor,
    divergence: str | Mapping[str, Any] | Divergence,
    *,
    max_exponent: float | None = None,
) -> Tensor:
    """c(u) = u·f′(u), the factor of ∇log π_θ in the gradient of f(u); detached.

    Negative where the policy has lost the token (u < 1, its probability is pushed up), 0 at u = 1, positive above. As
    u → 0: −1 for `forward_kl` and `jeffreys`, −∞ for `neyman_chi2`, and 0 wherever f(0⁺) is finite (`jensen_shannon`,
    `alpha`, `reverse_kl` …), because convexity bounds |c(u)| by f(0⁺) − f(u): such a divergence cannot bring back a
    token that is lost.

    Args:
        log_ratio: log u, any shape: tokens, or sums over tokens for level `sequence`.
        divergence: any spec of `get_divergence`.
        max_exponent: as in `rehearsal_loss`.

    Returns:
        The shape of `log_ratio`; float32 for half-precision input, float64 is kept.
    """
    divergence = get_divergence(divergence)
    with torch.enable_grad():
        log_u = as_float(log_ratio, "log_ratio").detach().requires_grad_()
        value = divergence.generator(_capped_log_ratio(log_u, divergence, max_exponent))
        return torch.autograd.grad(value.sum(), log_u)[0]


def rehearsal_capped(
    log_ratio: Tensor,
    divergence: str | Mapping[str, Any] | Divergence,
    max_exponent: float | None = None,
) -> Tensor:
    """Bool, the shape of `log_ratio`: where f(u) is on its logarithmic continuation rather than exact."""
    log_u = as_float(log_ratio, "log_ratio").detach()
    up, down = growth(get_divergence(divergence))
    cap = check_max_exponent(max_exponent)
    return (up * log_u > cap) | (down * -log_u > cap)


def js_on_reference(log_ratio: Tensor, mask: Tensor, level: str = "token") -> Tensor:
    """Half of DPH-RL's Jensen–Shannon by definition: k3 of KL(π_ref‖m), m = ½(π_θ + π_ref), on samples of π_ref.

    With r = m/π_ref = (1 + u)/2 it is r − 1 − log r ≥ 0, a centred generator of its own, so that its expected
    gradient is exactly ∇KL(π_ref‖m). Coefficient: u(u − 1)/(2(1 + u)), which vanishes as u → 0.

    Args and returns: `log_ratio`, `mask`, `level` and `[B]` as in `rehearsal_loss`.
    """
    return _per_row(log_ratio, mask, level, lambda log_u: _k3(_log_mixture_excess(log_u)))


def js_on_policy(log_ratio: Tensor, mask: Tensor, level: str = "token", *, gradient: str = "pathwise") -> Tensor:
    """The other half: k3 of KL(π_θ‖m), m = ½(π_θ + π_ref), on samples of π_θ; π_ref must score them (a live model).

    With s = m/π_θ = (1 + 1/u)/2 the value s − 1 − log s ≥ 0 is an unbiased estimate of KL(π_θ‖m). Its gradient
    depends on `gradient`:

    * `"pathwise"`, autograd through the value, as released with the paper. The samples move with θ, which autograd
      does not see: the expectation is ½·∇KL(π_ref‖π_θ) − ∇KL(π_ref‖m), NOT ∇KL(π_θ‖m). Added to `js_on_reference` on
      the same prompts it leaves ½·∇KL(π_ref‖π_θ), half a forward KL, and no Jensen–Shannon at all. To first order
      around π_θ = π_ref all of these agree.
    * `"score"`, coefficient log(2u/(1+u)) + ½ − u/(1+u) on ∇log π_θ: the expectation is ∇KL(π_θ‖m), so that the two
      halves together give the gradient of `jensen_shannon` (2× the textbook's).

    At level `token` both are statements about each visited prefix: how θ changes which prefixes are visited is left
    out, as in every per-token KL loss.

    Args and returns: `log_ratio` (log π_θ − log π_ref on samples of π_θ), `mask`, `level` and `[B]` as in
    `rehearsal_loss`.

    Raises:
        ValueError: another `gradient` or `level`; shapes that differ.
    """
    if gradient not in ("pathwise", "score"):
        raise ValueError(f"gradient={gradient!r}: 'pathwise' (as released) or 'score' (that of KL(policy‖m))")

    def penalty(log_u: Tensor) -> Tensor:
        value = _k3(_log_mixture_excess(-log_u))
        if gradient == "pathwise":
            return value
        coefficient = F.logsigmoid(log_u) + math.log(2.0) + 0.5 - torch.sigmoid(log_u)
        return _with_coefficient(value.detach(), coefficient.detach(), log_u)

    return _per_row(log_ratio, mask, level, penalty)


def _log_mixture_excess(log_u: Tensor) -> Tensor:
    """r − 1 of r = (1 + u)/2: the ratio of the even mixture to the distribution u is relative to."""
    return 0.5 * saturating_expm1(log_u)


def _k3(excess: Tensor) -> Tensor:
    """r − 1 − log r, from r − 1."""
    return excess - torch.log1p(excess)


def _per_row(log_ratio: Tensor, mask: Tensor, level: str, penalty: Callable[[Tensor], Tensor]) -> Tensor:
    """`penalty` of each token, averaged over the mask, or of each row's sum; 0 for an empty row."""
    if level not in REHEARSAL_LEVELS:
        raise ValueError(f"level={level!r}: rehearsal is taken at level 'token' or 'sequence'")
    if log_ratio.dim() != 2 or mask.shape != log_ratio.shape:
        raise ValueError(
            f"log_ratio has shape {tuple(log_ratio.shape)} and mask {tuple(mask.shape)}: both must be [B, T]"
        )
    counted = mask.bool()
    log_u = as_float(log_ratio, "log_ratio").masked_fill(~counted, 0.0)
    if level == "sequence":
        return penalty(log_u.sum(-1)).masked_fill(~counted.any(-1), 0.0)
    return penalty(log_u).masked_fill(~counted, 0.0).sum(-1) / counted.sum(-1).clamp(min=1)


def _with_coefficient(value: Tensor, coefficient: Tensor, log_u: Tensor) -> Tensor:
    """`value`, with `coefficient` as its derivative in `log_u`."""
    finite = log_u.masked_fill(torch.isinf(log_u), 0.0)
    return value + coefficient * (finite - finite.detach())


def growth(divergence: Divergence) -> tuple[float, float]:
    """The largest powers of u and of 1/u in f(u): one above those of f′, and u itself, which every f holds."""
    powers = [1.0, *(exponent + 1.0 for exponent in divergence.exponents)]
    return max(powers), max(0.0, -min(powers))


def _capped_log_ratio(log_u: Tensor, divergence: Divergence, max_exponent: float | None) -> Tensor:
    """log u, compressed where an exponential of f(u) would pass `max_exponent`; None leaves it to the registry."""
    if max_exponent is None:
        return log_u
    cap = check_max_exponent(max_exponent)
    up, down = growth(divergence)
    log_u = soft_cap(log_u, up, cap)
    return -soft_cap(-log_u, down, cap) if down else log_u


def rehearsal_weight(coefficient: float, weighting: str, rows: int, completions: int) -> float:
    """w of L_explore + w·(mean over rehearsal rows): η (`literal`) or η·R/N (`pooled`).

    Args:
        coefficient: η.
        weighting: `literal` or `pooled`; see `DPHConfig`.
        rows: R, rehearsal rows of an optimizer step.
        completions: N, rollouts of an optimizer step.
    """
    return coefficient * rows / completions if weighting == "pooled" else coefficient
