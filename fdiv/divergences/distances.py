"""Distances of two distributions that are no f-divergences: they have no f(t), only a value for whole distributions.

They stand beside the registry where a whole next-token distribution is compared (distillation): `cauchy_schwarz`,
`gated(forward, reverse, gate)`, and multiples and sums of these and of f-divergences. Where an objective needs an f,
`get_divergence` refuses them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fdiv.divergences.base import Divergence
from fdiv.divergences.cells import Cells, log_sum_exp
from fdiv.divergences.gates import Gate
from fdiv.divergences.saturation import as_float

__all__ = ["CauchySchwarz", "Combined", "Distance", "Gated", "OfF", "as_distance"]


class Distance:
    """A distance D(P, Q) ≥ 0 of categorical distributions, differentiable in P.

    Subclasses give `exact`, and for sums over a vocabulary `rows` and `slopes`: per row the value and the few
    `numbers` that its gradient needs, so that ∂D/∂z of P = softmax(z) is made cell by cell. Treat instances as
    immutable.
    """

    #: Registry name.
    name: str = ""
    aliases: tuple[str, ...] = ()
    #: Parameters by name, read-only.
    parameters: Mapping[str, Any] = MappingProxyType({})
    #: Numbers per row that `slopes` needs.
    numbers: int = 0

    @property
    def label(self) -> str:
        """Short text for tables and file names: the name, with the parameters in brackets."""
        inside = ",".join(getattr(value, "label", str(value)) for value in self.parameters.values())
        return f"{self.name}({inside})" if inside else self.name

    def __repr__(self) -> str:
        return f"<Distance {self.label}>"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash((type(self), self._identity()))

    def _identity(self) -> tuple:
        return (self.name, tuple(self.parameters.items()))

    # ---------------------------------------------------------------- algebra
    def scaled(self, factor: float) -> Distance:
        """factor · D. Raises ValueError unless factor is positive and finite."""
        return Combined([(factor, self)])

    def normalized(self) -> Distance:
        """The distance with f''(1) = 1, where it is made of f-divergences. Raises ValueError elsewhere."""
        raise ValueError(f"{self.label} has no f''(1), so it cannot be normalized: set its weight by hand")

    def __add__(self, other: Distance | Divergence) -> Distance:
        if not isinstance(other, Distance | Divergence):
            return NotImplemented
        return Combined([(1.0, self), (1.0, as_distance(other))])

    def __radd__(self, other: Distance | Divergence) -> Distance:
        if not isinstance(other, Distance | Divergence):
            return NotImplemented
        return Combined([(1.0, as_distance(other)), (1.0, self)])

    # ---------------------------------------------------------------- the distance
    def exact(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """D(P, Q) of distributions given as log-probabilities `[..., K]` → `[...]`; gradients flow to both."""
        raise NotImplementedError

    def rows(self, log_p: Tensor, log_q: Tensor, columns: Sequence[slice], holes: bool) -> tuple[Tensor, Tensor]:
        """(D `[n]`, the numbers `[n, numbers]` that `slopes` needs) of a block `[n, V]`; no gradient is kept.

        Args:
            columns: parts of the block to handle at once. holes: whether a cell may be −inf.
        """
        raise NotImplementedError

    def slopes(self, cells: Cells, numbers: Tensor, holes: bool) -> Tensor:
        """∂D/∂z of some columns of a block, P = softmax(z); 0 in a row whose D is infinite."""
        raise NotImplementedError


class OfF(Distance):
    """An f-divergence as a distance: ∂D_f/∂z = w − p·∑w with w = p·f'(t), so one number a row."""

    numbers = 1

    def __init__(self, divergence: Divergence) -> None:
        self.divergence = divergence

    @property
    def label(self) -> str:
        return self.divergence.label

    def _identity(self) -> tuple:
        return (self.divergence,)

    def normalized(self) -> Distance:
        return OfF(self.divergence.normalized())

    def exact(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return self.divergence.exact(log_p, log_q)

    def rows(self, log_p: Tensor, log_q: Tensor, columns: Sequence[slice], holes: bool) -> tuple[Tensor, Tensor]:
        value, total = log_p.new_zeros(log_p.shape[0]), log_p.new_zeros(log_p.shape[0])
        for some in columns:
            cells = Cells(log_p[:, some], log_q[:, some])
            mass = self.divergence.mass(cells.log_p, cells.log_q) if holes else self.divergence._mass(cells)
            value += mass.sum(-1)
            total += self._weight(cells, holes).sum(-1)
        value.clamp_(min=0.0)  # rounding at P = Q
        return value, total.unsqueeze(-1)

    def slopes(self, cells: Cells, numbers: Tensor, holes: bool) -> Tensor:
        return self._weight(cells, holes) - cells.p * numbers

    def _weight(self, cells: Cells, holes: bool) -> Tensor:
        if holes:
            return self.divergence.mass_derivative(cells.log_p, cells.log_q)
        return self.divergence._mass_derivative(cells)


class CauchySchwarz(Distance):
    """−2 log ∑PQ + log ∑P² + log ∑Q² = −2 log of the cosine of P and Q; ∞ where they share no cell.

    Symmetric, 0 only at P = Q, the same for unnormalised P and Q. ∂D/∂z_v = 2p_v(p_v/∑P² − q_v/∑PQ) lies in [−2, 2],
    however far P is from Q. It is no f-divergence: joining cells may raise it, so a teacher's top k give no bound.
    """

    name = "cauchy_schwarz"
    numbers = 2

    def exact(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_p, log_q = torch.broadcast_tensors(as_float(log_p, "log_p"), as_float(log_q, "log_q"))
        pp, qq, pq = (log_sum_exp(logs) for logs in _products(log_p, log_q))
        p, q = _unit(log_p, pp.unsqueeze(-1)), _unit(log_q, qq.unsqueeze(-1))
        return _from_angle(pp, qq, pq, (p - q).square().sum(-1))

    def rows(self, log_p: Tensor, log_q: Tensor, columns: Sequence[slice], holes: bool) -> tuple[Tensor, Tensor]:
        tops = log_p.new_full((3, len(log_p)), -math.inf)
        for some in columns:
            tops = torch.maximum(
                tops, torch.stack([logs.amax(-1) for logs in _products(log_p[:, some], log_q[:, some])])
            )
        tops = tops.masked_fill(torch.isneginf(tops), 0.0).unsqueeze(-1)
        sums = torch.zeros_like(tops).squeeze(-1)
        for some in columns:
            for total, logs, top in zip(sums, _products(log_p[:, some], log_q[:, some]), tops, strict=True):
                total += (logs - top).exp_().sum(-1)
        pp, qq, pq = sums.log() + tops.squeeze(-1)
        gap = torch.zeros_like(pp)
        for some in columns:
            p, q = _unit(log_p[:, some], pp.unsqueeze(-1)), _unit(log_q[:, some], qq.unsqueeze(-1))
            gap += (p - q).square_().sum(-1)
        return _from_angle(pp, qq, pq, gap), torch.stack([pp, pq], dim=-1)

    def slopes(self, cells: Cells, numbers: Tensor, holes: bool) -> Tensor:
        own, shared = numbers[:, :1], numbers[:, 1:]
        apart = torch.isneginf(shared)
        shared = shared.masked_fill(apart, 0.0)
        slopes = (2.0 * cells.log_p - own).exp_() - (cells.log_p + cells.log_q - shared).exp_()
        return slopes.mul_(2.0).masked_fill_(apart, 0.0)


class Gated(Distance):
    """γ·D_forward + (1 − γ)·D_reverse with γ ∈ [0, 1] per pair of distributions, read off both by a gate.

    Adaptive balance after BD-KD (arXiv:2212.12965) and entropy-gated distillation, over any two members. γ is a
    weight: no gradient flows through it. With `forward: jeffreys, reverse: reverse_kl` and the gate
    `teacher_entropy` it is reverse KL everywhere, and forward KL besides where the teacher is unsure.

    Args:
        forward: weighed γ. reverse: weighed 1 − γ. gate: gives γ.
    """

    name = "gated"

    def __init__(self, forward: Divergence | Distance, reverse: Divergence | Distance, gate: Gate) -> None:
        self.forward, self.reverse, self.gate = as_distance(forward), as_distance(reverse), gate
        self.parameters = MappingProxyType({"forward": self.forward, "reverse": self.reverse, "gate": gate})
        self.numbers = 1 + self.forward.numbers + self.reverse.numbers

    def normalized(self) -> Distance:
        return Gated(self.forward.normalized(), self.reverse.normalized(), self.gate)

    def exact(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_p, log_q = torch.broadcast_tensors(as_float(log_p, "log_p"), as_float(log_q, "log_q"))
        share = self._share(log_p, log_q)
        return _mix(share, self.forward.exact(log_p, log_q), self.reverse.exact(log_p, log_q))

    def rows(self, log_p: Tensor, log_q: Tensor, columns: Sequence[slice], holes: bool) -> tuple[Tensor, Tensor]:
        share = self._share(log_p, log_q)
        values, numbers = zip(
            *(part.rows(log_p, log_q, columns, holes) for part in (self.forward, self.reverse)), strict=True
        )
        return _mix(share, *values), torch.cat([share.unsqueeze(-1), *numbers], dim=-1)

    def slopes(self, cells: Cells, numbers: Tensor, holes: bool) -> Tensor:
        share, of_forward, of_reverse = numbers.split([1, self.forward.numbers, self.reverse.numbers], dim=-1)
        slopes = self.forward.slopes(cells, of_forward, holes).mul_(share)
        return slopes.add_(self.reverse.slopes(cells, of_reverse, holes).mul_(1.0 - share))

    def _share(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        with torch.no_grad():
            share = self.gate(log_p.detach(), log_q.detach())
        if share.shape != log_p.shape[:-1] or not bool(((share >= 0) & (share <= 1)).all()):
            raise ValueError(
                f"gate {self.gate.label} gave {tuple(share.shape)} of {share.min().item():.3g} to "
                f"{share.max().item():.3g}: a weight in [0, 1] for each of {tuple(log_p.shape[:-1])} rows is due"
            )
        return share.to(log_p.dtype)


class Combined(Distance):
    """∑ c_i·D_i of distances and f-divergences, c_i > 0: what `scaled` and + give."""

    def __init__(self, parts: Sequence[tuple[float, Distance]]) -> None:
        for factor, _ in parts:
            if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0.0 < factor < math.inf:
                raise ValueError(f"scaled: the factor must be a positive finite number, got {factor!r}")
        self.parts: tuple[tuple[float, Distance], ...] = tuple(
            (factor * inner, part)
            for factor, whole in parts
            for inner, part in (whole.parts if isinstance(whole, Combined) else ((1.0, whole),))
        )
        self.numbers = sum(part.numbers for _, part in self.parts)

    @property
    def label(self) -> str:
        return "+".join(part.label if factor == 1.0 else f"{factor:g}*{part.label}" for factor, part in self.parts)

    def _identity(self) -> tuple:
        return self.parts

    def exact(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return torch.stack([factor * part.exact(log_p, log_q) for factor, part in self.parts]).sum(0)

    def rows(self, log_p: Tensor, log_q: Tensor, columns: Sequence[slice], holes: bool) -> tuple[Tensor, Tensor]:
        found = [part.rows(log_p, log_q, columns, holes) for _, part in self.parts]
        value = torch.stack([factor * own for (factor, _), (own, _) in zip(self.parts, found, strict=True)]).sum(0)
        return value, torch.cat([numbers for _, numbers in found], dim=-1)

    def slopes(self, cells: Cells, numbers: Tensor, holes: bool) -> Tensor:
        own = numbers.split([part.numbers for _, part in self.parts], dim=-1)
        slopes = torch.zeros_like(cells.log_p)
        for (factor, part), columns in zip(self.parts, own, strict=True):
            slopes.add_(part.slopes(cells, columns, holes), alpha=factor)
        return slopes


def as_distance(member: Divergence | Distance) -> Distance:
    """A member of the registry as a `Distance`; an f-divergence wrapped, with the same values and gradients."""
    return OfF(member) if isinstance(member, Divergence) else member


def _products(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log P², log Q² and log PQ of every cell."""
    return 2.0 * log_p, 2.0 * log_q, log_p + log_q


def _unit(log_mass: Tensor, log_square: Tensor) -> Tensor:
    """The masses as a vector of length 1."""
    return (log_mass - 0.5 * log_square).exp()


def _from_angle(pp: Tensor, qq: Tensor, pq: Tensor, gap: Tensor) -> Tensor:
    """−2 log of the cosine, from the logs of ∑P², ∑Q², ∑PQ and the squared chord of the two unit vectors.

    The cosine is 1 − chord²/2: near 0 the logs would lose the digits of the difference, far away the chord does.
    """
    near = gap < 0.5
    close = -2.0 * torch.log1p(-0.5 * torch.where(near, gap, 0.0))
    return torch.where(near, close, pp + qq - 2.0 * pq)


def _mix(share: Tensor, forward: Tensor, reverse: Tensor) -> Tensor:
    """share·forward + (1 − share)·reverse, where an infinite value of weight 0 does not count."""
    return share * forward.masked_fill(share == 0, 0.0) + (1.0 - share) * reverse.masked_fill(share == 1, 0.0)
