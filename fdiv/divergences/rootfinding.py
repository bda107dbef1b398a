"""Inverse functions by iteration, differentiable through the implicit function theorem (first order)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Widest log t searched, either side: the range on which the registry promises finite values.
SEARCH_RANGE = 1e4


def invert_increasing(function: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    """x with function(x) = target for an increasing `function`, by bisection in float64 on [−1e4, 1e4].

    Element-wise; the gradient is d target / function'(x). Targets beyond the range give the nearer end.
    """
    goal = target.detach().double()
    low, high = torch.full_like(goal, -SEARCH_RANGE), torch.full_like(goal, SEARCH_RANGE)
    with torch.no_grad():
        for _ in range(110):  # 2e4 / 2^110: every bit of a float64 near zero as well as far out
            middle = 0.5 * (low + high)
            left = function(middle) < goal
            low, high = torch.where(left, middle, low), torch.where(left, high, middle)
        root = 0.5 * (low + high)
    if not target.requires_grad:
        return root.to(target.dtype)
    with torch.enable_grad():
        point = root.requires_grad_()
        (slope,) = torch.autograd.grad(function(point).sum(), point)
    root = root.detach()
    return (root + (target.double() - goal) / slope).to(target.dtype)


def solve_x_plus_expm1(v: Tensor) -> Tensor:
    """y with y + e^y − 1 = v, i.e. y = 1 + v − ω(1 + v) with Wright's omega; by Newton, differentiable.

    y + e^y − 1 is convex and increasing, so Newton started right of the root converges monotonically; both starts
    below lie right of it, and 12 steps reach the last bit for any finite v.
    """
    goal = v.detach()
    root = torch.where(goal >= 0, torch.log1p(goal.clamp(min=0)), 0.5 * goal)
    for _ in range(12):
        root = root - (root + torch.expm1(root) - goal) / (1 + torch.exp(root))
    # one step with v attached: the value does not move, and the gradient is 1 / (1 + e^y)
    return root - (root + torch.expm1(root) - v) / (1 + torch.exp(root))
