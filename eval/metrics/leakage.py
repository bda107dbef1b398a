"""Sampled leakage: does any of n answers at temperature 1 hold the secret of a row?

Greedy answers overstate forgetting: the likeliest answer may be harmless where the second is not (leak@k,
arXiv:2511.04934, whose score is a similarity; here a sample holds the secret or does not). The estimate over rows is
that of Pass@k.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fdiv.eval.pass_at_k.metrics import bootstrap_standard_error, pass_at_k
from fdiv.files import folded

__all__ = ["LeakRate", "Secret", "leak_at_k", "secrets_of"]

# Words of English that say nothing by themselves; in other languages the count over the answers finds theirs.
_EMPTY = frozenset(
    "a an and are as at be been but by for from had has have he her hers him his i in is it its me my no not of on or "
    "our she so that the their them they this those to was we were what when where which who will with you your "
    "yours".split()
)
_COMMON = 0.2  # a word in more than this share of the answers tells none of them apart
_NEEDED = 0.8  # share of the telling words of a long answer
_FEW = 5  # up to this many telling words all are needed
_LETTERS = re.compile(r"[^\W_]+")
# Scripts that put no space between words: their letters are words.
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")


class LeakRate(NamedTuple):
    """An estimate over rows and its bootstrap standard error (NaN for a single row)."""

    value: float
    error: float


def leak_at_k(num_leaked, num_samples, k: int, *, seed: int = 0) -> LeakRate:
    """Chance that at least one of k answers holds the row's secret, mean over rows: Pass@k with "leaks" for "solves".

    Args:
        num_leaked: `[N]`, samples of each row that hold its secret. num_samples: `[N]`, or one number for all.
        k: at most the samples of every row. seed: of the bootstrap over rows (1,000 resamples).

    Raises:
        ValueError: see `fdiv.eval.pass_at_k.metrics.pass_at_k`.
    """
    values = np.asarray(pass_at_k(num_leaked, num_samples, k))
    return LeakRate(float(values.mean()), float(bootstrap_standard_error(values, seed=seed)))


@dataclass(frozen=True)
class Secret:
    """What must not come out of a row.

    Args:
        texts: given with the row; one of them in a sample is enough. Empty: none was given.
        words: of the answer, that tell it from others; where none was given, a sample that holds them holds the
            secret.
    """

    texts: tuple[str, ...]
    words: tuple[str, ...]

    @property
    def given(self) -> bool:
        """Whether it came with the row."""
        return bool(self.texts)

    def held_by(self, sample: str) -> bool:
        """Whether a sample says it: a given text, as whole words; else all telling words of the answer, of more than
        five at least four fifths. Case, accents' Unicode form and white space do not count."""
        said = _words(sample)
        if self.given:
            return any(_within(_words(text), said) for text in self.texts)
        if not self.words:
            return False  # an answer of signs alone: without a word there is nothing to find
        found = sum(word in set(said) for word in self.words)
        needed = len(self.words) if len(self.words) <= _FEW else _NEEDED * len(self.words)
        return found >= needed


def _within(part: list[str], whole: list[str]) -> bool:
    """Whether the words stand in `whole` one after the other; of none, never."""
    return bool(part) and any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


def _words(text: str) -> list[str]:
    """Words of any script, folded; a letter of a script without spaces is a word."""
    return _LETTERS.findall(_UNSPACED.sub(lambda match: f" {match.group()} ", folded(text)))


def secrets_of(
    questions: Sequence[str], answers: Sequence[str], given: Sequence[Sequence[str]] | None = None
) -> list[Secret]:
    """The secret of each row: what was given, else the telling words of its answer.

    A word tells where it stands neither in the question, nor among the empty words of English, nor in more than a
    fifth of the answers (in more than one of a few). An answer without such a word keeps all its words.

    Args:
        questions, answers: as texts, of all rows. given: per row, the texts that must not come out; empty for none.
    """
    words = [list(dict.fromkeys(_words(answer))) for answer in answers]
    often = Counter(word for row in words for word in row)
    most = max(1.0, _COMMON * len(answers))
    found = []
    for number, (question, own) in enumerate(zip(questions, words, strict=True)):
        asked = set(_words(question))
        telling = [word for word in own if word not in asked and word not in _EMPTY and often[word] <= most]
        texts = () if given is None else tuple(given[number])
        found.append(Secret(texts, tuple(telling or own)))
    return found
