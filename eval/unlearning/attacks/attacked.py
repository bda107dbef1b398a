"""What an attack is, and what it leaves: a model and rows to measure again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fdiv.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Attack", "Attacked", "NotApplicable", "Row", "Sampling"]

Row = Mapping[str, Any]


class NotApplicable(DataError):
    """The attack cannot be made on this model or these rows: an adapter to take off where there is none, bitsandbytes
    not installed. A suite goes on without it and says why."""


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled: `samples` of each at `temperature`, cut to the `top_p` nucleus; 1: everything."""

    samples: int = 8
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.samples < 1 or not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise DataError(f"{self}: needs samples ≥ 1, temperature > 0 and 0 < top_p ≤ 1")


@dataclass(frozen=True)
class Attacked:
    """What is measured after an attack.

    Args:
        model: the attacked model: the very object that was passed where the attack leaves the weights alone, else
            another one. What it does not change of the weights it may share with the original: do not train it.
        rows: as many rows as were passed, in their order; prompts may differ. Two columns may be new (see
            `rows.encode`): `examples`, (question, answer) pairs asked before, and `given`, the beginning of the answer
            as a part of the prompt.
        sampling: sample answers so instead of greedily; None: greedily.
        trained_on: numbers of the rows that the attacker trained on; what is measured on the others is what came back.
        notes: what a reader of the numbers has to know.
    """

    model: PreTrainedModel
    rows: Sequence[Row]
    sampling: Sampling | None = None
    trained_on: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def measured(self) -> list[int]:
        """Numbers of the rows that count: those not trained on; all of them where none would be left."""
        left = [index for index in range(len(self.rows)) if index not in set(self.trained_on)]
        return left or list(range(len(self.rows)))


class Attack(Protocol):
    """One function of a model and rows. One with an attribute `stages`, of the same signature, gives several
    `(label, Attacked)`, one after the other."""

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, seed: int
    ) -> Attacked: ...
