"""The divergences whose derivative is bounded on both sides: Le Cam's and total variation. Not valid in f-DPO."""

from __future__ import annotations

import torch
from torch import Tensor

from fdiv.divergences.base import Divergence
from fdiv.divergences.cells import Cells
from fdiv.divergences.saturation import half_sign, soft_cap


class LeCam(Divergence):
    """∑(P − Q)²/(P + Q), the triangular discrimination: f(t) = (t−1)²/(t+1), f' = (t−1)(t+3)/(t+1)². Bounded by 2.

    With q = 1/(1+t): f' = 1 − 4q², so f* = v(3−2q)/(1+2q) with q = √(1−v)/2.
    """

    name = "le_cam"
    aliases = ("triangular_discrimination",)
    at_zero, derivative_at_zero, slope_at_infinity = 1.0, -3.0, 1.0
    curvature = 1.0

    def _make_dual(self) -> Divergence:
        return self

    def _generator(self, log_t: Tensor) -> Tensor:
        x = soft_cap(log_t)
        return torch.expm1(x) * torch.tanh(0.5 * x)

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return torch.tanh(0.5 * log_t) * (1.0 + 2.0 * torch.sigmoid(-log_t))

    def _mass(self, cells: Cells) -> Tensor:
        return cells.gap * cells.over_total

    def _mass_derivative(self, cells: Cells) -> Tensor:
        return cells.p * cells.over_total * (2.0 - cells.over_total)

    def _conjugate(self, v: Tensor) -> Tensor:
        q = 0.5 * torch.sqrt(1.0 - v)
        return v * (3.0 - 2.0 * q) / (1.0 + 2.0 * q)

    def _inverse_derivative(self, v: Tensor) -> Tensor:
        q = 0.5 * torch.sqrt(1.0 - v)
        return torch.log((3.0 + v) / (4.0 * (1.0 + q))) - torch.log(q)  # 1 − q = (3+v)/(4(1+q)), exact near v = −3


class TotalVariation(Divergence):
    """½∑|P − Q|: f(t) = ½|t−1|, f' = ±½ (0 at t = 1), f* = v on [−½, ½]. No curvature and no inverse derivative."""

    name = "total_variation"
    aliases = ("tv",)
    at_zero, derivative_at_zero, slope_at_infinity = 0.5, -0.5, 0.5

    @property
    def curvature(self) -> float:
        raise ValueError(
            "total_variation has no curvature: f(t) = ½|t−1| has a kink at t = 1, so it cannot be normalized"
        )

    def _make_dual(self) -> Divergence:
        return self

    def _generator(self, log_t: Tensor) -> Tensor:
        return 0.5 * torch.expm1(soft_cap(log_t)).abs()

    def _score(self, log_t: Tensor, cap: float) -> Tensor:
        return half_sign(log_t)

    def _mass(self, cells: Cells) -> Tensor:
        return 0.5 * cells.gap.abs()

    def _mass_derivative(self, cells: Cells) -> Tensor:
        return cells.p * half_sign(cells.log_t)

    def _conjugate(self, v: Tensor) -> Tensor:
        return v

    def inverse_derivative(self, v: Tensor) -> Tensor:
        raise ValueError("total_variation has no inverse derivative: f' takes only the values −½, 0 and ½")

    def _activation(self, x: Tensor) -> Tensor:
        return (0.5 * torch.tanh(x)).clamp(min=-0.5 + 2.0**-25)
