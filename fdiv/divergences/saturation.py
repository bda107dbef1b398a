"""Exponentials that saturate instead of overflowing, with one policy for the whole registry.

Below the cap every function here returns the plain exponential bit for bit. Above it the exponential is continued
logarithmically with matching value and slope (C¹), so that far out the gradient is small but neither 0, inf nor NaN.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: Exponent beyond which the registry saturates when no `max_exponent` is given: e^60 = 1.1e26 fits float32 with room
#: for the products built on it, and log t in [-30, 30] stays exact even where t² is taken.
DEFAULT_MAX_EXPONENT = 60.0

#: What training configs cap at unless they are told otherwise. The registry's own cap keeps numbers finite, not their
#: squares: the norm of a gradient overflows float32 from elements of e^44 on, and one pair near it owns the batch.
TRAINING_MAX_EXPONENT = 10.0

#: Largest `max_exponent` accepted: e^80 · (1 + log 1e4) / α still fits float32 (3.4e38) for α ≥ 0.01.
LARGEST_MAX_EXPONENT = 80.0


def as_float(values: Tensor | float, what: str) -> Tensor:
    """`values` as a float32 or float64 tensor: half precision is raised to float32, everything else is refused.

    Raises TypeError for integer, bool and complex tensors, naming `what`.
    """
    if not isinstance(values, Tensor):
        values = torch.as_tensor(values, dtype=torch.float64)
    if values.dtype in (torch.float32, torch.float64):
        return values
    if values.dtype in (torch.bfloat16, torch.float16):
        return values.float()
    raise TypeError(f"{what} must be a floating-point tensor, got {values.dtype}: convert it with .float()")


def check_max_exponent(max_exponent: float | None) -> float:
    """The cap to use; None means the registry's own. Raises ValueError outside (0, 80]."""
    if max_exponent is None:
        return DEFAULT_MAX_EXPONENT
    if not 0 < max_exponent <= LARGEST_MAX_EXPONENT:
        raise ValueError(
            f"max_exponent must lie in (0, {LARGEST_MAX_EXPONENT:g}], got {max_exponent!r}: above it float32 "
            f"overflows; leave it None for the registry's own cap of {DEFAULT_MAX_EXPONENT:g}"
        )
    return float(max_exponent)


def exact_expm1(exponent: Tensor) -> Tensor:
    """e^y − 1, whose gradient is e^y to full relative precision: autograd's own is 0 from y ≈ −17 in float32."""
    far = torch.exp(exponent.clamp(max=-1.0)) - 1.0
    return torch.where(exponent < -1.0, far, torch.expm1(exponent.clamp(min=-1.0)))


def capped_expm1(exponent: Tensor, cap: float) -> Tensor:
    """e^y − 1 for y ≤ cap; e^cap (1 + log(1 + y − cap)) − 1 above. Same shape and dtype; gradient as `exact_expm1`."""
    return exact_expm1(exponent.clamp(max=cap)) + math.exp(cap) * torch.log1p(F.relu(exponent - cap))


def saturating_expm1(exponent: Tensor) -> Tensor:
    """`capped_expm1` at the registry's own cap."""
    return capped_expm1(exponent, DEFAULT_MAX_EXPONENT)


def half_sign(x: Tensor) -> Tensor:
    """½ sign(x): −½, 0 or ½, NaN for NaN (torch.sign makes it 0). Same shape, same dtype; the gradient is 0."""
    return torch.where(torch.isnan(x), x, 0.5 * torch.sign(x))


def soft_cap(log_t: Tensor, rate: float = 1.0, cap: float = DEFAULT_MAX_EXPONENT) -> Tensor:
    """log t for rate·log t ≤ cap; above, the point whose e^(rate·log t) is the logarithmic continuation.

    Feeding a generator with the result keeps its sign, order and C¹ smoothness while every exponential in it, up to
    exponent `rate`·log t, stays finite.
    """
    limit = cap / rate
    excess = F.relu(log_t - limit)
    return log_t.clamp(max=limit) + torch.log1p(torch.log1p(rate * excess)) / rate
