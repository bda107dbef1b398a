"""Places of a training: which rows each micro-batch holds, and rows that are left out while their places stay empty.

A place is one position of one batch. With rows removed, order, schedule and partners of the others stay: the sampler
yields the same numbers, and the places of removed rows are emptied before the batch is put together. Nothing of them
(neither content nor length) is seen. What an empty place means for the loss:

* A loss that is a mean over rows keeps its denominator: an empty place counts as a row whose loss is 0, so each other
  row has the weight it would have had.
* A loss that is a mean over tokens is the mean over the tokens that are there.
* A micro-batch of empty places is not run. An optimizer step of such micro-batches changes no weight and no moment of
  the optimizer; the learning rate schedule and the count of steps go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["DATA_ENTRIES", "EMPTY", "Places", "PlacesMixin", "RowNumbers", "held_rows", "with_empty_places"]

_PLACE, EMPTY = "fdiv_place", "fdiv_empty"

DATA_ENTRIES = ("train dataset", "retain dataset", "template answers")
"""Entries of a run's identity that are fingerprints of rows."""

RowsAt = Callable[[int], Sequence[tuple[str, int]]]
"""The number that a sampler yields → (data set, row number) of every row in that place."""


@dataclass(frozen=True)
class RowNumbers:
    """`RowsAt` of a data set whose places hold one row each.

    Args:
        numbers: position in the training set → row number in the data; None: the same.
    """

    numbers: Sequence[int] | None = None

    def __call__(self, place: int) -> tuple[tuple[str, int], ...]:
        return (("train", place if self.numbers is None else self.numbers[place]),)


@dataclass
class Places:
    """What a trainer knows of its rows beyond their content.

    Args:
        rows_at: which rows a place holds.
        removed: by data set, the numbers of the rows that are left out.
        digests: by data set, a digest of each row, for the log.
        identity: what stands in checkpoints for the fingerprints of data from which rows are left out.
    """

    rows_at: RowsAt
    removed: Mapping[str, frozenset[int]] = field(default_factory=dict)
    digests: Mapping[str, Sequence[str]] = field(default_factory=dict)
    identity: str = ""
    seen: list[list[str | None]] = field(default_factory=list)

    @property
    def removes(self) -> bool:
        """Whether any row is left out."""
        return any(self.removed.values())

    def is_empty(self, place: int) -> bool:
        """Whether a row in this place was removed; its partners then stay out too."""
        return any(number in self.removed.get(name, ()) for name, number in self.rows_at(place))

    def note(self, places: Sequence[int]) -> None:
        """Keep the digests of a micro-batch's rows, and None for each empty place."""
        rows: list[str | None] = []
        for place in places:
            rows += [None] if self.is_empty(place) else [self.digests[name][row] for name, row in self.rows_at(place)]
        self.seen.append(rows)

    def taken(self) -> list[list[str | None]]:
        """The micro-batches noted since the last call."""
        seen, self.seen = self.seen, []
        return seen


class _Place(NamedTuple):
    number: int
    item: Any


class _Numbered(Dataset):
    """A data set whose items know their number."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> _Place:
        return _Place(int(number), self.rows[number])

    def __getitems__(self, numbers: list[int]) -> list[_Place]:
        many = getattr(self.rows, "__getitems__", None)
        items = [self.rows[number] for number in numbers] if many is None else many(numbers)
        return [_Place(int(number), item) for number, item in zip(numbers, items, strict=True)]


@dataclass(frozen=True)
class _Collate:
    """The trainer's collator on the places that are not empty; the batch also says which places it had."""

    collate: Callable[[list[Any]], Any]
    is_empty: Callable[[int], bool]

    def __call__(self, places: list[_Place]) -> Any:
        empty = [self.is_empty(place.number) for place in places]
        items = [place.item for place, gone in zip(places, empty, strict=True) if not gone]
        batch = self.collate(items) if items else []
        if isinstance(batch, Mapping):
            numbers = torch.tensor([place.number for place in places])
            return {**batch, _PLACE: numbers, EMPTY: torch.tensor(empty)}
        rows = iter(batch)  # a trainer that samples gets its rows as a list
        return [
            {_PLACE: place.number, EMPTY: True} if gone else {**next(rows), _PLACE: place.number}
            for place, gone in zip(places, empty, strict=True)
        ]


