"""How much memory generating takes on one device, before anything is loaded: weights, keys, values and scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fdiv.memory.count import cache_bytes

__all__ = ["GenerationMemory", "generation_memory", "memory_there"]

_SCORE_COPIES = 4  # float64 copies of a step's scores while a token is picked: probabilities, order, sums, the pick
_DOUBLE = 8


@dataclass(frozen=True)
class GenerationMemory:
    """Bytes on one device.

    Args:
        weights: of the model. row: of one more completion of a batch, at its full length. rows: of a batch.
    """

    weights: int
    row: int
    rows: int

    @property
    def total(self) -> int:
        """Bytes of all."""
        return self.weights + self.rows * self.row

    def most_rows(self, there: int) -> int:
        """The most rows of a batch that fit into `there` bytes beside the weights; 0: the weights alone do not."""
        return max(0, (there - self.weights) // self.row)


def generation_memory(config: Any, dtype: torch.dtype, rows: int, tokens: int) -> GenerationMemory:
    """Count the model that `config` describes, in `dtype`, with a batch of `rows` rows of `tokens` tokens each.

    Keys and values of every layer are counted at the full length, as transformers keeps them; activations of the
    prompt's pass, which are let go of layer by layer, are not. An adapter is not counted.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = sum(tensor.nbytes for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    scores = config.get_text_config().vocab_size * (dtype.itemsize + _SCORE_COPIES * _DOUBLE)
    return GenerationMemory(weights, cache_bytes(config, 1, tokens, dtype.itemsize) + scores, rows)


def memory_there() -> tuple[str, int]:
    """What a process of this machine can have: `GPU` or `this machine`, and its free bytes."""
    if torch.cuda.is_available():
        return "the GPU", int(torch.cuda.mem_get_info()[0])
    import psutil

    return "this machine", int(psutil.virtual_memory().available)
