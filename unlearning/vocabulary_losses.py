"""Unlearning losses that look at the whole next-token distribution: logits in, one value per example out.

Shapes: `logits[B, T, V]` are the scores for the token at each position, `token_ids[B, T]` that token and `mask[B, T]`
(bool or 0/1) the answer positions. Only masked positions are ever touched (prompt, padding and their NaNs are cut out
before the softmax), so the memory above the logits is that of the answers alone. Computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdiv.models.vocabulary import logits_divergence
from fdiv.unlearning.losses import DivergenceSpec, answer_weights

__all__ = ["ce_u", "pdu", "shred", "shred_positions", "shred_target", "undial", "vocabulary_divergence"]


def _per_example(values: Tensor, mask: Tensor, first_share: float | None = None) -> Tensor:
    """Mean of `values[N]`, one per true position of `mask[B, T]` in row-major order, for each row → [B]; empty: 0.

    With `first_share` as in `fdiv.unlearning.losses.answer_mean`.
    """
    rows = mask.nonzero()[:, 0]
    if first_share is not None:
        weights = answer_weights(mask, first_share)[mask]
        return values.new_zeros(mask.shape[0]).index_add(0, rows, weights.to(values) * values)
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


def shred_positions(token_log_probs: Tensor, mask: Tensor, share: float) -> Tensor:
    """The answer positions that SHRED demotes → [B, T] bool: of each row the ⌊P·n⌋ least likely ones, one at least.

    Args:
        token_log_probs: [B, T] log p of the row's own tokens under the frozen model. mask: [B, T].
        share: P in (0, 1]. Of equally likely tokens the earlier come first.
    """
    mask = mask.bool()
    count = mask.sum(-1, keepdim=True)
    wanted = torch.where(count > 0, (share * count + 1e-6).floor().clamp(min=1), 0)
    order = torch.where(mask, token_log_probs, torch.inf).argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(mask.size(-1), device=mask.device).expand_as(order)
    )
    return mask & (rank < wanted)


def shred_target(
    reference_logits: Tensor, token_ids: Tensor, demoted: Tensor, *, nucleus: float = 0.0, top_k: int | None = None
) -> Tensor:
    """SHRED's target q_t(v) = p(v)·1[v ∉ V_t]/Z_t of positions `[N]` → [N, V].

    p is the frozen model's distribution, cut to its `top_k` tokens first where that is set. V_t is empty at positions
    that are kept. At demoted ones it is the row's own token, and with `nucleus` also the smallest set of most likely
    tokens that holds that much of p; where that is all of p, its least likely other token stays.

    Args:
        reference_logits: [N, V]. token_ids: [N] the row's own tokens. demoted: [N] bool.
        nucleus: π in [0, 1), 0 for the token alone. top_k: k, None for the whole vocabulary.
    """
    scores = reference_logits.float()
    if top_k is not None and top_k < scores.size(-1):
        lowest = scores.topk(top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < lowest, -torch.inf)
    taken = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, token_ids.unsqueeze(-1), True)
    if nucleus > 0:
        ordered, order = scores.softmax(-1).sort(-1, descending=True)
        within = ordered.cumsum(-1) - ordered < nucleus  # what stands before the token does not hold π yet
        taken |= torch.zeros_like(taken).scatter_(-1, order, within)
    cut = scores.masked_fill(taken & demoted.unsqueeze(-1), -torch.inf)
    nothing_left = torch.isinf(cut).all(-1, keepdim=True)
    others = torch.isinf(scores).scatter(-1, token_ids.unsqueeze(-1), True)
    last = scores.masked_fill(others, torch.inf).argmin(-1, keepdim=True)
    alone = torch.full_like(scores, -torch.inf).scatter_(-1, last, 0.0)
    return torch.where(nothing_left, alone, cut).softmax(-1)


def shred(
    logits: Tensor,
    reference_logits: Tensor,
    token_ids: Tensor,
    mask: Tensor,
    share: float,
    *,
    nucleus: float = 0.0,
    top_k: int | None = None,
) -> Tensor:
    """(1/|y|) Σ_t KL(q_t ‖ p_θ(·|x, y_<t)) → [B]: SHRED (Hu et al. 2026, arXiv:2605.07482).

    Self-distillation towards the frozen model's own distribution, from which the answer's token is taken out at the
    least likely positions (`shred_positions`, `shred_target`); the other positions hold the model where it was. The
    paper sums over positions and rows; here each row counts by its mean, as everywhere.

    Args:
        logits: [B, T, V] of the policy. reference_logits: [B, T, V] of the frozen model, no gradient.
        token_ids: [B, T] the forget answer's tokens. mask: [B, T].
        share: P. nucleus: π. top_k: k.
    """
    mask = mask.bool()
    frozen, tokens = reference_logits.detach()[mask].float(), token_ids[mask]
    own = frozen.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - frozen.logsumexp(-1)
    log_probs = torch.zeros(mask.shape, device=own.device).masked_scatter(mask, own)
    demoted = shred_positions(log_probs, mask, share)[mask]
    target = shred_target(frozen, tokens, demoted, nucleus=nucleus, top_k=top_k)
    values = torch.xlogy(target, target).sum(-1) + _cross_entropy(target, logits[mask].float())
    return _per_example(values, mask)


def vocabulary_divergence(
    logits: Tensor,
    reference_logits: Tensor,
    mask: Tensor,
    divergence: DivergenceSpec,
    *,
    first_share: float | None = None,
) -> Tensor:
    """(1/|y|) Σ_t D_f(p_θ(·|x, y_<t) ‖ p_ref(·|x, y_<t)) → [B], exact over the vocabulary, in blocks of rows.

    The retain term of KL-retain (`forward_kl` = KL(ref ‖ θ)), of JensUn (`jensen_shannon`), and of any other method
    with `retain_term: divergence`.

    Args:
        logits: [B, T, V] of the policy. reference_logits: [B, T, V] of the frozen model, no gradient.
        mask: [B, T] retain answer tokens.
        divergence: any spec of `fdiv.divergences.get_divergence`. first_share: see
            `fdiv.unlearning.losses.answer_mean`; None weighs tokens alike.
    """
    mask = mask.bool()
    values = logits_divergence(logits[mask], reference_logits.detach()[mask], divergence)
    return _per_example(values, mask, first_share)