def held_rows(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Those of a list of rows whose places are not empty."""
    return [row for row in rows if not row.get(EMPTY)]


def with_empty_places(batch: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Any]:
    """A batch of completions of the rows that are there, with a blank row in each empty place.

    Args:
        batch: tensors with one row for each of `held_rows(rows)`, and scalars.
        rows: all places. pad: the pad token.

    Returns:
        The same with one row for each place. A blank row has the prompt `pad`, no completion token that counts, and 0
        elsewhere. `EMPTY` `[N]` says which they are, where there are any.
    """
    empty = torch.tensor([bool(row.get(EMPTY)) for row in rows])
    if not empty.any():
        return dict(batch)
    count, there = int((~empty).sum()), (~empty).nonzero().flatten()
    filled: dict[str, Any] = {}
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != count:
            filled[name] = value
            continue
        filled[name] = value.new_full((len(rows), *value.shape[1:]), pad if name.endswith("_ids") else 0)
        filled[name][there.to(value.device)] = value
    blank = empty.to(filled["prompt_mask"].device)
    for name in filled:
        if name.endswith("prompt_mask"):  # also of a prompt that a teacher reads
            filled[name][blank, -1] = 1  # attention needs a token
    return filled | {EMPTY: blank}


class PlacesMixin:
    """Put it before a `transformers.Trainer` in the bases; `places` turns it on.

    Attributes:
        leaves_places_empty: whether the trainer's loss means what the module says when rows are removed.
        why_no_empty_places: the reason where it does not.
        row_numbers: position in the training set → row number in the data as it was given; None: the same.
    """

    leaves_places_empty: ClassVar[bool] = False
    why_no_empty_places: ClassVar[str] = "its loss does not say what one counts as (`leaves_places_empty`)"
    places: Places | None = None
    row_numbers: Sequence[int] | None = None

    @classmethod
    def why_not_exact(cls, args: Any) -> str | None:
        """Why a run under these options does not follow from the rows it keeps, where some are removed; or None."""
        if cls.leaves_places_empty:
            return None
        return f"{cls.__name__} cannot leave the place of a row empty: {cls.why_no_empty_places}"

    @classmethod
    def why_not_resumed(cls, args: Any, rows: Any) -> str | None:
        """Why steps that were made before any removed row came follow from such rows all the same; or None.

        Args:
            args: of the training. rows: the training rows as read.
        """
        return None

    @classmethod
    def further_rows(cls, args: Any) -> dict[str, Any]:
        """By name, the rows that batches hold beside the training rows, as read."""
        return {}

    def rows_at(self) -> RowsAt:
        """Which rows a place holds."""
        return RowNumbers(self.row_numbers)

    def json_identity(self) -> dict[str, Any]:
        """As of the whole run; data that rows were removed from counts by the rows that are left."""
        identity = super().json_identity()
        if self.places is None or not self.places.removes:
            return identity
        return identity | {name: self.places.identity for name in DATA_ENTRIES if name in identity}

    def _get_dataloader(self, dataset, description, batch_size, sampler_fn=None, is_training=False, *args, **kwargs):
        """As in Trainer; the batches of a training say which places they had."""
        load = super()._get_dataloader
        if not is_training or self.places is None:
            return load(dataset, description, batch_size, sampler_fn, is_training, *args, **kwargs)
        if hasattr(dataset, "column_names"):
            dataset = self._remove_unused_columns(dataset, description=description)
        collator = self.data_collator
        self.data_collator = _Collate(collator, self.places.is_empty)
        try:
            sampler = None if sampler_fn is None else lambda _: sampler_fn(dataset)
            return load(_Numbered(dataset), description, batch_size, sampler, is_training, *args, **kwargs)
        finally:
            self.data_collator = collator

    def training_step(self, model, inputs, *args, **kwargs):
        """As in Trainer; see the module for what becomes of empty places."""
        if self.places is None:
            return super().training_step(model, inputs, *args, **kwargs)
        inputs, numbers, empty = _apart(inputs)
        self._note(numbers)
        if all(empty):
            return self._empty_step(model)
        share = 1 - sum(empty) / len(empty)
        with self._keeping_weights(share):
            return super().training_step(model, inputs, *args, **kwargs)

    def _note(self, numbers: list[int]) -> None:
        """Keep the places of a micro-batch, of all processes."""
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            numbers = gather_object(numbers)
        self.places.note(numbers)

    def _empty_step(self, model: Any) -> Tensor:
        """A micro-batch without rows: nothing is computed."""
        model.train()
        if hasattr(self, "_step"):  # trainers that sample count their micro-batches
            self._step += 1
        return torch.zeros((), device=self.args.device)

    @contextmanager
    def _keeping_weights(self, share: float) -> Iterator[None]:
        """The mean over the rows that are there, times `share`: an empty place has a loss of 0."""
        if share == 1 or self.loss_is_scaled_for_ga is not False:
            yield
            return
        steps = self.current_gradient_accumulation_steps
        self.current_gradient_accumulation_steps = steps / share  # what Trainer divides the mean by
        try:
            yield
        finally:
            self.current_gradient_accumulation_steps = steps


def _apart(inputs: Any) -> tuple[Any, list[int], list[bool]]:
    """A batch of `_Collate` without what it says of its places, their numbers, and which are empty."""
    if isinstance(inputs, Mapping):
        rest = {name: value for name, value in inputs.items() if name not in (_PLACE, EMPTY)}
        return rest, inputs[_PLACE].tolist(), inputs[EMPTY].tolist()
    numbers, empty = [row[_PLACE] for row in inputs], [bool(row.get(EMPTY)) for row in inputs]
    return [{name: value for name, value in row.items() if name != _PLACE} for row in inputs], numbers, empty
