"""Unlearning losses on token log-probabilities: tensors in, one value per example out, smaller is better.

Shapes: B examples, T tokens. `log_probs[B, T]` are log p(y_t | x, y_<t) in nats and `mask[B, T]` (bool or 0/1) marks
answer tokens; what stands at other positions, NaN included, reaches neither value nor gradient. An example without
answer tokens counts 0. Per-example values are never divided by padding or by another example's length, so the mean
over a batch does not depend on how the rows were batched. The losses that need the whole vocabulary are in
`fdiv.unlearning.vocabulary_losses`.

P is the trained policy, Q the frozen reference, log-ratio = log P − log Q, as everywhere in `fdiv`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fdiv.alignment.f_dpo.loss import f_dpo_loss
from fdiv.divergences import Divergence, get_divergence

DivergenceSpec = str | Mapping | Divergence
Reduction = Literal["token_mean", "geo_mean", "log_mean"]

REDUCTIONS: tuple[str, ...] = ("token_mean", "geo_mean", "log_mean")
OFFICIAL_FLAT_DIVERGENCES: tuple[str, ...] = ("jensen_shannon", "pearson_chi2", "reverse_kl", "total_variation")
"""The divergences whose sign is right in the released FLAT code (there: JS, Pearson, KL, TV)."""

__all__ = [
    "OFFICIAL_FLAT_DIVERGENCES",
    "REDUCTIONS",
    "answer_mean",
    "answer_score",
    "answer_weights",
    "balance_scale",
    "check_one_hot_divergence",
    "flat_loss",
    "grad_ascent",
    "grad_diff",
    "idk_dpo",
    "jensun",
    "masked_mean",
    "nll",
    "npo",
    "padded_batch_mean",
    "rmu",
    "sampled_divergence",
    "sat_imp",
    "simnpo",
    "wga",
]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values[B, T]` over each row's masked positions, in float32 or wider → [B]; 0 for an empty row.

    Args:
        values: [B, T], of any unit. mask: [B, T], bool or 0/1.
    """
    mask = mask.bool()
    values = torch.where(mask, values, torch.zeros_like(values))
    total = values.sum(-1, dtype=torch.promote_types(values.dtype, torch.float32))
    return total / mask.sum(-1).clamp(min=1)


def answer_mean(values: Tensor, mask: Tensor, first_share: float | None = None) -> Tensor:
    """`masked_mean`, or with `first_share` a mean in which the first answer token has that weight → [B].

    The other tokens of the answer share the rest evenly; an answer of one token has it alone (JensUn++, in SUITE,
    arXiv:2607.09236, with a share of ½).

    Args:
        values: `[B, T]`, a value of every token.
        mask: `[B, T]`, 1 on answer tokens.
        first_share: weight of the first answer token, in (0, 1); None: all weigh the same.
    """
    return masked_mean(values, mask) if first_share is None else _weighted(values, answer_weights(mask, first_share))


def answer_weights(mask: Tensor, first_share: float) -> Tensor:
    """The weights of `answer_mean` → [B, T]; they add up to 1 over an answer, and are 0 elsewhere."""
    mask = mask.bool()
    count = mask.sum(-1, keepdim=True)
    first = mask & (mask.cumsum(-1) == 1)
    rest = (1 - first_share) / (count - 1).clamp(min=1)
    return torch.where(first, torch.where(count == 1, 1.0, first_share), rest) * mask


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    values = torch.where(weights > 0, values, torch.zeros_like(values))
    return (weights * values.to(torch.promote_types(values.dtype, torch.float32))).sum(-1)


def _masked(log_probs: Tensor, mask: Tensor) -> Tensor:
    """`log_probs` in float32 or wider with exact zeros outside the mask (before any exp, so no NaN can be born)."""
    log_probs = log_probs.to(torch.promote_types(log_probs.dtype, torch.float32))
    return torch.where(mask.bool(), log_probs, torch.zeros_like(log_probs))


# ------------------------------------------------------------------------------------------------ FLAT (2410.11143)


