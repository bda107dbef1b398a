"""Unlearning losses that look at the whole next-token distribution: logits in, one value per example out.

Shapes: `logits[B, T, V]` are the scores for the token at each position, `token_ids[B, T]` that token and `mask[B, T]`
(bool or 0/1) the answer positions. Only masked positions are ever touched (prompt, padding and their NaNs are cut out
before the softmax), so the memory above the logits is that of the answers alone. Computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdiv.models.vocabulary import logits_divergence
from fdiv.unlearning.losses import DivergenceSpec

__all__ = ["ce_u", "pdu", "undial", "vocabulary_divergence"]


def _per_example(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values[N]`, one per true position of `mask[B, T]` in row-major order, for each row → [B]; empty: 0."""
    rows = mask.nonzero()[:, 0]
    total = values.new_zeros(mask.shape[0]).index_add(0, rows, values)
    return total / mask.sum(-1).clamp(min=1)


def _one_hot_index(token_ids: Tensor, mask: Tensor) -> Tensor:
    """`token_ids` at the masked positions as a column [N, 1] for gather and scatter."""
    return token_ids[mask].unsqueeze(-1)


def _cross_entropy(target_probs: Tensor, logits: Tensor) -> Tensor:
    """−Σ_v target_v · log softmax(logits)_v → [N]; a term with target 0 counts 0."""
    return -(target_probs * logits.log_softmax(-1)).sum(-1)


def undial(logits: Tensor, reference_logits: Tensor, token_ids: Tensor, mask: Tensor, beta: float = 10.0) -> Tensor:
    """(1/|y|) Σ_t CE(softmax(z_ref − β·onehot(y_t)), p_θ) → [B]: self-distillation with the answer's logit lowered.

    Dong et al. 2024, arXiv:2402.10052. Answer positions only (the released port also averages prompt and padding).

    Args:
        logits: [B, T, V] of the policy. reference_logits: [B, T, V] of the frozen model, no gradient.
        token_ids: [B, T] the forget answer's tokens. mask: [B, T].
        beta: how many nats are taken off the answer token's logit.
    """
    mask = mask.bool()
    index = _one_hot_index(token_ids, mask)
    target = reference_logits.detach()[mask].float()
    target = target.scatter_add(-1, index, torch.full_like(index, -beta, dtype=target.dtype)).softmax(-1)
    return _per_example(_cross_entropy(target, logits[mask].float()), mask)


def ce_u(logits: Tensor, token_ids: Tensor, mask: Tensor, skip_first: int = 1) -> Tensor:
    """(1/n) Σ_t CE(sg softmax(z with the answer token at −∞), p_θ) → [B]: CE-U (Yang 2025, arXiv:2503.01224).

    The target is the policy's own distribution without the answer token, detached; no reference, no retain rows.

    Args:
        logits: [B, T, V]. token_ids: [B, T]. mask: [B, T].
        skip_first: how many leading answer tokens are left out (the first carries no knowledge of the answer); an
            answer no longer than that counts 0.

    Raises:
        ValueError: a negative `skip_first`.
    """
    if skip_first < 0:
        raise ValueError(f"skip_first={skip_first}: must be at least 0")
    mask = mask.bool()
    mask = mask & (mask.cumsum(-1) > skip_first)
    index = _one_hot_index(token_ids, mask)
    scores = logits[mask].float()
    target = scores.detach().scatter(-1, index, float("-inf")).softmax(-1)
    return _per_example(_cross_entropy(target, scores), mask)


def pdu(logits: Tensor, mask: Tensor) -> Tensor:
    """(1/|y|) Σ_t (max_v z_v − mean_v z_v)² → [B]: PDU's forget half, a margin that flattens the logits.

    Entesari et al. 2025, arXiv:2506.05314. The positions are those that *predict* answer tokens (the released code
    masks unshifted positions).

    Args:
        logits: [B, T, V]. mask: [B, T].
    """
    mask = mask.bool()
    scores = logits[mask].float()
    return _per_example((scores.amax(-1) - scores.mean(-1)).square(), mask)


def vocabulary_divergence(
    logits: Tensor, reference_logits: Tensor, mask: Tensor, divergence: DivergenceSpec
) -> Tensor:
    """(1/|y|) Σ_t D_f(p_θ(·|x, y_<t) ‖ p_ref(·|x, y_<t)) → [B], exact over the vocabulary, in blocks of rows.

    The retain term of KL-retain (`forward_kl` = KL(ref ‖ θ)), of JensUn (`jensen_shannon`), and of any other method
    with `retain_term: divergence`.

    Args:
        logits: [B, T, V] of the policy. reference_logits: [B, T, V] of the frozen model, no gradient.
        mask: [B, T] retain answer tokens.
        divergence: any spec of `fdiv.divergences.get_divergence`.
    """
    mask = mask.bool()
    return _per_example(logits_divergence(logits[mask], reference_logits.detach()[mask], divergence), mask)
