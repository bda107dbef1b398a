"""Hand-calculated values of the pure metric functions."""

import math
import zlib

import numpy as np
import pytest

from fdiv.eval.benchmark.presets import PRESETS, get_preset
from fdiv.eval.metrics import membership, memorization, text_overlap, truth


def test_truth_ratio_geometric_is_a_mean_of_losses():
    # losses 1 and 3 -> geometric probability e^-2; correct e^-1.5; ratio e^-0.5
    ratio = truth.truth_ratio([1.5], [[1.0, 3.0]], epsilon=0.0)
    assert ratio == pytest.approx([math.exp(-0.5)], rel=1e-14)
    with_epsilon = truth.truth_ratio([1.5], [[1.0, 3.0]], epsilon=0.1)
    assert with_epsilon == pytest.approx([math.exp(-2) / (math.exp(-1.5) + 0.1)], rel=1e-14)


def test_truth_ratio_arithmetic_is_a_mean_of_probabilities():
    ratio = truth.truth_ratio([1.5], [[1.0, 3.0]], mean="arithmetic", epsilon=0.0)
    assert ratio == pytest.approx([(math.exp(-1) + math.exp(-3)) / 2 / math.exp(-1.5)], rel=1e-14)


def test_truth_ratio_of_underflowing_probabilities_is_defined():
    # exp(-2000) is 0 in float64: in log space the ratio is e^-100, with open-unlearning's epsilon it is exactly 0
    assert truth.truth_ratio([2000.0], [[2100.0]], epsilon=0.0) == pytest.approx([math.exp(-100)], rel=1e-9)
    assert truth.truth_ratio([2000.0], [[2100.0]]) == [0.0]
    assert truth.closer_to_one([0.0]) == 0.0


def test_truth_ratio_refuses_nan_and_wrong_shapes():
    with pytest.raises(ValueError, match="NaN"):
        truth.truth_ratio([float("nan")], [[1.0]])
    with pytest.raises(ValueError, match="expected correct losses"):
        truth.truth_ratio([1.0, 2.0], [[1.0]])
    with pytest.raises(ValueError, match="choose one of"):
        truth.truth_ratio([1.0], [[1.0]], mean="harmonic")


def test_truth_ratio_aggregators():
    assert truth.closer_to_one([0.5, 4.0], epsilon=0.0) == pytest.approx((0.5 + 0.25) / 2)
    assert truth.true_better([0.25, 3.0]) == pytest.approx(0.75 / 2)
    assert truth.knowledge_share([1.0], [[1.0, 1.0]], epsilon=0.0) == pytest.approx([0.5])


def test_option_probability():
    assert truth.option_probability([0.2], [[0.3, 0.5]], epsilon=0.0) == pytest.approx([0.2])
    with pytest.raises(ValueError, match="0/0"):
        truth.option_probability([0.0], [[0.0, 0.0]], epsilon=0.0)
    assert truth.option_probability([0.0], [[0.0, 0.0]]) == [0.0]


def test_forget_quality_lattice():
    # n = 40 a side and D = .3: exact p = .0541, the lattice of flat_tofu_muse.md section 1.8
    a = np.arange(40.0)
    quality = truth.forget_quality(a, a + 12)
    assert quality.statistic == pytest.approx(0.3)
    assert quality.p_value == pytest.approx(0.0541, abs=5e-5)
    assert quality.method == "exact" and quality.sizes == (40, 40)
    assert truth.forget_quality(a, a).p_value == 1.0


def test_forget_quality_of_one_row_is_refused():
    with pytest.raises(ValueError, match="at least two rows a side"):
        truth.forget_quality([1.0], [1.0])


def test_model_utility_is_a_harmonic_mean():
    assert truth.model_utility({"a": 0.5, "b": 1.0}) == pytest.approx(2 / 3)
    assert truth.model_utility({"a": 0.5, "b": 0.0}) == 0.0
    with pytest.raises(ValueError, match="part b"):
        truth.model_utility({"a": 0.5, "b": float("nan")})
    with pytest.raises(ValueError, match="no parts"):
        truth.model_utility({})


@pytest.mark.parametrize(
    "hits, with_floor, without_floor",
    [
        ([1, 1, 1, 1], 1.0, 1.0),
        ([0, 1, 1, 1], 0.75, 0.75),
        ([1, 1, 0, 1], 0.25, 0.25),
        ([1, 1, 1, 0], 0.25, 0.0),  # the loop never reaches k = L
        ([0, 0, 0, 0], 0.25, 0.0),
        ([], 0.0, 0.0),
    ],
)
def test_extraction_strength(hits, with_floor, without_floor):
    assert memorization.extraction_strength(hits) == pytest.approx(with_floor)
    assert memorization.extraction_strength(hits, floor=False) == pytest.approx(without_floor)


