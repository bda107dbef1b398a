"""What `DPHTrainer` logs of its rehearsal rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fdiv.divergences import get_divergence
from fdiv.rl.dph.loss import rehearsal_capped, rehearsal_coefficient, rehearsal_loss
from fdiv.statistics.estimates import clustered_mean, density_weight_quantiles, log_ratio_quantiles, within_bounds

if TYPE_CHECKING:
    from fdiv.divergences import Divergence

__all__ = ["dph_metrics", "gathered_log_ratios", "rehearsal_columns"]


@torch.no_grad()
def rehearsal_columns(log_ratio: Tensor, mask: Tensor, divergence: Divergence, level: str) -> dict[str, Tensor]:
    """Per rehearsal row `[R]`: the terms whose means are the divergences, and how many tokens they hold.

    The means over rows estimate D_f(π‖π_ref) and KL(π_ref‖π): at level `token` those of the next-token distributions,
    averaged over the positions of reference samples; at level `sequence` those of whole completions.
    """
    return {
        "divergence": rehearsal_loss(log_ratio, mask, divergence, level),
        "forward_kl": rehearsal_loss(log_ratio, mask, "forward_kl", level),
        "tokens": mask.sum(-1),
    }


def gathered_log_ratios(accelerator: Any, parts: list[Tensor]) -> Tensor:
    """`[N]` float64 on the host: the log-ratios of all processes, each with as many as it has."""
    local = torch.cat([torch.empty(0), *parts]).float().to(accelerator.device)
    padded = accelerator.pad_across_processes(local, dim=0, pad_index=math.nan)
    values = accelerator.gather(padded).cpu().double()
    return values[~values.isnan()]


def dph_metrics(examples: dict[str, Tensor], log_ratio: Tensor, divergence: Divergence, args: Any) -> dict[str, float]:
    """The log entries of the rehearsal term since the last log.

    Args:
        examples: recorded columns `[N]`: `explore_loss`, `counted` (0 where a process had no row), and per row
            `rehearsal_loss`, `row` (its number in the cache) and those of `rehearsal_columns`.
        log_ratio: log u of every rehearsal token (level `token`) or row (`sequence`); empty without rehearsal.
        divergence: f.
        args: the `DPHConfig`.

    Returns:
        `explore_loss`; `rehearsal/loss` (the mean that is multiplied by the weight), `rehearsal/rows`,
        `rehearsal/mean_tokens`; `divergence/<f>` and `divergence/forward_kl` with `_se` over distinct rows;
        `log_ratio/rehearsal_p05|p50|p95`; `rehearsal/clipped_fraction` (|c(u)| above `coefficient_clip`) and
        `clamped_fraction` (f beyond `max_exponent`), of tokens or rows as `level` says;
        `sampling/sampling_logp_difference/max` where the rollouts came with log-probabilities.
    """
    metrics = {"explore_loss": examples["explore_loss"].mean().item()}
    if "sampling_difference" in examples:
        metrics["sampling/sampling_logp_difference/max"] = examples["sampling_difference"].max().item()
    counted = examples["counted"] > 0
    if not counted.any():
        return metrics
    rows = int(counted.sum())
    numbers = examples["row"][counted]
    metrics |= {
        "rehearsal/loss": examples["rehearsal_loss"][counted].mean().item(),
        "rehearsal/rows": float(rows),
        "rehearsal/mean_tokens": examples["tokens"][counted].mean().item(),
        "clamped_fraction": rehearsal_capped(log_ratio, divergence, args.max_exponent).double().mean().item(),
        **log_ratio_quantiles("rehearsal", log_ratio),
        **density_weight_quantiles("rehearsal", divergence, log_ratio),
    }
    for name, column in (("forward_kl", "forward_kl"), (divergence.name, "divergence")):
        values = examples[column][counted]
        # A cached row that comes round again in the window is the same sample: it counts once in the error.
        value, error = clustered_mean(values, torch.ones_like(values), numbers)
        if len(numbers.unique()) == 1:
            error = math.nan
        value, error = within_bounds(divergence if column == "divergence" else get_divergence(column), value, error)
        metrics |= {f"divergence/{name}": value, f"divergence/{name}_se": error}
    if args.coefficient_clip is not None:
        coefficient = rehearsal_coefficient(log_ratio, divergence, max_exponent=args.max_exponent)
        metrics["rehearsal/clipped_fraction"] = (coefficient.abs() > args.coefficient_clip).double().mean().item()
    return metrics
