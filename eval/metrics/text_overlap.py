"""ROUGE overlap with the true answer and n-gram entropy of what a model writes."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""First words of the Unicode names of letters of scripts that put no space between words."""


class _UnicodeWords:
    """Words of any script, as a tokenizer of rouge-score: letters, digits and their marks after NFKC and case folding.

    A letter of a script without spaces between words is a word; words of a-z and 0-9 are stemmed like all others.
    """

    def __init__(self, use_stemmer: bool):
        from rouge_score.tokenizers import DefaultTokenizer

        self._ascii = DefaultTokenizer(use_stemmer)

    def tokenize(self, text: str) -> list[str]:
        """The words of `text` in order."""
        spaced = []
        for character in unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()):
            kind = unicodedata.category(character)[0]
            if kind not in "LMN":
                spaced.append(" ")
            elif kind == "L" and unicodedata.name(character, "").split(" ")[0] in _UNSPACED:
                spaced.append(f" {character}")  # its marks follow it
            else:
                spaced.append(character)
        return [word for part in "".join(spaced).split() for word in self._words(part)]

    def _words(self, part: str) -> list[str]:
        return self._ascii.tokenize(part) if part.isascii() else [part]


@lru_cache(maxsize=4)
def _scorer(use_stemmer: bool, unicode_words: bool):
    from rouge_score import rouge_scorer

    words = _UnicodeWords(use_stemmer) if unicode_words else None
    return rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=use_stemmer, tokenizer=words)


def needs_unicode_words(truth: str) -> bool:
    """Whether rouge-score's own words, runs of a-z and 0-9, miss the true answer: it has none of them, or a letter
    outside the Latin script."""
    if truth.isascii():
        return False
    beyond = [c for c in truth if c.isalnum() and not c.isascii()]
    other_script = any(c.isalpha() and not _is_latin(c) for c in beyond)
    return other_script or (bool(beyond) and not re.search("[a-z0-9]", truth.lower()))


def _is_latin(letter: str) -> bool:
    return "LATIN" in unicodedata.name(letter, "") or letter in "ªº"


def rouge_scores(truth: str, generation: str, *, use_stemmer: bool = True) -> dict[str, float | None]:
    """ROUGE of one generation: `rouge1_recall`, `rougeL_f1`, `rougeL_recall`, each in [0, 1].

    Uses Google's rouge-score. TOFU and open-unlearning stem words (`use_stemmer`), MUSE's own code does not. Where
    `needs_unicode_words(truth)`, words are those of Unicode, of both texts; elsewhere the numbers are rouge-score's
    own. None for a truth without a word (empty, punctuation alone): no share of its words is defined.
    """
    scorer = _scorer(use_stemmer, needs_unicode_words(truth))
    if not scorer._tokenizer.tokenize(truth):
        return dict.fromkeys(("rouge1_recall", "rougeL_f1", "rougeL_recall"))
    scores = scorer.score(truth, generation)
    return {
        "rouge1_recall": scores["rouge1"].recall,
        "rougeL_f1": scores["rougeL"].fmeasure,
        "rougeL_recall": scores["rougeL"].recall,
    }


def cut_at(text: str, stop_words: Sequence[str]) -> str:
    """The part of `text` before the first of the stop words that occurs in it, stripped of surrounding white space."""
    for word in stop_words:
        text = text.split(word)[0]
    return text.strip()


def ngram_entropy(
    text: str, orders: Sequence[int] = (2, 3), weights: Sequence[float] = (2 / 3, 4 / 3)
) -> float | None:
    """Weighted n-gram entropy in bits: mean over n of w_n * H(n-grams), higher is more varied, 0 is one phrase
    repeated.

    The fluency measure of ROME (Meng et al. 2022, arXiv:2202.05262) and RWKU, with words and punctuation marks found
    by a regular expression where they use NLTK's tokenizer, which needs a download. None for a text shorter than the
    largest n.

    Args:
        text: any. orders: the n of the n-grams. weights: w_n, one for each.
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    if len(words) < max(orders):
        return None
    entropies = []
    for n in orders:
        counts = np.array(list(Counter(zip(*(words[i:] for i in range(n)), strict=False)).values()), dtype=np.float64)
        share = counts / counts.sum()
        entropies.append(abs(float((share * np.log2(share)).sum())))
    return float(np.mean(np.array(entropies) * np.array(weights)))
