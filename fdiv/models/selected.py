"""log-probabilities of chosen tokens and of all others together, from hidden states and an LM head, in blocks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fdiv.models.vocabulary import (
    Head,
    _blocks,
    _check_head,
    _gradient_to_logits_,
    _Gradients,
    _log_rest,
    _log_softmax,
    _put_,
    _rows_of,
    _tiles,
    first_derivative_only,
    gathered_weights,
)

__all__ = ["cell_log_probs"]


def cell_log_probs(hidden: Tensor, head: Head, ids: Tensor, *, temperature: float = 1.0, tail: bool = True) -> Tensor:
    """log P of tokens `ids[N, M]`, P = softmax(z/T), and in a last cell of all others → `[N, M + 1]`, or `[N, M]`.

    The gradient goes to `hidden` and to weight and bias of the head; the logits of all rows never exist.

    Args:
        hidden: `[N, H]` last hidden states. head: the LM head.
        ids: of each row, no token twice; −1 is no token, and its cell −inf.
        temperature: T. tail: whether the last cell is made.

    Raises:
        ValueError: shapes that do not fit, ids outside the vocabulary.
    """
    _check_head("p", hidden, head, temperature)
    size = _rows_of(head.weight)
    if ids.dim() != 2 or len(ids) != len(hidden) or bool(((ids < -1) | (ids >= size)).any()):
        raise ValueError(f"ids is {tuple(ids.shape)}: it must be [{len(hidden)}, M], each one of {size} tokens or −1")
    return _Selected.apply(hidden, head.weight, head.bias, head, temperature, ids, tail)


class _Cells:
    """The gradient at the logits from that at the cells, as `_gradient_to_logits_` wants it."""

    def __init__(self, tail: bool) -> None:
        self.tail = tail

    def read_(self, log_p: Tensor, ids: Tensor) -> Tensor:
        """log-masses of the cells of a block, which is written to and restored."""
        absent = ids < 0
        chosen = log_p.gather(-1, ids.clamp(min=0))
        cells = chosen.masked_fill(absent, -math.inf)
        if not self.tail:
            return cells
        _put_(log_p, ids, torch.full_like(chosen, -math.inf))
        rest = _log_rest(log_p)
        _put_(log_p, ids, chosen)
        return torch.cat([cells, rest.unsqueeze(-1)], -1)

    def gradient_(self, log_p: Tensor, ids: Tensor, upstream: Tensor) -> None:
        """∂ log P_c/∂z_v = [v in c]·P_v/P_c − P_v, times what comes from above, in place of `log_p`."""
        cells = self.read_(log_p, ids)
        upstream = upstream.masked_fill(torch.isneginf(cells), 0.0)
        total = upstream.sum(-1, keepdim=True)
        at_tokens = upstream[:, : ids.shape[1]] - cells[:, : ids.shape[1]].exp() * total
        shift, factor = torch.zeros_like(total), -total
        if self.tail:
            rest = cells[:, -1:]
            shift = rest.masked_fill(torch.isneginf(rest), 0.0)
            factor = upstream[:, -1:] - rest.exp() * total
        for tile in _tiles(log_p):
            log_p[:, tile].sub_(shift).exp_().mul_(factor)
        _put_(log_p, ids, at_tokens)


class _Selected(torch.autograd.Function):
    """Cells in a first pass over the blocks, the gradient in a second."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, temperature: float, ids: Tensor,
        tail: bool,
    ) -> Tensor:  # fmt: skip
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        cells = torch.zeros(len(ids), ids.shape[1] + tail, dtype=dtype, device=hidden.device)
        log_z = torch.zeros(len(ids), dtype=dtype, device=hidden.device)
        ctx.measure, ctx.head, ctx.temperature = _Cells(tail), head._replace(weight=hidden, bias=None), temperature
        with gathered_weights(weight, bias), torch.autocast(hidden.device.type, enabled=False):
            head = head._replace(weight=weight, bias=bias)
            for rows in _blocks(len(hidden), weight.shape[0], hidden.device):
                block, log_z[rows] = _log_softmax(hidden[rows], head, temperature)
                cells[rows] = ctx.measure.read_(block, ids[rows])
        ctx.save_for_backward(hidden, weight, bias, ids, log_z)
        return cells

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, log_z = ctx.saved_tensors
        temperature, scale = ctx.temperature, ctx.head.scale / ctx.temperature
        with gathered_weights(weight, bias), torch.autocast(hidden.device.type, enabled=False):
            head = ctx.head._replace(weight=weight, bias=bias)
            gradients = _Gradients((hidden, weight, bias), ctx.needs_input_grad[:3], upstream.dtype)
            for rows in _blocks(len(hidden), weight.shape[0], hidden.device):
                block, _ = _log_softmax(hidden[rows], head, temperature)
                _gradient_to_logits_(block, log_z[rows], head, temperature, ctx.measure, ids[rows], upstream[rows])
                gradients.add(block.mul_(scale), rows, hidden, weight)
        kinds = (hidden, weight, bias)
        found = [None if g is None else g.to(part.dtype) for g, part in zip(gradients.parts, kinds, strict=True)]
        return (*found, None, None, None, None)
