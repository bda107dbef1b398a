"""The Sinkhorn term of distillation: how far the student's distributions of a batch must be carried to the teacher's.

After SinKD (arXiv:2402.17110): where a divergence compares token by token, optimal transport compares the n
distributions of a batch with n of the teacher, each pair at the cost C_ij = ‖p_i − q_j‖₁. SinKD is made for
classification, with the label words as the vocabulary; over a whole vocabulary the cells are the teacher's likeliest
tokens and one for all others. It is no f-divergence, and a value of the batch, not of a row alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fdiv.models.selected import cell_log_probs
from fdiv.models.vocabulary import Head, top_tokens

__all__ = ["Transport", "TransportCosts", "sinkhorn_plan", "transport_costs", "transport_from_hidden"]


def sinkhorn_plan(cost: Tensor, epsilon: float, iterations: int = 20) -> Tensor:
    """log P `[N, M]` of the transport with entropy ε between two sets of equal weights (1/N and 1/M).

    P = diag(u) e^{−C/ε} diag(v): rows and then columns are scaled in turn, in logs, so that no ε underflows. The
    columns add up to 1/M; how near the rows are to 1/N says whether the iterations were enough.

    Args:
        cost: `[N, M]`, C.
        epsilon: ε > 0; as it goes to 0, P goes to an optimal assignment.
        iterations: of both scalings.

    Returns:
        `[N, M]`, log P.

    Raises:
        ValueError: ε or the iterations are not above 0, or `cost` has no cells.
    """
    if not 0 < epsilon < math.inf or iterations < 1:
        raise ValueError(f"epsilon={epsilon} and iterations={iterations} must be above 0")
    if cost.dim() != 2 or not cost.numel():
        raise ValueError(f"cost is {tuple(cost.shape)}: it must be [N, M], with a row and a column at least")
    log_kernel = -cost / epsilon
    log_rows, log_columns = (-math.log(size) for size in cost.shape)
    to_columns = torch.zeros_like(cost[0])
    for _ in range(iterations):
        to_rows = log_rows - torch.logsumexp(log_kernel + to_columns, dim=1)
        to_columns = log_columns - torch.logsumexp(log_kernel + to_rows.unsqueeze(1), dim=0)
    return log_kernel + to_rows.unsqueeze(1) + to_columns


class TransportCosts(NamedTuple):
    """What `transport_costs` gives.

    Attributes:
        cost: `[n]`, what each of the student's distributions pays, n·∑_j P_ij C_ij; their mean is ⟨P, C⟩.
        row_error: largest |n·∑_j P_ij − 1|, 0 where the iterations were enough.
    """

    cost: Tensor
    row_error: Tensor


def transport_costs(p: Tensor, q: Tensor, *, epsilon: float = 0.1, iterations: int = 20) -> TransportCosts:
    """The cost of carrying `p[n, K]` to `q[n, K]`, distributions over the same K cells, at C_ij = ‖p_i − q_j‖₁.

    For n = 1 it is ‖p − q‖₁, twice the total variation, exactly. Gradients flow to `p` and `q` through the iterations.

    Args:
        p, q: `[n, K]`, rows that add up to 1.
        epsilon: ε of the plan's entropy, above 0.
        iterations: of `sinkhorn_plan`.

    Returns:
        The cost of every row of `p`, `[n]` in float32 (float64 for float64), and how far the plan's rows are from 1/n.

    Raises:
        ValueError: rows that are no distributions, or not over the same cells; ε or the iterations are not above 0.
    """
    p, q = (_checked(name, rows) for name, rows in (("p", p), ("q", q)))
    if p.shape[1] != q.shape[1] or (len(p) == 0) != (len(q) == 0):
        raise ValueError(f"p is {tuple(p.shape)} and q {tuple(q.shape)}: both must have rows over the same cells")
    if not len(p):
        return TransportCosts(p.sum(1), p.new_zeros(()))
    cost = torch.cdist(p, q, p=1.0)
    plan = sinkhorn_plan(cost, epsilon, iterations).exp()
    error = (len(p) * plan.detach().sum(1) - 1.0).abs().max()
    return TransportCosts(len(p) * (plan * cost).sum(1), error)


def _checked(name: str, rows: Tensor) -> Tensor:
    """Distributions `[n, K]` in float32 or float64. NaN passes: it is the loss's to refuse."""
    if rows.dim() != 2 or not rows.is_floating_point():
        raise ValueError(f"{name} is {tuple(rows.shape)} of {rows.dtype}: it must be [n, K], floating-point numbers")
    with torch.no_grad():
        exact = rows.double()
        rounding = 1e-3 + torch.finfo(rows.dtype).eps * rows.shape[1] ** 0.5
        wrong = (exact < 0).any(1) | ((exact.sum(1) - 1.0).abs() > rounding)
    if bool(wrong.any()):
        raise ValueError(
            f"{name}: {int(wrong.sum())} of {len(rows)} rows are no distributions (row {int(wrong.nonzero()[0])} adds "
            f"up to {exact.sum(1)[wrong][0].item():.4g}): pass probabilities, not their logs"
        )
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


