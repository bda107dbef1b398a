"""Which rows meet in a step: a function of (seed, epoch, index) and of nothing else.

Every draw is a counter-based hash, so the run is the same on one process or eight, after a resume, and with data
loader workers; it does not depend on any generator's state, nor on the version of numpy (`SeedSequence` is stable by
contract).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch.utils.data import Dataset, Sampler

from fdiv.inference.encoding import Encoding
from fdiv.unlearning.data.encode import DEFAULT_ENCODING, EncodedAnswer, encode_answer
from fdiv.unlearning.data.rows import Answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EpochSampler", "ForgetDataset", "draw_index", "draw_prefix", "epoch_order"]

_STREAMS = {"order": 0, "retain": 1, "template": 2, "prefix": 3}


def draw_index(seed: int, epoch: int, index: int, stream: Literal["retain", "template"], count: int) -> int:
    """A number in 0 … count−1, uniform over (seed, epoch, index) and independent between streams.

    Args:
        seed: ≥ 0, the run's `data_seed` (or `seed`). epoch: 0, 1, …
        index: the forget row's position in its set.
        stream: what is sampled.
        count: how many there are to choose from.

    Raises:
        ValueError: nothing to draw from.
    """
    if count < 1:
        raise ValueError(f"cannot draw a {stream} row from an empty set")
    word = np.random.SeedSequence((seed, epoch, index, _STREAMS[stream])).generate_state(1, np.uint64)[0]
    return int(word) * count >> 64


def draw_prefix(seed: int, epoch: int, index: int, count: int, share: float) -> int:
    """The length of a prefix of an answer of `count` tokens: 0 with probability 1 − `share`, else k with a probability
    proportional to 1/k, k = 1 … count."""
    words = np.random.SeedSequence((seed, epoch, index, _STREAMS["prefix"])).generate_state(2, np.uint64)
    mixed, place = (int(word) / 2.0**64 for word in words)
    if mixed >= share or count < 1:
        return 0
    weights = np.cumsum(1.0 / np.arange(1, count + 1))
    return min(count, int(np.searchsorted(weights / weights[-1], place, side="right")) + 1)


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


@dataclass
class ForgetDataset(Dataset):
    """Forget rows with their partners, addressed by `epoch * len(self) + index` (see `EpochSampler`).

    A plain index is epoch 0, so evaluation always meets the same partners.

    Args:
        forget: encoded forget answers.
        retain: encoded retain answers to draw from; empty for none.
        templates: per forget row, what its template is sampled from (`templates[i]` is read for one choice only); None
            for methods without a template.
        answers: the rows before encoding, needed to put a template in the answer's place.
        tokenizer, max_length: for the templates.
        seed: of the draws.
        raw_text: the rows are chunks of raw text.
        encoding: of the templates.
        forget_numbers, retain_numbers: for each, the number of its row in the data; empty for the same.
    """

    forget: Sequence[EncodedAnswer]
    retain: Sequence[EncodedAnswer] = ()
    templates: Sequence[Sequence[str]] | None = None
    answers: Sequence[Answer] = ()
    tokenizer: PreTrainedTokenizerBase | None = None
    max_length: int | None = None
    seed: int = 0
    raw_text: bool = False
    encoding: Encoding = DEFAULT_ENCODING
    forget_numbers: Sequence[int] = ()
    retain_numbers: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, address: int) -> dict[str, Any]:
        """`index`, `epoch`, `forget` and, where there are any, `retain` and `template`, each an `EncodedAnswer`."""
        epoch, index = divmod(address, len(self.forget))
        item: dict[str, Any] = {"index": index, "epoch": epoch, "forget": self.forget[index]}
        if self.retain:
            item["retain"] = self.retain[self._partner(epoch, index)]
        if self.templates is not None:
            choices = self.templates[index]
            text = choices[draw_index(self.seed, epoch, index, "template", len(choices))]
            item["template"] = self._encode_template(index, text)
        return item

    def _partner(self, epoch: int, index: int) -> int:
        """Position of the retain row that forget row `index` meets."""
        return draw_index(self.seed, epoch, index, "retain", len(self.retain))

    def rows_at(self, address: int) -> list[tuple[str, int]]:
        """The rows at an address, as (`train` or `retain`, number in the data)."""
        epoch, index = divmod(address, len(self.forget))
        rows = [("train", self.forget_numbers[index] if self.forget_numbers else index)]
        if self.retain:
            partner = self._partner(epoch, index)
            rows.append(("retain", self.retain_numbers[partner] if self.retain_numbers else partner))
        return rows

    def _encode_template(self, index: int, text: str) -> EncodedAnswer:
        """`text` in place of row `index`'s answer; a chunk of raw text is continued by it."""
        answer = self.answers[index].with_completion(text)
        if not self.raw_text:
            return encode_answer(answer, self.tokenizer, self.max_length, encoding=self.encoding)
        # The chunk's own tokens are the prompt: decoding and tokenising them again need not give them back.
        prompt_ids = self.forget[index].prompt_ids
        ids = self.tokenizer(answer.completion, add_special_tokens=False)["input_ids"]
        ids = ids if self.tokenizer.eos_token_id is None else [*ids, self.tokenizer.eos_token_id]
        return EncodedAnswer(prompt_ids, ids[: self.max_length - len(prompt_ids)])
