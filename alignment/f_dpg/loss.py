"""f-DPG's arithmetic: the score-function coefficient and loss, and the estimates that go with them (arXiv:2302.08215).

The target is p = P/Z with P unnormalised; D_f(π‖p) = E_p[f(t)] + f′(∞)·π(p = 0), t = π/p. Everything is a function of
log-ratios of whole sequences in nats: log t = log π − log P + log Z, +inf where p = 0; log w = log π − log q for
samples from a proposal q.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fdiv.divergences import get_divergence

if TYPE_CHECKING:
    from fdiv.divergences import Divergence

__all__ = [
    "check_f_dpg_divergence",
    "effective_sample_size",
    "f_dpg_coefficient",
    "f_dpg_loss",
    "grouped_logsumexp",
    "leave_one_out_mean",
    "leave_one_out_slopes",
    "log_partition",
    "target_divergence_terms",
]


def check_f_dpg_divergence(
    divergence: str | Mapping[str, Any] | Divergence, *, hard_target: bool = False
) -> Divergence:
    """The divergence `divergence` specifies, if f-DPG is defined for it and such a target.

    Every f is valid for a target that is positive wherever the policy is (a·exp(λ·φ), a·exp(r/β)). A hard target
    (a·b with b = 0 somewhere, a·v) has p = 0 on sequences the policy can produce; there the coefficient is f′(∞), and
    with f′(∞) = ∞ D_f(π‖p) itself is infinite, so there is nothing to descend.

    Args:
        divergence: any spec of `get_divergence`. hard_target: whether p is 0 somewhere.

    Raises:
        ValueError: unknown name or missing parameter (from `get_divergence`), or a hard target with f′(∞) = ∞.
    """
    divergence = get_divergence(divergence)
    if hard_target and math.isinf(divergence.slope_at_infinity):
        raise ValueError(_hard_target_message(divergence))
    return divergence


def _hard_target_message(divergence: Divergence) -> str:
    return (
        f"f-DPG cannot use the divergence {divergence.name!r} with a hard target: f'(inf) = inf, so a sample the "
        "target rules out (p = 0) would have an infinite pseudo-reward, and D_f(pi||p) is infinite as long as the "
        "policy can produce one. Use a divergence with a finite slope (jensen_shannon, forward_kl, total_variation, "
        "squared_hellinger, le_cam, alpha, neyman_chi2), or ask for a smoothed target (smoothing: EPS gives ruled-out "
        "samples the weight EPS)"
    )


def f_dpg_coefficient(
    log_t: Tensor,
    divergence: str | Mapping[str, Any] | Divergence,
    *,
    log_weight: Tensor | None = None,
    group_ids: Tensor | None = None,
    baseline: str | float | Tensor = "loo",
    clip: float | None = None,
    max_exponent: float | None = None,
) -> Tensor:
    """The factor of ∇log π in f-DPG: w·(f′(t) − b), detached (Go et al. 2023, arXiv:2302.08215, Theorem 1).

    Its mean over samples of q, times ∇log π, is an unbiased estimate of ∇D_f(π‖p) = E_q[(π/q) f′(π/p) ∇log π] when t
    is exact, without `clip`, and as long as b does not depend on the sample it is subtracted for; with an estimated Z
    it is biased by what docs/f_dpg.md measures. f is the registry's centred generator (f′(1) = 0); a shift of f′ is a
    constant baseline.

    Args:
        log_t: `[B]`, log π − log p of whole sequences; +inf where p = 0, and then f′ is f′(∞).
        divergence: any spec of `get_divergence`; f′(∞) must be finite if any log t is +inf.
        log_weight: `[B]`, log π − log q for samples of a proposal q; None for samples of π itself. A sample of
            weight 0 has coefficient 0 and takes no part in baselines.
        group_ids: `[B]` integers, equal for the samples of one prompt; None: the whole batch is one group.
        baseline: `"loo"`: for each sample the mean f′(t) of the others of its group, 0 where there is no other;
            `"none"`; or a number or `[B]` tensor, which must not depend on the samples it is used for.
        clip: M > 0 bounds the pseudo-reward −f′(t) from above (α-DPG: 10), before the baseline. Biased.
        max_exponent: overflow cap on exp-type f′, see `Divergence.score`. None: the registry's own, 60.

    Returns:
        `[B]`, no gradient; float32 for half-precision input, float64 is kept.

    Raises:
        ValueError: f′(∞) = ∞ with some log t = +inf; an unknown baseline; `clip` ≤ 0; shapes that differ.
    """
    divergence = get_divergence(divergence)
    log_t = log_t.detach()
    _check_shapes(log_t, log_weight=log_weight, group_ids=group_ids)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip}: the bound on the pseudo-reward must be above 0, or None for no bound")
    if math.isinf(divergence.slope_at_infinity) and torch.isposinf(log_t).any():
        raise ValueError(_hard_target_message(divergence))
    slope = divergence.score(log_t, max_exponent)
    if clip is not None:
        slope = slope.clamp(min=-clip)
    weight = torch.ones_like(slope) if log_weight is None else log_weight.detach().to(slope.dtype).exp()
    counted = weight != 0
    slope = torch.where(counted, slope, 0.0)
    if isinstance(baseline, Tensor):
        _check_shapes(log_t, baseline=baseline)
        offset = baseline.detach().to(slope.dtype)
    elif baseline == "loo":
        offset = leave_one_out_mean(slope, group_ids, counted)
    elif baseline == "none":
        offset = torch.zeros_like(slope)
    elif isinstance(baseline, int | float) and not isinstance(baseline, bool):
        offset = torch.full_like(slope, baseline)
    else:
        raise ValueError(f"baseline={baseline!r}: use 'loo', 'none', a number or a tensor")
    return torch.where(counted, weight * (slope - offset), 0.0)


def f_dpg_loss(
    log_prob: Tensor,
    log_t: Tensor,
    divergence: str | Mapping[str, Any] | Divergence,
    *,
    log_weight: Tensor | None = None,
    group_ids: Tensor | None = None,
    baseline: str | float | Tensor = "loo",
    clip: float | None = None,
    max_exponent: float | None = None,
) -> Tensor:
    """f-DPG's surrogate loss, coefficient · log π: the gradient of its mean estimates ∇D_f(π‖p), its value nothing.

    Args:
        log_prob: `[B]`, log π(x) summed over tokens, with gradient.
        log_t, divergence, log_weight, group_ids, baseline, clip, max_exponent: see `f_dpg_coefficient`.

    Returns:
        `[B]`; a row of coefficient 0 gives 0 whatever its log-probability.

    Raises:
        ValueError: as `f_dpg_coefficient`.
    """
    _check_shapes(log_t, log_prob=log_prob)
    coefficient = f_dpg_coefficient(
        log_t,
        divergence,
        log_weight=log_weight,
        group_ids=group_ids,
        baseline=baseline,
        clip=clip,
        max_exponent=max_exponent,
    )
    return coefficient * log_prob.masked_fill(coefficient == 0, 0.0)


def _check_shapes(log_t: Tensor, **others: Tensor | None) -> None:
    if log_t.dim() != 1:
        raise ValueError(f"log_t has shape {tuple(log_t.shape)}: one log-ratio per sequence is due, [B]")
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != log_t.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, log_t {tuple(log_t.shape)}: must be equal")


def leave_one_out_mean(values: Tensor, group_ids: Tensor | None = None, counted: Tensor | None = None) -> Tensor:
    """For each element the mean of the OTHER elements of its group; 0 where there is no other.

    Args:
        values: `[B]`.
        group_ids: `[B]` integers; None: one group.
        counted: `[B]` bool, the elements that enter means; None: all.

    Returns:
        `[B]`, summed in float64, in the type of `values`.
    """
    counted = torch.ones_like(values, dtype=torch.bool) if counted is None else counted
    group = (
        torch.zeros_like(values, dtype=torch.long) if group_ids is None else group_ids.unique(return_inverse=True)[1]
    )
    present = counted.double()
    counted_values = torch.where(counted, values, 0.0).double()
    groups = int(group.max()) + 1 if len(group) else 0
    count = present.new_zeros(groups).index_add(0, group, present)
    total = present.new_zeros(groups).index_add(0, group, counted_values)
    others = count[group] - present
    mean = (total[group] - counted_values) / others.clamp(min=1)
    return torch.where(others > 0, mean, 0.0).to(values.dtype)


def leave_one_out_slopes(
    slope: Callable[[Tensor], Tensor], log_ratio: Tensor, log_z: Tensor, group_ids: Tensor
) -> Tensor:
    """For each row i the mean f′ of the OTHER rows of its group, all taken with log Ẑ of row i.

    With Ẑ_i from the other rows, this baseline does not depend on row i. The others' own Ẑ_j do: with them the
    expected gradient is up to a third too long at four samples.

    Args:
        slope: log t → f′(t), element-wise. log_ratio: `[N]`, log π − log P. log_z: `[N]`; −inf gives 0.
        group_ids: `[N]` integers.

    Returns:
        `[N]`; 0 where there is no other row.
    """
    baseline = torch.zeros_like(log_ratio)
    for group in group_ids.unique():
        rows = torch.nonzero(group_ids == group).squeeze(1)
        used = rows[~torch.isneginf(log_z[rows])]
        if len(rows) > 1 and len(used):
            table = slope(log_ratio[rows] + log_z[used, None])
            others = rows != used[:, None]
            baseline[used] = (table.masked_fill(~others, 0.0).sum(1) / (len(rows) - 1)).to(baseline.dtype)
    return baseline


def log_partition(log_importance: Tensor, dim: int = -1) -> Tensor:
    """log of Ẑ = mean of P(x)/q(x) over samples x of q: Ẑ is an unbiased estimate of Z = Σ_x P(x) (not its log).

    Args:
        log_importance: any shape, log P(x) − log q(x); −inf where P = 0. q must cover P.
        dim: the dimension of the samples.

    Returns:
        `log_importance` without `dim`; −inf where every sample has P = 0.
    """
    return torch.logsumexp(log_importance, dim) - math.log(log_importance.size(dim))


def grouped_logsumexp(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """log Σ exp(values) of each group: `values` `[N]`, `group` `[N]` numbers below `groups` → `[groups]`."""
    top = values.new_full((groups,), -math.inf).scatter_reduce(0, group, values, "amax")
    finite_top = torch.where(torch.isneginf(top), 0.0, top)
    total = torch.zeros_like(top).index_add(0, group, torch.exp(values - finite_top[group]))
    return total.log() + finite_top


def effective_sample_size(log_importance: Tensor, dim: int = -1) -> Tensor:
    """(Σ w)² / Σ w² of the weights w = exp(`log_importance`): between 1 and the number of samples; 0 if all are 0.

    Args:
        log_importance: log w, any shape, with the samples along `dim`.
    """
    log_total, log_squares = torch.logsumexp(log_importance, dim), torch.logsumexp(2 * log_importance, dim)
    return torch.where(torch.isneginf(log_squares), 0.0, torch.exp(2 * log_total - log_squares))


def target_divergence_terms(
    log_t: Tensor, divergence: str | Mapping[str, Any] | Divergence, *, log_weight: Tensor | None = None
) -> Tensor:
    """Terms whose mean over samples of q estimates D_f(π‖p): w·f(t)/t, all ≥ 0; f(t)/t = f′(∞) where p = 0.

    E_q[(π/q)·f(t)/t] = E_p[f(t)] + f′(∞)·π(p = 0) for a proposal q that covers π. The centred generator makes it a
    control-variate form: terms of KL(π‖p) are log t − 1 + 1/t rather than log t. Unbiased when t is exact.

    Args:
        log_t: `[B]`, log π − log p, +inf where p = 0.
        divergence: any spec of `get_divergence`.
        log_weight: `[B]`, log π − log q; None for samples of π.

    Returns:
        `[B]`; +inf where p = 0 and f′(∞) = ∞.
    """
    _check_shapes(log_t, log_weight=log_weight)
    terms = get_divergence(divergence).dual().generator(-log_t)
    if log_weight is None:
        return terms
    weight = log_weight.to(terms.dtype).exp()
    return torch.where(weight == 0, 0.0, weight * terms)
