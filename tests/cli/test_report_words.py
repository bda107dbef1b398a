"""What a report says changed beyond its error: intervals against a table of Student's t, by hand, and by simulation."""

import math
import random
import statistics

import pytest

from fdiv.report.table import best_cells, best_of
from fdiv.report.words import Change, difference, run_summary, runs_summary, settings_summary, sweep_summary

# Two-sided 95 % quantiles of Student's t, from a printed table.
T = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262}


@pytest.mark.parametrize("freedom", T)
def test_seeds_are_compared_by_their_differences(freedom):
    count = freedom + 1
    before = [float(index) for index in range(count)]
    after = [value + 1.0 + 0.5 * (-1) ** index for index, value in enumerate(before)]
    gaps = [b - a for a, b in zip(before, after, strict=True)]
    half = T[freedom] * statistics.stdev(gaps) / math.sqrt(count)
    found = difference(before, after, paired=True)
    assert found == pytest.approx((statistics.fmean(gaps) - half, statistics.fmean(gaps) + half), rel=1e-3)


def test_other_seeds_are_compared_by_welch():
    first, second = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 4.0, 6.0, 8.0, 10.0]
    low, high = difference(first, second, paired=False)
    # variances 2.5/5 and 10/5: s.e. sqrt(2.5); Welch-Satterthwaite: 2.5^2 / (0.5^2/4 + 2^2/4) = 5.88
    assert (low + high) / 2 == pytest.approx(3.0)
    assert (high - low) / 2 == pytest.approx(2.459 * math.sqrt(2.5), rel=1e-3)  # t of 5.88 degrees of freedom
    assert difference([1.0], [2.0, 3.0], paired=False) is None


@pytest.mark.parametrize("paired", [True, False])
def test_nineteen_of_twenty_intervals_hold_the_truth(paired):
    draw, held = random.Random(3), 0
    for _ in range(2_000):
        first = [draw.gauss(0, 1) for _ in range(4)]
        second = [(value if paired else 0) + draw.gauss(0.5, 1) for value in first]
        low, high = difference(first, second, paired)
        held += low <= 0.5 <= high
    assert 0.93 < held / 2_000 < 0.97


RESULT = {
    "method": "dph", "summary_metrics": ["pass@8"],
    "before/pass@1": 0.25, "before/pass@1_se": 0.03, "after/pass@1": 0.5, "after/pass@1_se": 0.04,
    "before/pass@8": 0.5, "before/pass@8_se": 0.3, "after/pass@8": 0.75, "after/pass@8_se": 0.4,
    "before/loss": 1.0, "after/loss": 2.0, "before/bad": None, "after/bad": 1.0, "before/nan": float("nan"), "after/nan": 1.0,
}  # fmt: skip


def test_a_run_is_judged_by_the_errors_over_rows():
    summary = run_summary(RESULT, "run")
    assert [change.name for change in summary.changes] == ["pass@8", "pass@1", "loss"]
    (beyond,), (within,), (unknown,) = (summary.of(verdict) for verdict in ("beyond", "within", "unknown"))
    assert (beyond.name, within.name, unknown.name) == ("pass@1", "pass@8", "loss")
    half = 1.96 * 0.05  # of 0.03 and 0.04
    assert (beyond.low, beyond.high) == (pytest.approx(0.25 - half, rel=1e-3), pytest.approx(0.25 + half, rel=1e-3))
    assert beyond.sentence() == "pass@1 ↑ rose from 0.2500 to 0.5000 (+0.25; 95 %: +0.152 to +0.348): better"


@pytest.mark.parametrize(
    ("name", "before", "after", "direction"),
    [
        ("pass@1", 0.5, 0.25, "worse"), ("extraction_strength", 0.5, 0.25, "better"), ("privleak", -9.0, 3.0, "better"),
        ("privleak", 1.0, -3.0, "worse"), ("entropy", 1.0, 2.0, None), ("pass@1", 0.5, 0.5, None),
    ],
)  # fmt: skip
def test_which_way_it_went(name, before, after, direction):
    change = Change(name, None, before, after)
    assert (change.direction, change.verdict) == (direction, "unknown")
    assert ("stayed" in change.sentence()) == (before == after)


def sweep(values, seeds=(0, 1, 2)):
    cells = [
        {
            "name": f"{label}-{seed}", "settings": {"divergence": label, "seed": seed}, "status": "finished",
            "values": {"method": "dph", "before/pass@1": 0.25, "after/pass@1": value},
        }
        for label, found in values.items()
        for seed, value in zip(seeds, found, strict=True)
    ]  # fmt: skip
    return {"cells": cells, "columns": ["pass@1"], "aggregate": []}


def test_a_sweep_is_judged_over_its_seeds():
    found = sweep({"js": [0.5, 0.51, 0.52], "kl": [0.0, 0.25, 0.55]})
    beyond, within = sweep_summary(found)
    assert (beyond.heading, [change.verdict for change in beyond.changes]) == ("js", ["beyond"])
    assert (within.heading, [change.verdict for change in within.changes]) == ("kl", ["within"])
    failed = {**found["cells"][0], "status": "failed", "values": {}}
    assert sweep_summary({**found, "cells": [failed, found["cells"][0]]})[0].changes[0].verdict == "unknown"


def test_the_best_setting_and_what_it_is_ahead_of():
    # Seed by seed `js` is 0.1 above `tv` every time, though the seeds differ by more than that.
    values = {"js": [0.3, 0.5, 0.7], "tv": [0.2, 0.4, 0.601], "kl": [0.0, 0.6, 0.7]}
    (line,) = settings_summary(sweep(values), {"pass@1": "higher", "loss": "lower", "entropy": None})
    assert line == "pass@1 ↑: best under js (0.5000), ahead of tv beyond its error; not told apart from kl"
    assert settings_summary(sweep({"js": [0.3, 0.5, 0.7]}), {"pass@1": "higher"}) == []
    (single,) = runs_summary({"a": RESULT, "b": {**RESULT, "after/pass@1": 0.75}, "c": {"after/entropy": 1.0}})[:1]
    assert single == "pass@8 ↑: best under a (0.7500); not told apart from b"


@pytest.mark.parametrize(
    ("values", "towards", "places"),
    [
        ([1.0, 3.0, 2.0], "higher", {1}), ([1.0, 3.0, 2.0], "lower", {0}), ([-1.0, 3.0, 1.0], "zero", {0, 2}),
        ([1.0, 1.0], "higher", set()), ([1.0, None], "higher", set()), ([1.0, float("nan"), 2.0], "lower", {0}),
        ([1.0, 2.0], None, set()), ([], "higher", set()),
    ],
)  # fmt: skip
def test_best_values(values, towards, places):
    assert best_of(values, towards) == places


def test_best_cells_of_a_table():
    groups = [
        {"label": label, "metrics": {"after/pass@1": {"mean": mean}, "train/loss": {"mean": -mean}}}
        for label, mean in (("a", 0.25), ("b", 0.5))
    ]
    assert best_cells(groups, {"pass@1": "higher", "train/loss": "lower", "absent": "higher"}) == {
        ("b", "pass@1"), ("b", "train/loss"),
    }  # fmt: skip
