"""Which rows meet in a step: a function of (seed, epoch, index) and of nothing else.

Every draw is a counter-based hash, so the run is the same on one process or eight, after a resume, and with data
loader workers; it does not depend on any generator's state, nor on the version of numpy (`SeedSequence` is stable by
contract).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from torch.utils.data import Sampler

__all__ = ["EpochSampler", "draw_index", "epoch_order"]

_STREAMS = {"order": 0, "retain": 1, "template": 2}


def draw_index(seed: int, epoch: int, index: int, stream: Literal["retain", "template"], count: int) -> int:
    """A number in 0 … count−1, uniform over (seed, epoch, index) and independent between streams.

    Args:
        seed: ≥ 0, the run's `data_seed` (or `seed`). epoch: 0, 1, …
        index: the forget row's position in its set.
        stream: what is drawn.
        count: how many there are to choose from.

    Raises:
        ValueError: nothing to draw from.
    """
    if count < 1:
        raise ValueError(f"cannot draw a {stream} row from an empty set")
    word = np.random.SeedSequence((seed, epoch, index, _STREAMS[stream])).generate_state(1, np.uint64)[0]
    return int(word) * count >> 64


def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    """The order in which `count` forget rows are visited in one epoch: a permutation of 0 … count−1."""
    words = np.random.SeedSequence((seed, epoch, _STREAMS["order"])).generate_state(count, np.uint64)
    return np.argsort(words, kind="stable").tolist()


class EpochSampler(Sampler[int]):
    """Yields `epoch * count + index`, the address under which a `ForgetDataset` looks up a row and its partners.

    An epoch is completed to whole global batches with its own first rows, so that every step has the same size
    however the batch is split over processes and accumulation steps.

    Args:
        count: number of forget rows.
        seed: of order and draws, ≥ 0.
        global_batch_size: per-device batch × processes × accumulation steps.
        shuffle: False visits the rows in order.
    """

    def __init__(self, count: int, *, seed: int, global_batch_size: int, shuffle: bool = True) -> None:
        self.count, self.seed, self.shuffle, self.epoch = count, seed, shuffle, 0
        self.length = -(-count // global_batch_size) * global_batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(self.seed, self.epoch, self.count) if self.shuffle else range(self.count)
        for position in range(self.length):
            yield self.epoch * self.count + order[position % self.count]