def test_extraction_strength_equals_the_loop_it_replaces():
    rng = np.random.default_rng(0)
    for _ in range(200):
        hits = rng.random(rng.integers(1, 12)) < 0.7
        for k in range(len(hits)):
            if hits[k:].all():
                break
        assert memorization.extraction_strength(hits) == pytest.approx(1 - k / len(hits))


def test_exact_memorization():
    assert memorization.exact_memorization([1, 0, 1, 1]) == 0.75
    assert memorization.exact_memorization([]) is None


def test_membership_scores_by_hand():
    text = "a fictitious author"
    assert membership.zlib_score(2.0, text) == 2.0 / len(zlib.compress(text.encode()))
    assert membership.reference_score(2.0, 0.5) == 1.5
    assert membership.gradnorm_score([1.0, 3.0]) == 2.0
    with pytest.raises(ValueError, match="no parameter"):
        membership.gradnorm_score([])


def test_min_k_takes_the_lowest_share():
    log_probs = [-1.0, -5.0, -2.0, -4.0, -3.0]
    assert membership.min_k_score(log_probs, 0.4) == pytest.approx(4.5)
    assert membership.min_k_score([-3.0], 0.4) == 3.0
    assert membership.min_k_score([-3.0], 0.4, at_least_one=False) is None
    assert membership.min_k_score([], 0.4) is None
    with pytest.raises(ValueError, match="0 < k <= 1"):
        membership.min_k_score(log_probs, 0.0)


def test_min_k_plus_plus_normalises_each_token():
    # (log p - mu)/sigma = -2 and +1; the lowest 40 % is one token
    score = membership.min_k_plus_plus_score([-3.0, -1.0], [-1.0, -2.0], [1.0, 1.0], 0.4)
    assert score == pytest.approx(2.0)
    clamped = membership.min_k_plus_plus_score([-1.0], [-1.0 + 1e-3], [0.0], 0.4)
    assert clamped == pytest.approx(1.0)


def test_auc_counts_ties_half_and_has_no_default():
    assert membership.auc([1.0, 2.0], [3.0, 4.0]) == 1.0
    assert membership.auc([3.0, 4.0], [1.0, 2.0]) == 0.0
    assert membership.auc([1.0, 2.0], [2.0]) == pytest.approx((1 + 0.5) / 2)
    with pytest.raises(ValueError, match="both sides"):
        membership.auc([], [1.0])
    with pytest.raises(ValueError, match="NaN"):
        membership.auc([float("nan")], [1.0])


def test_privleak():
    assert membership.privleak(1.0, 0.5) == pytest.approx(-100.0)
    assert membership.privleak(0.4, 0.4) == 0.0
    assert membership.privleak(0.25, 0.5, epsilon=0.0) == pytest.approx(50.0)
    assert membership.relative_difference(0.75, 0.5, epsilon=0.0) == pytest.approx(50.0)
    with pytest.raises(ValueError, match="no finite value"):
        membership.privleak(0.5, 1.0, epsilon=0.0)


def test_rouge_stemming_is_a_choice():
    stemmed = text_overlap.rouge_scores("the author writes books", "authors writing a book")
    plain = text_overlap.rouge_scores("the author writes books", "authors writing a book", use_stemmer=False)
    assert stemmed["rougeL_recall"] == pytest.approx(3 / 4)
    assert stemmed["rougeL_f1"] == pytest.approx(3 / 4)
    assert plain["rougeL_recall"] == 0.0


def test_cut_at_stop_words():
    assert text_overlap.cut_at(" Paris\nQuestion: next", ["\n\n", "\nQuestion", "Question:"]) == "Paris"


def test_ngram_entropy():
    # a b c d: two-grams 3 distinct, three-grams 2 distinct
    expected = (2 / 3 * math.log2(3) + 4 / 3 * 1.0) / 2
    assert text_overlap.ngram_entropy("a b c d") == pytest.approx(expected)
    assert text_overlap.ngram_entropy("no no no no no") == 0.0
    assert text_overlap.ngram_entropy("too short") is None


def test_presets_are_named_and_unknown_ones_refused():
    assert set(PRESETS) == {"open_unlearning", "tofu_paper", "tofu_2024", "muse_original"}
    assert get_preset("tofu_2024").max_rows == 300
    with pytest.raises(ValueError, match="did you mean 'tofu_2024'"):
        get_preset("tofu2024")
