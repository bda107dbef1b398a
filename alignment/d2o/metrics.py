"""What D²O logs: arithmetic on per-group values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fdiv.divergences import Divergence, get_divergence
from fdiv.statistics.estimates import density_weight_quantiles, log_ratio_quantiles, mean_and_error, within_bounds

if TYPE_CHECKING:
    from fdiv.alignment.d2o.config import D2OConfig

__all__ = ["divergence_terms", "group_columns", "mean_and_error", "reduce_groups"]

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


@torch.no_grad()
def group_columns(
    args: D2OConfig,
    divergence: Divergence,
    inputs: Mapping[str, Tensor],
    log_prob: Tensor,
    pos: Tensor,
    neg: Tensor,
    *,
    harmfulness: bool,
) -> dict[str, Tensor]:
    """What is recorded of every prompt, `[B]` each, for `reduce_groups`.

    Args:
        args: the weights and the cap. divergence: f. inputs: the batch of `D2OTrainer`.
        log_prob, pos, neg: log π, log π_r⁺ and log π_r⁻ of the anchors and the rejected answer, `[B, K+1]`, nats;
            `neg is pos` where the two references are one.
        harmfulness: whether a scorer has scored the anchors.
    """
    cap = args.max_exponent
    anchors, rejected = log_prob[:, :-1] - neg[:, :-1], log_prob[:, -1] - pos[:, -1]
    count = max(anchors.size(1), 1)
    # The rewards that the loss compares, and the same of plain log-ratios.
    columns = {
        "rejected_log_ratio": rejected,
        "rejected_log_prob": log_prob[:, -1],
        "rejected_reward": args.alpha * divergence.score(rejected, cap),
        "rejected_raw_reward": args.alpha * rejected,
        "anchor_reward": args.beta * divergence.score(anchors, cap).sum(1) / count,
        "anchor_raw_reward": args.beta * anchors.sum(1) / count,
        "anchor_log_prob": log_prob[:, :-1].sum(1) / count,
        "clamped": divergence.capped(torch.cat([anchors, rejected[:, None]], dim=1), cap).any(1),
        "online": inputs["online"],
        "anchor_tokens": inputs["completion_mask"][:, :-1].sum((1, 2)),
        "anchor_cut": inputs["anchor_cut"].float().sum(1) / count,
        "attended": inputs["attention_mask"].sum((1, 2)),
    }
    if args.num_generations == 0:
        return columns
    columns |= {f"anchor_{k}_log_ratio": anchors[:, k] for k in range(anchors.size(1))}
    # Divergences from the policy to its references, weighted for what the anchors were sampled from. Where no log q
    # was recorded, offline anchors are samples of π_r⁻ and online ones of the policy of this step.
    assumed = torch.where(inputs["online"].bool()[:, None], log_prob[:, :-1], neg[:, :-1])
    sampler = torch.where(inputs["anchor_log_prob"].isnan(), assumed, inputs["anchor_log_prob"])
    references = {"both": pos} if pos is neg else {"pos": pos, "neg": neg}
    for kind, measured in (("divergence", divergence), ("jeffreys", get_divergence("jeffreys"))):
        for name, reference in references.items():
            terms = divergence_terms(measured, log_prob[:, :-1], reference[:, :-1], sampler)
            columns[f"{kind}_to_{name}"] = terms.mean(1)
    if harmfulness:  # NaN where the scorer gave none
        harm = inputs["harmfulness"]
        columns["harm_scored"] = (~harm.isnan()).sum(1)
        columns["harm_sum"] = harm.nan_to_num(0.0).sum(1)
        columns["harm_above"] = (harm > args.harmful_above).sum(1)
    return columns


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
        **density_weight_quantiles("rejected", divergence, examples["rejected_log_ratio"]),
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
        **density_weight_quantiles("anchors", divergence, log_ratio),
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
