"""Distinct-n and self-BLEU: by hand, and equal to nltk on random texts."""

from __future__ import annotations

import math
import random

import pytest

from fdiv.statistics.diversity import distinct_n, diversity, self_bleu


def test_distinct_n_by_hand():
    texts = ["a b a b".split(), "a b c".split(), []]
    assert distinct_n(texts, 1) == pytest.approx((2 / 4 + 3 / 3) / 2)
    assert distinct_n(texts, 2) == pytest.approx((2 / 4 + 2 / 3) / 2)
    assert math.isnan(distinct_n([[]], 1))


def test_self_bleu_of_copies_and_of_strangers():
    copies = [["a", "b", "c", "d", "e", "f"]] * 3
    assert self_bleu(copies, 5) == pytest.approx(1.0)
    assert self_bleu([["a", "b"], ["c", "d"]], 3) == 0.0
    assert math.isnan(self_bleu([["a"]], 3)) and math.isnan(self_bleu([], 3))


@pytest.mark.parametrize("letters", ["ab", "abcdefgh"])
@pytest.mark.parametrize("order", [1, 3, 4, 5])
def test_self_bleu_is_nltks(letters, order):
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    generator = random.Random(order)
    texts = [[generator.choice(letters) for _ in range(generator.randint(1, 12))] for _ in range(25)]
    texts += [["x", "y"], ["z"]]  # no word in common with any other
    smoothing = bleu.SmoothingFunction().method1
    scores = [
        bleu.sentence_bleu(texts[:i] + texts[i + 1 :], text, weights=[1 / order] * order, smoothing_function=smoothing)
        for i, text in enumerate(texts)
    ]
    assert self_bleu(texts, order) == pytest.approx(sum(scores) / len(scores), abs=1e-12)


def test_diversity_of_texts():
    found = diversity(["the cat sat", "the cat sat", "", "a dog"], max_texts=3)
    assert found["distinct_texts"] == pytest.approx(2 / 3)
    assert found["distinct_1"] == 1.0 and found["self_bleu_3"] == pytest.approx(1.0)
    assert set(found) == {
        "distinct_1", "distinct_2", "distinct_3", "self_bleu_3", "self_bleu_4", "self_bleu_5", "distinct_texts"
    }  # fmt: skip
