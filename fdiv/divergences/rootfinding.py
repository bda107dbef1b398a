"""Inverse functions by iteration, differentiable twice, in both modes, through the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Widest log t searched, either side: the range on which the registry promises finite values.
SEARCH_RANGE = 1e4

#: A step between neighbouring numbers is a jump when it is more than this share of the value, and more than the
#: second number times the slope: rounding is less than one of the two.
_JUMP, _RISE = 1e-6, 1e-9


def invert_increasing(function: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    """x with function(x) = target for an increasing `function`, by bisection in float64 on [−1e4, 1e4].

    Element-wise; the first two derivatives are right where `function` is smooth. Where it jumps over the target or is
    flat, the derivative is 0. Targets beyond the range give the nearer end.
    """
    goal = target.detach().double()
    low, high = torch.full_like(goal, -SEARCH_RANGE), torch.full_like(goal, SEARCH_RANGE)
    with torch.no_grad():
        for _ in range(110):  # 2e4 / 2^110: every bit of a float64 near zero as well as far out
            middle = 0.5 * (low + high)
            left = function(middle) < goal
            low, high = torch.where(left, middle, low), torch.where(left, high, middle)
        root = 0.5 * (low + high)
        bottom, top = function(low), function(high)
        slope = torch.func.grad(lambda x: function(x).sum())(root)
        step = top - bottom
        jump = (step > _JUMP * (top.abs() + bottom.abs())) & (step > _RISE * slope)
        rate = torch.where(jump | (slope <= 0), 0.0, 1.0 / slope)
    # One step with the target attached carries the first derivative, a second one the second; neither moves the value.
    once = root + (target.double() - goal) * rate
    rest = (target.double() - function(once)) * rate
    return (once + (rest - rest.detach())).to(target.dtype)


def solve_x_plus_expm1(v: Tensor) -> Tensor:
    """y with y + e^y − 1 = v, i.e. y = 1 + v − ω(1 + v) with Wright's omega; by Newton, differentiable three times.

    y + e^y − 1 is convex and increasing, so Newton started right of the root converges monotonically; both starts
    below lie right of it, and 12 steps reach the last bit for any finite v.
    """
    goal = v.detach()
    root = torch.where(goal >= 0, torch.log1p(goal.clamp(min=0)), 0.5 * goal)
    for _ in range(12):
        root = root - (root + torch.expm1(root) - goal) / (1 + torch.exp(root))
    # Two steps with v attached: it does not move the value, and each step doubles the order of derivatives carried.
    for _ in range(2):
        root = root - (root + torch.expm1(root) - v) / (1 + torch.exp(root))
    return root
