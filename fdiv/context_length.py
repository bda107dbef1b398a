"""Texts longer than a model's context end a run with a clear error, not an index error or a silently bad score."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fdiv.errors import DataError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["check_fits", "context_length"]


def context_length(model: nn.Module) -> int | None:
    """The most tokens `model` (plain or wrapped) was built for; None where its configuration does not say."""
    while not hasattr(model, "config") and hasattr(model, "module"):  # DDP, DeepSpeed
        model = model.module
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


def check_fits(tokens: int, model: nn.Module, what: str, remedy: str) -> None:
    """Refuse a text of `tokens` tokens, called `what` in the message, that the model's context does not hold.

    Raises:
        DataError: (a ValueError) it is longer.
    """
    limit = context_length(model)
    if limit is not None and tokens > limit:
        raise DataError(f"{what} has {tokens} tokens, more than the model's context of {limit}: {remedy}")
