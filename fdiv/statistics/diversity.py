"""Diversity of a set of texts: distinct-n, self-BLEU, and the share of distinct texts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

__all__ = ["distinct_n", "diversity", "self_bleu", "words_of"]


def words_of(text: str) -> list[str]:
    """The whitespace-separated words of a text: what the measures here count."""
    return text.split()


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def distinct_n(texts: Sequence[Sequence[str]], n: int) -> float:
    """Mean over texts of (different n-grams)/(words), as in GDC (arXiv:2012.11635); nan if no text has a word.

    Args:
        texts: texts as lists of words; those without a word are left out.
        n: length of the n-grams.
    """
    shares = [len(set(_grams(words, n))) / len(words) for words in texts if words]
    return sum(shares) / len(shares) if shares else math.nan


def self_bleu(texts: Sequence[Sequence[str]], max_order: int = 5) -> float:
    """Mean BLEU of each text against all the others (Texygen, arXiv:1802.01886): 1 is no diversity; nan below 2 texts.

    Uniform weights over orders 1 … `max_order`, brevity penalty against the closest reference length, and nltk's
    `SmoothingFunction().method1` (a precision with no match is 0.1 over the number of n-grams). Equal to nltk's
    `sentence_bleu` on every text, but linear in the number of texts: clipping against "the most any other text has"
    needs the two largest counts of an n-gram only.

    Args:
        texts: texts as lists of words; those without a word are left out.
        max_order: longest n-gram.
    """
    texts = [list(words) for words in texts if len(words)]
    if len(texts) < 2:
        return math.nan
    log_precisions = [0.0] * len(texts)
    for order in range(1, max_order + 1):
        counts = [Counter(_grams(words, order)) for words in texts]
        largest, second = _two_largest(counts)
        for number, count in enumerate(counts):
            matched = sum(
                min(times, second.get(gram, 0) if largest[gram] == (times, number) else largest[gram][0])
                for gram, times in count.items()
            )
            total = max(1, sum(count.values()))
            if order == 1 and not matched:
                log_precisions[number] = -math.inf  # no word in common: 0 whatever the smoothing
            log_precisions[number] += math.log(matched or 0.1) - math.log(total)
    lengths = Counter(len(words) for words in texts)
    scores = [
        math.exp(log_sum / max_order) * _brevity_penalty(len(words), lengths)
        for log_sum, words in zip(log_precisions, texts, strict=True)
    ]
    return sum(scores) / len(scores)


def _two_largest(counts: Sequence[Counter]) -> tuple[dict, dict]:
    """Per n-gram: (largest count, which text has it) and the second largest count among the other texts."""
    largest: dict = {}
    second: dict = {}
    for number, count in enumerate(counts):
        for gram, times in count.items():
            if gram not in largest:
                largest[gram] = (times, number)
            elif times > largest[gram][0]:
                second[gram] = largest[gram][0]
                largest[gram] = (times, number)
            else:
                second[gram] = max(second.get(gram, 0), times)
    return largest, second


def _brevity_penalty(length: int, lengths: Counter) -> float:
    """1 unless the closest length among the other texts (the shorter one of two equally close) is larger."""
    others = [other for other, times in lengths.items() if times > (other == length)]
    closest = min(others, key=lambda other: (abs(other - length), other))
    return 1.0 if length > closest else math.exp(1.0 - closest / length)


def diversity(texts: Sequence[str], *, max_texts: int | None = None) -> dict[str, float]:
    """`distinct_1` … `distinct_3`, `self_bleu_3` … `self_bleu_5` and `distinct_texts` of texts.

    Args:
        texts: the texts.
        max_texts: self-BLEU grows with the number of texts it sees, so fix it when numbers are compared: only the
            first N texts enter (GDC: 500). None: all.
    """
    kept = list(texts)[:max_texts]
    words = [words_of(text) for text in kept]
    return {
        **{f"distinct_{n}": distinct_n(words, n) for n in (1, 2, 3)},
        **{f"self_bleu_{n}": self_bleu(words, n) for n in (3, 4, 5)},
        "distinct_texts": len(set(kept)) / len(kept) if kept else math.nan,
    }
