"""The cells of two distributions, as the fused forms of Q·f(P/Q) and P·f′(P/Q) read them: each exponential once.

A divergence over a vocabulary is a sum over cells, and its gradient a second one. Written with P, Q and their logs
(not with f of log t), both take few passes over memory, overflow nowhere, and lose only what is below the rounding of
P + Q. `Divergence.exact` keeps the digits near P = Q instead.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from fdiv.divergences.saturation import DEFAULT_MAX_EXPONENT

#: Below the smallest float32: a sum of two masses that is clamped here has no mass to speak of.
_TINY = 1e-37


class Cells:
    """Matching cells of two distributions, `log_p` and `log_q` finite, of one shape; the rest is made on demand."""

    def __init__(self, log_p: Tensor, log_q: Tensor) -> None:
        self.log_p, self.log_q = log_p, log_q

    @cached_property
    def p(self) -> Tensor:
        """P."""
        return self.log_p.exp()

    @cached_property
    def q(self) -> Tensor:
        """Q."""
        return self.log_q.exp()

    @cached_property
    def log_t(self) -> Tensor:
        """log(P/Q)."""
        return self.log_p - self.log_q

    @cached_property
    def gap(self) -> Tensor:
        """P − Q."""
        return self.p - self.q

    @cached_property
    def total(self) -> Tensor:
        """P + Q, never 0."""
        return (self.p + self.q).clamp_(min=_TINY)

    @cached_property
    def log_mean(self) -> Tensor:
        """log of (P + Q)/2."""
        return self.total.log().sub_(math.log(2.0))

    @cached_property
    def over_total(self) -> Tensor:
        """(P − Q)/(P + Q)."""
        return self.gap / self.total

    @cached_property
    def square_over_p(self) -> tuple[Tensor, Tensor]:
        """Q²/P as Q·e^y, y = log(Q/P), and what it is beyond the registry's cap y = 60: its derivative in y there."""
        return _capped_growth(self.log_q, -self.log_t)

    @cached_property
    def square_over_q(self) -> tuple[Tensor, Tensor]:
        """P²/Q, in the same way."""
        return _capped_growth(self.log_p, self.log_t)

    def blend(self, weight: float, rest: float) -> Tensor:
        """log(weight·P + rest·Q)."""
        return (weight * self.p + rest * self.q).clamp_(min=_TINY).log_()


def _capped_growth(log_mass: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """mass·e^y with y capped as the registry caps it (a logarithm above 60), and the derivative of that in y."""
    low = torch.exp(log_mass + exponent.clamp(max=DEFAULT_MAX_EXPONENT))
    excess = (exponent - DEFAULT_MAX_EXPONENT).relu_()
    return low * (1.0 + torch.log1p(excess)), low / (1.0 + excess)


def log_sum_exp(values: Tensor) -> Tensor:
    """logsumexp over the last axis whose gradient is 0, not NaN, for a row of −inf."""
    empty = torch.isneginf(values).all(-1)
    return values.masked_fill(empty.unsqueeze(-1), 0.0).logsumexp(-1).masked_fill(empty, -math.inf)