@dataclass(frozen=True)
class Transport:
    """How the term is computed.

    Args:
        words: token ids of the label words, over which both sides are renormalised. None: the cells are the tokens
            that the teacher has among its `top_k` anywhere in a group, and one for all others.
        top_k: of the teacher. group: distributions carried to each other at once, at most.
        temperature: both logits are divided by it. epsilon, iterations: of `sinkhorn_plan`.
    """

    words: tuple[int, ...] | None = None
    top_k: int = 32
    group: int = 32
    temperature: float = 2.0
    epsilon: float = 0.1
    iterations: int = 20


def transport_from_hidden(
    hidden_p: Tensor, head_p: Head, hidden_q: Tensor, head_q: Head, how: Transport
) -> TransportCosts:
    """`transport_costs` of student and teacher from hidden states `[N, H]`, in groups of consecutive rows → `[N]`.

    The gradient goes to the student. With all tokens as cells and one group it is that of the whole distributions;
    fewer cells make every ‖p_i − q_j‖₁ smaller, never larger.
    """
    if not len(hidden_p):
        return TransportCosts(hidden_p.new_zeros(0, dtype=torch.float32), torch.zeros((), device=hidden_p.device))
    groups = [slice(start, start + how.group) for start in range(0, len(hidden_p), how.group)]
    ids = _cells(hidden_q, head_q, groups, how)
    tail = how.words is None
    log_p = cell_log_probs(hidden_p, head_p, ids, temperature=how.temperature, tail=tail)
    with torch.no_grad():
        log_q = cell_log_probs(hidden_q, head_q, ids.to(hidden_q.device), temperature=how.temperature, tail=tail)
    log_q = log_q.to(log_p)
    if not tail:
        log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    found = [transport_costs(p[rows], q[rows], epsilon=how.epsilon, iterations=how.iterations) for rows in groups]
    return TransportCosts(
        torch.cat([part.cost for part in found]), torch.stack([part.row_error for part in found]).max()
    )


def _cells(hidden_q: Tensor, head_q: Head, groups: list[slice], how: Transport) -> Tensor:
    """`[N, M]` token ids, the same within a group; −1 where a group has fewer than another."""
    if how.words is not None:
        words = torch.tensor(how.words, device=hidden_q.device)
        return words.expand(len(hidden_q), -1)
    none = torch.zeros(len(hidden_q), dtype=torch.long, device=hidden_q.device)
    top, _, _ = top_tokens(hidden_q, head_q, how.top_k, none, temperature=how.temperature)
    chosen = [top.ids[rows].unique() for rows in groups]
    most = max(len(part) for part in chosen)
    ids = torch.full((len(hidden_q), most), -1, dtype=torch.long, device=hidden_q.device)
    for rows, part in zip(groups, chosen, strict=True):
        ids[rows, : len(part)] = part
    return ids
