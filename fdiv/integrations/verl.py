"""verl: one of its policy losses plus an f-divergence from the policy that sampled.

    # my_losses.py, found through VERL_USE_EXTERNAL_MODULES=my_losses; actor_rollout_ref.actor.policy_loss.loss_mode=js
    from fdiv.integrations.verl import register

    register("js", "jensen_shannon", coefficient=0.1)

The interface, `register_policy_loss`, is that of verl 0.9.1, read from its wheel (the same in 0.9.0 and on main in
August 2026). What was run and what not: docs/integrations.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fdiv.divergences import get_divergence
from fdiv.rl.dph.loss import rehearsal_penalty

if TYPE_CHECKING:
    from fdiv.divergences import Divergence

__all__ = ["policy_loss", "register"]


def policy_loss(
    divergence: str | Mapping[str, Any] | Divergence,
    coefficient: float,
    *,
    base: str = "vanilla",
    max_exponent: float | None = None,
    coefficient_clip: float | None = None,
) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """A policy loss with verl's signature: L = L_base + η·mean f(u), u = π_θ(y_t|·)/π_old(y_t|·) per token.

    The tokens are samples of π_old, so the mean of f(u) estimates D_f(π_θ‖π_old) on the visited prefixes and autograd
    through it is the right gradient. It is aggregated by verl's `agg_loss`, as the base loss is, so that neither
    depends on how a mini-batch is cut. Two uses:

    * a trust region of any f, with `base="vanilla"` and wide clip ratios, or with `base="gpg"`;
    * DPH-RL's rehearsal (arXiv:2509.07430): rows whose `old_log_probs` are those of the reference that wrote them and
      whose advantages are 0. The base loss is 0 there, and f(π_θ/π_ref) is left.

    Args:
        divergence: any spec of `get_divergence`.
        coefficient: η ≥ 0.
        base: a loss that verl has registered under this name.
        max_exponent: overflow cap. coefficient_clip: bound on the factor of ∇log π_θ. Both as in `rehearsal_loss`.

    Returns:
        A function of `old_log_prob`, `log_prob`, `advantages`, `response_mask` (`[B, T]`), `loss_agg_mode`, `config`
        and `rollout_is_weights` → (loss `[]`, metrics); the metrics are the base's and `actor/f_divergence`, the mean
        of f(u) over the tokens, in nats.

    Raises:
        ValueError: an unknown divergence; `coefficient` negative or not finite; a bound that is not above 0.
    """
    divergence = get_divergence(divergence)
    if not 0 <= coefficient < math.inf:
        raise ValueError(f"coefficient={coefficient}: the weight of the divergence must be at least 0 and finite")
    bounds = {"max_exponent": max_exponent, "coefficient_clip": coefficient_clip}
    rehearsal_penalty(torch.zeros(1), divergence, **bounds)  # refuses a wrong bound here rather than in a worker

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn

        value, metrics = get_policy_loss_fn(base)(
            old_log_prob=old_log_prob,
            log_prob=log_prob,
            advantages=advantages,
            response_mask=response_mask,
            loss_agg_mode=loss_agg_mode,
            config=config,
            rollout_is_weights=rollout_is_weights,
        )
        # What stands at padding, NaN included, must not reach the gradient: 0·NaN is NaN.
        counted = response_mask.bool()
        log_ratio = torch.where(counted, log_prob - old_log_prob.detach(), 0.0)
        penalty = rehearsal_penalty(log_ratio, divergence, **bounds)
        mean = penalty.detach()[counted].mean() if counted.any() else penalty.detach().sum()
        if rollout_is_weights is not None:  # as every loss of verl's: samples of the rollout engine, not of π_old
            penalty = penalty * rollout_is_weights
        batch = getattr(config, "global_batch_info", {})
        added = agg_loss(loss_mat=penalty, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **batch)
        return value + coefficient * added, {**metrics, "actor/f_divergence": mean.item()}

    return loss


def register(name: str, divergence: str | Mapping[str, Any] | Divergence, coefficient: float, **options: Any) -> None:
    """Register `policy_loss(divergence, coefficient, **options)` with verl, for `policy_loss.loss_mode=name`.

    Raises:
        ImportError: verl is not installed.
        ValueError: as `policy_loss`; a name that is taken; a base that verl does not have.
    """
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn, register_policy_loss

    if name in POLICY_LOSS_REGISTRY:
        raise ValueError(f"verl has a policy loss named {name!r} already: choose another name")
    get_policy_loss_fn(options.get("base", "vanilla"))
    register_policy_loss(name)(policy_loss(divergence, coefficient, **options))
