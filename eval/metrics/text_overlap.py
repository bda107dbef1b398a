"""ROUGE overlap with the true answer and n-gram entropy of what a model writes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)
def _scorer(use_stemmer: bool):
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=use_stemmer)


def rouge_scores(truth: str, generation: str, *, use_stemmer: bool = True) -> dict[str, float]:
    """ROUGE of one generation: `rouge1_recall`, `rougeL_f1`, `rougeL_recall`, each in [0, 1].

    Uses Google's rouge-score. TOFU and open-unlearning stem words, MUSE's own code does not.
    """
    scores = _scorer(use_stemmer).score(truth, generation)
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
