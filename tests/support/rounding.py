"""Another processor, imitated: every run rounds differently.

Processors and their libraries sum in different orders, so results differ in the last digit, on some machines and not on
others. `imitate()` multiplies each number that a linear layer gives or hands back by 1 + 1e-7 · noise, and adds as much
to the gradients before an optimizer step: about one rounding of float32, other noise in every call. A test that compares
two ways of computing one number has to pass under it (`make test-processor`); two runs that are equal bit for bit on one
machine are not equal under it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

SCALE = 1e-7


@contextmanager
def imitate(seed: int = 0) -> Iterator[None]:
    """Round differently in every call while the block runs. The global random state is left alone."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.nn.functional.linear

    def noise(like: torch.Tensor) -> torch.Tensor:
        return SCALE * torch.randn(like.shape, generator=generator)

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(_context: Any, value: torch.Tensor) -> torch.Tensor:
            return value * (1 + noise(value))

        @staticmethod
        def backward(_context: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * (1 + noise(gradient))

    def linear(*arguments: Any, **options: Any) -> torch.Tensor:
        output = exact(*arguments, **options)
        return Rounded.apply(output) if output.dtype == torch.float32 and output.device.type == "cpu" else output

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is not None and gradient.dtype == torch.float32:
                    # A gradient is a sum whose terms are about as large as its largest entries; an exact 0 stays 0.
                    size = gradient.square().mean().sqrt()
                    parameter.grad = gradient + size * noise(gradient) * (gradient != 0)

    handle = register_optimizer_step_pre_hook(before_step)
    with mock.patch.object(torch.nn.functional, "linear", linear):
        try:
            yield
        finally:
            handle.remove()
