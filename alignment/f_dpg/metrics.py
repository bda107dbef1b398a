"""What f-DPG logs of a window of samples: divergences to the target, expectations under the policy, Z."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fdiv.alignment.f_dpg.loss import grouped_logsumexp, target_divergence_terms
from fdiv.divergences import Divergence
from fdiv.statistics.estimates import log_ratio_quantiles, mean_and_error

__all__ = ["LOGGED_DIVERGENCES", "f_dpg_metrics", "partition_metrics", "slope_columns", "weighted_mean"]

LOGGED_DIVERGENCES = ("forward_kl", "reverse_kl", "total_variation", "jensen_shannon")


def partition_metrics(prompts: Tensor, log_importance: Tensor, log_z: Tensor) -> dict[str, list[float]]:
    """Per prompt of a generation: `z/mean` Ẑ, `z/log_mean` log Ẑ where it is not 0, `z/ess` the effective sample size
    of P/q among this generation's samples; and `z/skipped_prompts`, how many have Ẑ = 0.

    Args:
        prompts: `[N]` integers that stand for prompts.
        log_importance: `[N]`, log P − log q.
        log_z: `[N]`, log Ẑ of each sample's prompt.
    """
    distinct, inverse = prompts.unique(return_inverse=True)
    log_sum = grouped_logsumexp(log_importance, inverse, len(distinct))
    log_squares = grouped_logsumexp(2 * log_importance, inverse, len(distinct))
    effective = torch.where(torch.isneginf(log_squares), 0.0, torch.exp(2 * log_sum - log_squares))
    of_prompt = log_z.new_zeros(len(distinct)).index_copy(0, inverse, log_z)  # equal for all samples of a prompt
    skipped = torch.isneginf(of_prompt)
    return {
        "z/ess": effective.tolist(),
        "z/mean": of_prompt.exp().tolist(),
        "z/log_mean": of_prompt[~skipped].tolist(),
        "z/skipped_prompts": [float(skipped.sum())],
    }


def slope_columns(
    divergence: Divergence, log_t: Tensor, max_exponent: float | None, clip: float | None
) -> dict[str, Tensor]:
    """`slope` f′(t) as the loss uses it, `clipped` where the pseudo-reward was bounded, `clamped` where the overflow
    policy acted; the shape of `log_t`, no gradient."""
    log_t = log_t.detach()
    slope = divergence.score(log_t, max_exponent)
    return {
        "slope": slope if clip is None else slope.clamp(min=-clip),
        "clipped": torch.zeros_like(log_t) if clip is None else slope < -clip,
        "clamped": divergence.capped(log_t, max_exponent),
    }


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


def _mean(terms: Tensor) -> tuple[float, float]:
    """Mean and standard error; NaN, which TRL logs as null, where a term is infinite."""
    if not torch.isfinite(terms).all():
        return math.nan, math.nan
    return mean_and_error(terms)


def f_dpg_metrics(examples: Mapping[str, Tensor], divergence: Divergence, score_names: list[str]) -> dict[str, float]:
    """Metrics of the recorded columns (`[N]` each).

    `divergence/NAME` ± `_se` estimate D_NAME(π‖p) from samples of q weighted by π/q: `forward_kl` is KL(p‖π),
    `reverse_kl` KL(π‖p), `jensen_shannon` twice the textbook value. An infinite one (KL(π‖p) with a sample the target
    rules out) is null. `score/NAME` ± `_se` and `kl_to_base` ± `_se` are expectations under π. Samples of prompts with
    Ẑ = 0 count in `z/skipped_fraction` alone.
    """
    used = examples["skipped"] == 0
    rows = {name: column[used] for name, column in examples.items()}
    metrics = {"z/skipped_fraction": examples["skipped"].mean().item()}
    if not used.any():
        return metrics
    log_t, log_weight = rows["log_t"], rows["log_weight"]
    weight = log_weight.exp()
    for name, each in {**dict.fromkeys(LOGGED_DIVERGENCES), divergence.label: divergence}.items():
        value, error = _mean(target_divergence_terms(log_t, each or name, log_weight=log_weight))
        metrics |= {f"divergence/{name}": value, f"divergence/{name}_se": error}
    for name in score_names:
        value, error = weighted_mean(rows[f"score/{name}"], weight)
        metrics |= {f"score/{name}": value, f"score/{name}_se": error}
    log_policy = rows["log_policy"]
    value, error = weighted_mean(log_policy - rows["log_base"], weight)
    supported = ~torch.isposinf(log_t)
    metrics |= {
        "kl_to_base": value,
        "kl_to_base_se": error,
        "entropy": (rows["entropy"].sum() / rows["tokens"].sum()).item(),
        "sequence_entropy": weighted_mean(-log_policy, weight)[0],
        "off_support_fraction": weighted_mean((~supported).double(), weight)[0],
        "pseudo_reward": weighted_mean(-rows["slope"], weight)[0],
        "clipped_fraction": rows["clipped"].mean().item(),
        "clamped_fraction": rows["clamped"].mean().item(),
        "importance_weight/mean": weight.mean().item(),
        "importance_weight/max": weight.max().item(),
        "importance_weight/ess_fraction": (weight.sum().square() / (weight.square().sum() * len(weight))).item(),
        "importance_weight/capped_fraction": rows["weight_capped"].mean().item(),
    }
    if supported.any():
        metrics |= log_ratio_quantiles("target", log_t[supported])
    return metrics
