"""What to compare of two runs that should be one and the same, so that it holds on every processor.

Processors sum in different orders, so two ways of computing one number differ by rounding. Plain SGD carries that rounding
on unchanged. Adam divides each gradient by the root of its second moment: where a gradient is rounding and nothing else, it
makes a whole step of it. So two runs are compared after SGD; only a run and its repetition on one machine, which compute
the same numbers in the same order, agree bit for bit under every optimizer.
"""

from __future__ import annotations

from typing import Any

import torch

PLAIN_STEPS = {"optim": "sgd", "lr_scheduler_type": "constant"}
"""Options of a trainer under which it can be compared with another; the learning rate is the test's."""


def weights(trainer: Any) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([parameter.detach().flatten().clone() for parameter in trainer.model.parameters()])


def assert_same_weights(one: Any, other: Any, atol: float) -> None:
    """Two trainers end with the same weights, `atol` apart at most. Fails for an adaptive optimizer, whatever the weights."""
    for trainer in (one, other):
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        assert type(optimizer) is torch.optim.SGD, f"{type(optimizer).__name__} enlarges rounding: compare under SGD"
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=atol)
