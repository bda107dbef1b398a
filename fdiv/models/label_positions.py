"""TRL's fused LM head at the label positions only, on a CPU too.

On a GPU the fused head multiplies the hidden states of the positions that have a label. Elsewhere it multiplies those
of every position, prompts and padding included, in tiles of 32,768 tokens of the vocabulary. `score_labels_only` puts
the label positions of a batch into one row before the head, and the values back into place after it: the head sees
labels alone, passed as `shift_labels`, and tiles that stay in the cache.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

__all__ = ["score_labels_only"]

_TILE = 4096  # tokens of the vocabulary at once: 8 MiB of float32 logits for 512 labels


def score_labels_only(base: nn.Module, outputs: Sequence[str]) -> Callable[[], None]:
    """Patch the fused forward of `base` in place, so that on a CPU its head sees label positions only.

    Values and gradients are the same up to rounding. On other devices, and in a batch without labels, the fused
    forward runs unchanged.

    Args:
        base: a causal language model patched by TRL's `add_fused_lm_head`.
        outputs: the per-token values which that head computes.

    Returns:
        A function that takes the patch off again; it does nothing where the patch was on already, or could not be put
        on (a forward that is no method any more).
    """
    fused = base.forward
    if _patched(fused) is not None or not hasattr(fused, "__func__"):
        return lambda: None
    # The function, not the method: a deep copy of the model calls it on itself.
    function = fused.__func__
    backbone_name = inspect.getclosurevars(function).nonlocals.get("backbone_attr", "base_model")

    # `wraps` keeps TRL's function in sight: `fused_head` finds it, and `generate` sees the signature.
    @functools.wraps(function)
    def _labels_only_forward(
        self: nn.Module,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        given = {"labels": labels, "shift_labels": shift_labels}
        given = {name: value for name, value in given.items() if value is not None}
        if not fused_lm_head:
            return function(self, *args, **kwargs, **given)
        targets = labels[:, 1:] if shift_labels is None else shift_labels
        mask = targets != -100
        rows, columns = mask.nonzero(as_tuple=True)
        if targets.device.type != "cpu" or len(rows) == 0:
            return function(self, *args, fused_lm_head=True, **kwargs, **given)
        with _kept_positions(getattr(self, backbone_name), rows, columns), _small_tiles():
            result = function(self, *args, fused_lm_head=True, shift_labels=targets[mask][None], **kwargs)
        for name in outputs:
            values = getattr(result, name)
            setattr(result, name, values.new_zeros(mask.shape).masked_scatter(mask, values[0]))
        result.label_mask = mask
        return result

    base.forward = types.MethodType(_labels_only_forward, base)

    def undo() -> None:
        base.forward = fused

    return undo


def _patched(forward: Any) -> Any:
    """The function that `score_labels_only` put on, below what was put over it; None without one."""
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        if getattr(getattr(function, "__code__", None), "co_name", "") == "_labels_only_forward":
            return function
        forward = getattr(forward, "__wrapped__", None)  # accelerate wraps forward again
    return None


@contextmanager
def _kept_positions(backbone: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Inside, `backbone` returns the hidden states of these positions as one row: [1, N, D]."""

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        flat = hidden.flatten(0, 1)  # one index, whose gradient is a plain sum
        output.last_hidden_state = flat.index_select(0, rows * hidden.size(1) + columns)[None]
        return output

    handle = backbone.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _small_tiles() -> Iterator[None]:
    """Inside, TRL's head takes `_TILE` tokens of the vocabulary at once."""
    import trl.trainer.utils as trl_utils

    usual = trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(usual, _TILE)
    try:
        yield
    finally:
        trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = usual
