"""What f-DPG logs of a window of samples: divergences to the target, expectations under the policy, Z."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fdiv.alignment.f_dpg.estimate import estimate_by_prompt, mean_over_prompts
from fdiv.alignment.f_dpg.loss import grouped_logsumexp
from fdiv.divergences import Divergence, get_divergence
from fdiv.statistics.estimates import clustered_mean, density_weight_quantiles, log_ratio_quantiles

__all__ = ["LOGGED_DIVERGENCES", "f_dpg_metrics", "partition_metrics", "prompt_columns", "slope_columns"]

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
    # The mean over the prompt's samples: they share one Ẑ, but with `loo`, where the mean is that of the group.
    of_prompt = (
        grouped_logsumexp(log_z, inverse, len(distinct)) - inverse.bincount(minlength=len(distinct)).to(log_z).log()
    )
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


def prompt_columns(prompts: Tensor) -> dict[str, Tensor]:
    """The keys of prompts (`[B]` int64) as columns of 24-bit numbers, which float32 holds exactly."""
    return {"prompt_low": prompts & 0xFFFFFF, "prompt_high": prompts >> 24 & 0xFFFFFF}


def _divergences(examples: Mapping[str, Tensor], divergence: Divergence, exact_z: bool) -> dict[str, float]:
    """`divergence/NAME` ± `_se` of all samples of the window, and `divergence/uncorrected_fraction` of its prompts."""
    prompts = examples["prompt_low"] + examples["prompt_high"] * 2.0**24
    _, inverse, counts = prompts.unique(return_inverse=True, return_counts=True)
    use = torch.ones_like(inverse, dtype=torch.bool) if exact_z else counts[inverse] > 1
    log_z = examples["log_z"]
    rows = {"log_ratio": examples["log_t"] - log_z, "prompt_ids": prompts, "log_weight": examples["log_weight"]}
    rows = {name: column[use] for name, column in rows.items()} | {"log_z": log_z[use] if exact_z else None}
    metrics = {}
    poor = 1.0
    for name, f in {**{n: get_divergence(n) for n in LOGGED_DIVERGENCES}, divergence.label: divergence}.items():
        value = error = math.nan
        if use.any():
            found = estimate_by_prompt(divergence=f, **rows)
            poor = 1.0 - int(found.corrected.sum()) / len(counts)
            value, error = (number.item() for number in mean_over_prompts(found))
        if poor > 0.5 or not math.isfinite(value):
            value = error = math.nan
        most = f.at_zero + f.slope_at_infinity
        metrics |= {f"divergence/{name}": min(max(value, 0.0), most) if value == value else value}
        metrics |= {f"divergence/{name}_se": error}
    return metrics | {"divergence/uncorrected_fraction": poor}


def f_dpg_metrics(
    examples: Mapping[str, Tensor], divergence: Divergence, score_names: list[str], *, exact_z: bool = False
) -> dict[str, float]:
    """Metrics of the recorded columns (`[N]` each); every standard error is over prompts.

    `divergence/NAME` ± `_se` estimate D_NAME(π‖p) from samples of q weighted by π/q, with the bias of an estimated Z
    taken out (`fdiv.alignment.estimate_to_target`): `forward_kl` is KL(p‖π), `reverse_kl` KL(π‖p), `jensen_shannon`
    twice the textbook value. An estimate below 0 or above f(0⁺) + f'(∞) is shown as that bound. An infinite one (as
    KL(π‖p) with a sample the target rules out) is null; all are where more than half of the prompts could not be
    corrected (`divergence/uncorrected_fraction`: fewer than two samples with P > 0). `score/NAME` ± `_se` and
    `kl_to_base` ± `_se` are expectations under π. Samples of prompts with Ẑ = 0 count in `z/skipped_fraction` and in
    the divergences alone.

    Args:
        examples: the columns. divergence: the run's own. score_names: of the scorers.
        exact_z: Z is given, so `log_z` is exact.
    """
    used = examples["skipped"] == 0
    rows = {name: column[used] for name, column in examples.items()}
    metrics = {"z/skipped_fraction": examples["skipped"].mean().item()}
    if not used.any():
        return metrics
    metrics |= _divergences(examples, divergence, exact_z)
    log_t, log_weight = rows["log_t"], rows["log_weight"]
    weight, prompts = log_weight.exp(), rows["prompt_low"] + rows["prompt_high"] * 2.0**24
    for name in score_names:
        value, error = clustered_mean(rows[f"score/{name}"], weight, prompts)
        metrics |= {f"score/{name}": value, f"score/{name}_se": error}
    log_policy = rows["log_policy"]
    value, error = clustered_mean(log_policy - rows["log_base"], weight, prompts)
    supported = ~torch.isposinf(log_t)
    metrics |= {
        "kl_to_base": value,
        "kl_to_base_se": error,
        "entropy": (rows["entropy"].sum() / rows["tokens"].sum()).item(),
        "sequence_entropy": clustered_mean(-log_policy, weight, prompts)[0],
        "off_support_fraction": clustered_mean((~supported).double(), weight, prompts)[0],
        "pseudo_reward": clustered_mean(-rows["slope"], weight, prompts)[0],
        "clipped_fraction": rows["clipped"].mean().item(),
        "clamped_fraction": rows["clamped"].mean().item(),
        "importance_weight/mean": weight.mean().item(),
        "importance_weight/max": weight.max().item(),
        "importance_weight/ess_fraction": (weight.sum().square() / (weight.square().sum() * len(weight))).item(),
        "importance_weight/capped_fraction": rows["weight_capped"].mean().item(),
    }
    if supported.any():
        metrics |= log_ratio_quantiles("target", log_t[supported])
        metrics |= density_weight_quantiles("target", divergence, log_t[supported])
    return metrics