def answer_score(log_probs: Tensor, mask: Tensor, reduction: Reduction = "token_mean") -> Tensor:
    """One number per answer, the scalar that FLAT feeds to the divergence → [B].

    * `token_mean`: (1/|y|) Σ_t p(y_t | x, y_<t), the mean token probability of the FLAT paper, in [0, 1];
    * `geo_mean`: exp((1/|y|) Σ_t log p), TOFU's length-normalised probability, in [0, 1];
    * `log_mean`: (1/|y|) Σ_t log p, the mean log-likelihood, in (−∞, 0].

    Raises:
        ValueError: an unknown reduction.

    Args:
        log_probs: [B, T] of the answer's tokens, in nats. mask: [B, T], bool or 0/1, the tokens that count.
        reduction: one of the three above.
    """
    log_probs = _masked(log_probs, mask)
    if reduction == "token_mean":
        return masked_mean(log_probs.exp(), mask)
    if reduction == "geo_mean":
        return masked_mean(log_probs, mask).exp()
    if reduction == "log_mean":
        return masked_mean(log_probs, mask)
    raise ValueError(f"reduction={reduction!r} is unknown: use one of {', '.join(REDUCTIONS)}")


def padded_batch_mean(log_probs: Tensor, mask: Tensor, padded_length: int) -> Tensor:
    """Σ_b Σ_t p_t / (B·(padded_length − 1)) → [1]: the probability as the released FLAT code averages it.

    Every one of the `padded_length − 1` shifted positions of every row counts, those outside the answer as 0, and the
    average runs over the batch *before* the divergence is applied. Kept for comparison only (`compat: official`); the
    value depends on the padding and on the batch.

    Args:
        log_probs: [B, T] token log-probabilities. mask: [B, T] answer tokens.
        padded_length: the fixed length in tokens each row is padded to (500 for TOFU, 1,024 for Harry Potter).

    Raises:
        ValueError: rows longer than `padded_length`.
    """
    if log_probs.shape[-1] > padded_length - 1:
        raise ValueError(
            f"padded_length={padded_length} is shorter than the rows ({log_probs.shape[-1] + 1} tokens): raise it, or "
            "truncate the rows to it"
        )
    probs = torch.where(mask.bool(), _masked(log_probs, mask).exp(), 0.0)
    return (probs.sum() / (probs.shape[0] * (padded_length - 1))).reshape(1)


def flat_loss(template_prob: Tensor, forget_prob: Tensor, divergence: DivergenceSpec) -> Tensor:
    """FLAT: −g(P_e) + f*(g(P_f)) → [B], with the f-GAN output activation g and the Fenchel conjugate f*.

    Falls in the template answer's score P_e and rises in the forget answer's score P_f, for every divergence of the
    registry (Wang et al. 2025, arXiv:2410.11143, the variational form of Nowozin et al. 2016). The value is that of
    the textbook pair (f, g): the registry's centring of f cancels. FLAT's "KL" is `reverse_kl` here.

    Args:
        template_prob: [B] score of the template answer, a probability unless it is a log one; see `answer_score`.
        forget_prob: [B] score of the answer to forget, same reduction.
        divergence: any spec of `fdiv.divergences.get_divergence`.
    """
    divergence = get_divergence(divergence)
    return divergence.conjugate(divergence.activation(forget_prob)) - divergence.activation(template_prob)


# ------------------------------------------------------------------------------------------- likelihood of an answer


def nll(log_probs: Tensor, mask: Tensor) -> Tensor:
    """−(1/|y|) Σ_t log p(y_t) → [B] in nats per token: the retain term R of GradDiff and most others.

    Args:
        log_probs: [B, T] of the answer's tokens, in nats. mask: [B, T], bool or 0/1, the tokens that count.
    """
    return -masked_mean(log_probs, mask)


def grad_ascent(log_probs: Tensor, mask: Tensor) -> Tensor:
    """(1/|y|) Σ_t log p(y_t) → [B]: gradient ascent on the forget answer's NLL (unbounded below).

    Args:
        log_probs: [B, T] of the answer's tokens, in nats. mask: [B, T], bool or 0/1, the tokens that count.
    """
    return masked_mean(log_probs, mask)


def grad_diff(
    forget_log_probs: Tensor,
    forget_mask: Tensor,
    retain_log_probs: Tensor,
    retain_mask: Tensor,
    *,
    forget_weight: float = 1.0,
    retain_weight: float = 1.0,
) -> Tensor:
    """γ·grad_ascent(forget) + α·nll(retain) → [B], row i of the one paired with row i of the other (Liu et al. 2022).

    Args:
        forget_log_probs, forget_mask: [B, T] of the forget answers.
        retain_log_probs, retain_mask: [B, T'] of the retain answers.
        forget_weight: γ. retain_weight: α.
    """
    forget = grad_ascent(forget_log_probs, forget_mask)
    return forget_weight * forget + retain_weight * nll(retain_log_probs, retain_mask)


