"""Pass@k and its relatives against enumeration, closed forms and exact integers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdiv.eval import (
    bootstrap_standard_error,
    g_pass_at_k,
    keep_and_explore,
    majority_at_n,
    mean_at_n,
    mg_pass_at_k,
    pass_at_k,
    pass_hat_k,
)


def _subsets(n: int, c: int, k: int) -> list[int]:
    """Number of correct samples in every subset of k of n samples, c of them correct."""
    return [sum(subset) for subset in itertools.combinations([1] * c + [0] * (n - c), k)]


@pytest.mark.parametrize("n", range(1, 8))
def test_every_estimator_is_the_average_over_all_subsets(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        drawn = np.array(_subsets(n, c, k))
        assert pass_at_k([c], n, k)[0] == pytest.approx((drawn > 0).mean(), abs=1e-12)
        assert pass_hat_k([c], n, k)[0] == pytest.approx((drawn == k).mean(), abs=1e-12)
        for threshold in (0.25, 0.5, 0.75, 1.0):
            exact = (drawn >= max(1, math.ceil(threshold * k))).mean()
            assert g_pass_at_k([c], n, k, threshold)[0] == pytest.approx(exact, abs=1e-12)
        if k >= 2:
            area = np.maximum(drawn - math.ceil(k / 2), 0).mean() * 2 / k
            assert mg_pass_at_k([c], n, k)[0] == pytest.approx(area, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_exact_integers_bounds_and_monotony(case):
    n, c, k = case
    some, every = pass_at_k([c], n, k)[0], pass_hat_k([c], n, k)[0]
    assert some == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k), rel=1e-9, abs=1e-12)
    assert every == pytest.approx(math.comb(c, k) / math.comb(n, k), rel=1e-8, abs=1e-300)
    assert 0 <= every <= c / n + 1e-12 <= some + 2e-12 <= 1 + 3e-12
    curve = pass_at_k([c], n, list(range(1, min(n, 50) + 1)))[0]
    assert (np.diff(curve) >= -1e-12).all()


def test_small_values_keep_their_precision_and_thousands_do_not_overflow():
    assert pass_at_k([1], 1_000_000, 1)[0] == pytest.approx(1e-6, rel=1e-13)
    assert pass_at_k([5], 10_000, 5_000)[0] == pytest.approx(
        1 - math.comb(9_995, 5_000) / math.comb(10_000, 5_000), rel=1e-11
    )
    assert pass_at_k([1, 0, 4096], 4096, 4096).tolist() == [1.0, 0.0, 1.0]


def test_all_k_and_ragged_n_at_once():
    table = pass_at_k([3, 0, 5], [10, 4, 5], [4, 1])
    expected = [[1 - math.comb(7, 4) / math.comb(10, 4), 0.3], [0, 0], [1, 1]]
    assert table == pytest.approx(np.array(expected), abs=1e-12)
    assert mean_at_n([3, 0, 5], [10, 4, 5]) == pytest.approx([0.3, 0, 1])


def test_threshold_that_is_a_whole_number_in_decimal():
    """0.07 · 100 is 7.000000000000001 in floating point: seven correct ones must do."""
    assert g_pass_at_k([7], 100, 100, 0.07)[0] == 1.0
    assert g_pass_at_k([6], 100, 100, 0.07)[0] == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pass_at_k([1, 1], [8, 3], 4), "k=4 is more than the 3 samples of problem 1"),
        (lambda: pass_at_k([1], 8, 0), "at least 1"),
        (lambda: pass_at_k([9], 8, 1), "problem 0: 9 of 8"),
        (lambda: pass_at_k([-1], 8, 1), "-1 of 8"),
        (lambda: pass_at_k([0.5], 8, 1), "whole numbers"),
        (lambda: pass_at_k([1], 8, 1.5), "whole numbers"),
        (lambda: pass_at_k([], 8, 1), "at least one problem"),
        (lambda: g_pass_at_k([1], 8, 2, 0.0), "threshold=0.0"),
        (lambda: mg_pass_at_k([1], 8, 1), "k of at least 2"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_majority_with_ties_and_missing_answers():
    answers = [["7", "7", "8"], ["7", "8", None], [None, None, None], ["1", "2", "2"], ["5", "5", "6"]]
    correct = [[True, True, False], [True, False, False], [False] * 3, [True, False, False], [True, False, False]]
    assert majority_at_n(answers, correct).tolist() == [1.0, 0.5, 0.0, 0.0, 0.5]


def test_bootstrap_goes_to_the_closed_form_and_is_seeded():
    values = np.random.default_rng(1).random((400, 2))
    error = bootstrap_standard_error(values, resamples=4000, seed=3)
    assert error == pytest.approx(values.std(axis=0) / 20, rel=0.05)
    assert (bootstrap_standard_error(values, resamples=4000, seed=3) == error).all()
    assert bootstrap_standard_error(values[:, 0], resamples=4000, seed=3) == pytest.approx(error[0])
    assert math.isnan(bootstrap_standard_error([0.5]))


def test_keep_and_explore_are_counts_at_n_equal_k_and_expected_counts_beyond():
    rates = keep_and_explore([1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0])
    assert rates.keep == 0.75 and rates.explore == 0.5
    assert rates.keep_se == pytest.approx(math.sqrt(0.75 * 0.25 / 4), rel=0.25)  # the number kept varies as well
    assert keep_and_explore([0, 0], [1, 0])[:2] == (None, None)
    assert keep_and_explore([1, 1], [1, 0]).explore is None
    # Two tasks, n=2, k=1: enumerate which sample of either model is looked at.
    base, own = [[1, 0], [0, 0]], [[1, 1], [1, 0]]
    kept = np.mean([b * o for b in base[0] for o in own[0]]) + np.mean([b * o for b in base[1] for o in own[1]])
    new = np.mean([(1 - b) * o for b in base[0] for o in own[0]]) + np.mean([o for o in own[1] for _ in base[1]])
    found = keep_and_explore(pass_at_k([1, 0], 2, 1), pass_at_k([2, 1], 2, 1))
    assert found.keep == pytest.approx(kept / 0.5) and found.explore == pytest.approx(new / 1.5)


@pytest.mark.parametrize("k", [[1], [1, 1], [2, 1], [3, 3, 1]])
def test_a_column_for_each_k(k):
    found = pass_at_k([1, 0], 3, k)
    assert found.shape == (2, len(k)) and found[0].tolist() == pytest.approx([value / 3 for value in k])


def test_distinct_correct_by_hand():
    """Task a: x twice and y, correct; z is wrong; the greedy w does not count. Task b: none. (2 + 0) / 2."""
    from fdiv.errors import DataError
    from fdiv.eval.pass_at_k.aggregate import distinct_correct
    from fdiv.eval.pass_at_k.evaluation import PassKEvalConfig

    found = [("a", 0, "x", True), ("a", 1, "x", True), ("a", 2, "y", True), ("a", 3, "z", False), ("a", -1, "w", True)]
    found += [("b", 0, "x", False), ("b", 1, "y", None)]
    rows = [dict(zip(("task_id", "sample", "completion", "correct"), row, strict=True)) for row in found]
    assert distinct_correct(rows) == 1.0
    assert distinct_correct(rows, lambda text: text == "x" or text == "y") == 0.5
    forms = ["3*2+7", "7+2×3", r"So it is \boxed{7+3*2}", "2*3+7-0", "wrong"]
    said = [{"task_id": "a", "sample": i, "completion": text, "correct": i < 4} for i, text in enumerate(forms)]
    assert distinct_correct(said) == 4 and distinct_correct(said, PassKEvalConfig(mode="expression")._mode) == 2
    with pytest.raises(ValueError, match="unknown mode 'expresion'; did you mean 'expression'"):
        PassKEvalConfig(mode="expresion")
    with pytest.raises(DataError, match=r"raised ZeroDivisionError on sample 0 of task a, '3\*2\+7'"):
        distinct_correct(said, lambda text: 1 // 0)
