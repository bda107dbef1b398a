"""Noise in the prompt: other casing, other spaces, misspelt words. People type so, and it changes the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fdiv.errors import DataError
from fdiv.eval.unlearning.attacks.attacked import Attacked, Row
from fdiv.eval.unlearning.attacks.rows import asked, prompt_rows, row_generator, with_asked

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["KINDS", "Noise"]


def _casing(text: str, rate: float, generator: np.random.Generator) -> str:
    """Each letter in the other case with probability `rate`."""
    flips = generator.random(len(text)) < rate
    return "".join(c.swapcase() if flip else c for c, flip in zip(text, flips, strict=True))


def _spacing(text: str, rate: float, generator: np.random.Generator) -> str:
    """Each space doubled or left out, and one put between two letters, with probability `rate` in all."""
    draws = generator.random(len(text))
    found = []
    for position, (character, draw) in enumerate(zip(text, draws, strict=True)):
        inside = character.isalnum() and text[position + 1 : position + 2].isalnum()
        if character == " " and draw < rate:
            found.append("  " if draw < rate / 2 else "")
        else:
            found.append(character + (" " if inside and draw < rate / 5 else ""))
    return "".join(found)


def _spelling(text: str, rate: float, generator: np.random.Generator) -> str:
    """Each letter left out, doubled, or exchanged with the letter after it, with probability `rate` in all; the first
    letter of a word stays."""
    draws, found, position = generator.random(len(text)), [], 0
    while position < len(text):
        here, after = text[position], text[position + 1 : position + 2]
        inside = position > 0 and here.isalpha() and text[position - 1].isalpha()
        kind = int(3 * draws[position] / rate) if inside and draws[position] < rate else 3
        if kind == 0 and after.isalpha():
            found += [after, here]
            position += 1
        elif kind == 1:
            found.append(here * 2)
        elif kind in (0, 3):
            found.append(here)
        position += 1
    return "".join(found)


KINDS: dict[str, Callable[[str, float, np.random.Generator], str]] = {
    "casing": _casing,
    "spacing": _spacing,
    "spelling": _spelling,
}
"""`kinds` of `Noise`."""


@dataclass(frozen=True)
class Noise:
    """Changes single characters of the questions.

    Args:
        kinds: of `KINDS`, one after the other.
        rate: probability with which a character is changed, of each kind.
    """

    kinds: Sequence[str] = tuple(KINDS)
    rate: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.kinds, str) or not self.kinds or not set(self.kinds) <= set(KINDS):
            raise DataError(f"kinds={self.kinds!r}: a list of {', '.join(KINDS)} is due")
        if isinstance(self.rate, bool) or not 0 < self.rate <= 1:
            raise DataError(f"rate={self.rate!r}: must lie in (0, 1]")

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, seed: int
    ) -> Attacked:
        """The model with the noisy rows."""
        found = []
        for index, row in enumerate(prompt_rows(rows)):
            text = asked(row)
            for name in self.kinds:
                text = KINDS[name](text, self.rate, row_generator(seed, index, name))
            found.append(with_asked(row, text))
        same = sum(asked(a) == asked(b) for a, b in zip(found, prompt_rows(rows), strict=True))
        return Attacked(model, found, notes=(f"{same} of {len(found)} questions came out unchanged",) if same else ())