# ------------------------------------------------------------------------------------------------- preference-like


def npo(forget_log_ratio: Tensor, beta: float = 0.1) -> Tensor:
    """−(2/β)·log σ(−β·log(P/Q)(y_f)) → [B]: negative preference optimisation (Zhang et al. 2024, arXiv:2404.05868).

    Args:
        forget_log_ratio: [B] summed log-ratio of the forget answer to the reference, in nats.
        beta: β > 0; as β → 0 it becomes gradient ascent up to a constant.

    Raises:
        ValueError: β not above 0.
    """
    return -2.0 / _positive("beta", beta) * logsigmoid(-beta * forget_log_ratio)


def simnpo(log_probs: Tensor, mask: Tensor, beta: float = 4.5, delta: float = 0.0) -> Tensor:
    """−(2/β)·log σ(β·(nll(y_f) − δ)) → [B]: NPO without a reference, length-normalised (Fan et al. 2024).

    arXiv:2410.07163 with γ = β·δ.

    Args:
        log_probs, mask: [B, T] of the forget answers.
        beta: β > 0. delta: the margin δ in nats per token.

    Raises:
        ValueError: β not above 0.
    """
    return -2.0 / _positive("beta", beta) * logsigmoid(beta * (nll(log_probs, mask) - delta))


def idk_dpo(
    template_log_ratio: Tensor,
    forget_log_ratio: Tensor,
    divergence: DivergenceSpec = "reverse_kl",
    beta: float = 0.1,
    *,
    max_exponent: float | None = None,
) -> Tensor:
    """(2/β)·f_dpo_loss(template, forget) → [B]: prefer "I don't know" to the answer (TOFU, arXiv:2401.06121).

    With reverse KL this is TOFU's DPO. The factor 2/β is TOFU's and NPO's; it makes the retain weight α mean the same
    for all of them. AltPO is the same loss with alternate answers as templates (arXiv:2409.13474).

    Args:
        template_log_ratio: [B] summed log-ratio of the template answer (chosen).
        forget_log_ratio: [B] summed log-ratio of the forget answer (rejected).
        divergence: valid for f-DPO, that is f'(0⁺) = −∞.
        beta: β > 0. max_exponent: see `fdiv.alignment.f_dpo.loss.f_dpo_loss`.

    Raises:
        ValueError: an invalid divergence, or β not above 0.
    """
    scale = 2.0 / _positive("beta", beta)
    return scale * f_dpo_loss(template_log_ratio, forget_log_ratio, divergence, beta, max_exponent=max_exponent)


# --------------------------------------------------------------------------------------------- token re-weighting


def wga(log_probs: Tensor, mask: Tensor, beta: float = 1.0) -> Tensor:
    """(1/|y|) Σ_t sg(p_t^β)·log p_t → [B]: weighted gradient ascent, weights detached (Wang et al. 2025).

    arXiv:2502.19301. Bounded steps: a token's weight goes to 0 with its probability.

    Args:
        log_probs: [B, T] of the forget answers, in nats. mask: [B, T], bool or 0/1. beta: exponent of the weight, ≥ 0.
    """
    log_probs = _masked(log_probs, mask)
    return masked_mean((beta * log_probs.detach()).exp() * log_probs, mask)


def sat_imp(log_probs: Tensor, mask: Tensor, beta1: float = 5.0, beta2: float = 1.0) -> Tensor:
    """(1/|y|) Σ_t sg(p_t^β₁·(1 − p_t)^β₂)·log p_t → [B]: saturation and importance weights (SatImp, arXiv:2505.11953).

    Args:
        log_probs, mask: [B, T] of the forget answers.
        beta1: exponent of p_t (saturation). beta2: exponent of 1 − p_t (importance); both ≥ 0.

    Raises:
        ValueError: a negative exponent (the weight would be infinite at p = 0 or 1).
    """
    if beta1 < 0 or beta2 < 0:
        raise ValueError(f"beta1={beta1}, beta2={beta2}: both must be at least 0, or the weight is infinite at 0 or 1")
    log_probs = _masked(log_probs, mask)
    frozen = log_probs.detach()
    weight = (beta1 * frozen).exp() * (-torch.expm1(frozen)).clamp(min=0) ** beta2
    return masked_mean(weight * log_probs, mask)


# ------------------------------------------------------------------------------------------- divergences per token


