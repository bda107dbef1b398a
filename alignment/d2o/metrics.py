"""What D²O logs: arithmetic on per-group values."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fdiv.divergences import Divergence, get_divergence
from fdiv.statistics.estimates import log_ratio_quantiles, mean_and_error, within_bounds

__all__ = ["divergence_terms", "mean_and_error", "reduce_groups"]

_LARGEST_EXPONENT = 60.0  # as in the registry: beyond it a weight saturates instead of overflowing


def divergence_terms(divergence: Divergence, log_prob: Tensor, reference: Tensor, sampler: Tensor) -> Tensor:
    """Terms whose mean over samples y ~ q estimates D_f(π‖π_r) = E_q[(π_r/q)·f(π/π_r)]: the shape of the input.

    With q = π_r they are f(π/π_r); with q = π, of an online anchor, f(π/π_r)·π_r/π.

    Args:
        divergence: f.
        log_prob: log π(y|x), nats. reference: log π_r(y|x). sampler: log q(y|x); NaN means π_r.
    """
    weight = (reference - torch.where(sampler.isnan(), reference, sampler)).clamp(max=_LARGEST_EXPONENT).exp()
    return weight * divergence.generator(log_prob - reference)


def _defined(values: Tensor) -> Tensor:
    """`values` without its NaN entries."""
    return values[~values.isnan()]


def reduce_groups(examples: Mapping[str, Tensor], divergence: Divergence, anchors: int) -> dict[str, float]:
    """The metrics of `D2OTrainer` from what it recorded for each group, `[N]` tensors."""
    margins = examples["anchor_reward"] - examples["rejected_reward"]
    metrics = {
        "rewards/rejected": examples["rejected_reward"].mean().item(),
        "rewards/margins": margins.mean().item(),
        "rewards/accuracies": (margins > 0).double().mean().item(),
        "rewards_raw/rejected": examples["rejected_raw_reward"].mean().item(),
        "logps/rejected": examples["rejected_log_prob"].mean().item(),
        "clamped_fraction": examples["clamped"].mean().item(),
        **log_ratio_quantiles("rejected", examples["rejected_log_ratio"]),
    }
    if anchors == 0:
        return metrics
    log_ratio = torch.stack([examples[f"anchor_{k}_log_ratio"] for k in range(anchors)], dim=1)
    metrics |= {
        "rewards/anchors": examples["anchor_reward"].mean().item(),
        "rewards_raw/anchors": examples["anchor_raw_reward"].mean().item(),
        "logps/anchors": examples["anchor_log_prob"].mean().item(),
        "anchors/online": examples["online"].mean().item(),
        "anchors/mean_length": examples["anchor_tokens"].mean().item() / anchors,
        "anchors/clipped_ratio": examples["anchor_cut"].mean().item(),
        **log_ratio_quantiles("anchors", log_ratio),
    }
    kinds = {"divergence": divergence, "jeffreys": get_divergence("jeffreys")}
    for name, values in examples.items():
        kind, _, reference = name.partition("_to_")
        if kind in kinds and reference:
            key = f"divergence/{kinds[kind].label}" + ("" if reference == "both" else f"_to_{reference}")
            estimate = mean_and_error(_defined(values))
            metrics[key], metrics[f"{key}_se"] = within_bounds(kinds[kind], *estimate)
    if "harm_scored" in examples:
        scored = examples["harm_scored"].sum().item()
        metrics["harmfulness/anchors"], metrics["harmfulness/anchors_se"] = mean_and_error(
            _defined(examples["harm_sum"] / examples["harm_scored"])
        )
        metrics["harmfulness/harmful_share"] = examples["harm_above"].sum().item() / scored if scored else math.nan
        metrics["harmfulness/unscored"] = len(margins) * anchors - scored
    return metrics