def check_one_hot_divergence(divergence: DivergenceSpec) -> Divergence:
    """The divergence that `divergence` specifies, if its distance to a one-hot Q is finite, that is f'(∞) < ∞.

    Raises:
        ValueError: f'(∞) = ∞: any mass off the target would cost infinitely much.
    """
    divergence = get_divergence(divergence)
    if divergence.slope_at_infinity == float("inf"):
        raise ValueError(
            f"{divergence.name} has f'(∞) = ∞, so its distance to a one-hot target is infinite wherever the policy "
            "leaves it any mass: use one with a finite slope at infinity, such as jensen_shannon or squared_hellinger"
        )
    return divergence


def jensun(
    target_log_probs: Tensor,
    mask: Tensor,
    divergence: DivergenceSpec = "jensen_shannon",
    *,
    first_share: float | None = None,
) -> Tensor:
    """(1/|y|) Σ_t D_f(p_θ(·|x, y_<t) ‖ onehot(w_t)) → [B]: JensUn's forget half for any f with f'(∞) < ∞.

    Against a one-hot Q every other token has Q = 0, so D_f = f(p(w_t)) + (1 − p(w_t))·f'(∞): only the probability of
    the target token is needed. w_t is a refusal pattern ("No idea") repeated over the answer's positions, the context
    stays the forget answer. For Jensen–Shannon it is bounded by f(0) + f'(∞) = 2 log 2 in the registry's scale.

    Args:
        target_log_probs: [B, T] log p_θ(w_t | x, y_<t). mask: [B, T] positions of the forget answer.
        divergence: f with a finite slope at infinity. first_share: see `answer_mean`; None weighs tokens alike.

    Raises:
        ValueError: see `check_one_hot_divergence`.
    """
    divergence = check_one_hot_divergence(divergence)
    log_probs = _masked(target_log_probs, mask)
    off_target = -torch.expm1(log_probs)
    values = divergence.generator(log_probs) + off_target * divergence.slope_at_infinity
    return answer_mean(values, mask, first_share)


def balance_scale(retain_norm: Tensor, forget_norm: Tensor) -> Tensor:
    """‖∇R‖/(‖∇F‖ + 10⁻⁵), at most 10⁶ and 1 where the norms are equal: what JensUn++ multiplies its forget half by.

    With it the two halves have gradients of one norm (SUITE, arXiv:2607.09236, and its released code, from which the
    constants are).

    Args:
        retain_norm, forget_norm: scalars `[]`, norms of the gradients with respect to the logits of the rows of
            each half.

    Returns:
        A scalar `[]` without unit.
    """
    scale = (retain_norm / (forget_norm + 1e-5)).clamp(max=1e6)
    return torch.where(retain_norm == forget_norm, torch.ones_like(scale), scale)


def sampled_divergence(log_ratio: Tensor, mask: Tensor, divergence: DivergenceSpec) -> Tensor:
    """(1/|y|) Σ_t f(P(y_t)/Q(y_t)) → [B]: the retain term on the retain rows' own tokens.

    Equals the expectation E_Q f(P/Q) when Q sampled those tokens; on other text it is a penalty
    that is 0 with zero gradient exactly where P = Q, not an estimate of the divergence. One number per token is kept,
    so no vocabulary-sized tensor is needed; `vocabulary_divergence` is the exact sum.

    Args:
        log_ratio: [B, T] log P(y_t) − log Q(y_t). mask: [B, T] retain answer tokens.
        divergence: any spec of `get_divergence`.
    """
    divergence = get_divergence(divergence)
    return masked_mean(divergence.generator(_masked(log_ratio, mask)), mask)


# ------------------------------------------------------------------------------------------------------ activations


def rmu(hidden: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """(1/|y|) Σ_t ‖h_t − target_t‖² / D → [B]: RMU's squared error on one layer's activations (Li et al. 2024).

    arXiv:2403.03218. The forget half has target = c·u, one fixed random unit vector for all positions; the retain
    half has the frozen model's activations.

    Args:
        hidden: [B, T, D] activations. target: broadcastable to `hidden`, no gradient. mask: [B, T].
    """
    error = (hidden.to(torch.float32) - target.detach().to(torch.float32)).square().mean(-1)
    return masked_mean(error, mask)


def _positive(name: str, value: float) -> float:
    """`value` when above 0, else a ValueError that names it."""
    if not value > 0:
        raise ValueError(f"{name}={value}: must be above 0")
    return value
