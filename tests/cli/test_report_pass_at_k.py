"""The Pass@k curve of a report: which numbers are plotted, for one run and for the settings of a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from fdiv.report.pass_at_k_curves import pass_at_k_curves, pass_at_k_points
from fdiv.report.records import RunRecord

RESULT = {
    "before/pass@1": 0.2, "before/pass@1_se": 0.05, "before/pass@16": 0.9, "before/pass@2": 0.5, "before/pass^2": 0.1,
    "after/pass@1": 0.4, "after/pass@1_se": 0.02, "after/pass@16": 0.8, "after/pass@2": 0.6, "after/g_pass@2_0.5": 0.3,
    "before/easy/pass@1": 0.5, "before/easy/pass@4": None, "after/keep_rate@2": 0.7,
}  # fmt: skip


def _run(result, setting=""):
    return RunRecord("run", Path(), result, {}, [], "", setting)


def test_points_are_pass_at_k_alone_in_order_of_k():
    assert pass_at_k_points(RESULT, "before") == {
        "": {1: (0.2, 0.05), 2: (0.5, 0.0), 16: (0.9, 0.0)}, "easy": {1: (0.5, 0.0)},
    }  # fmt: skip


def test_curve_of_one_run():
    (axis,) = pass_at_k_curves([_run(RESULT, "jensen_shannon")]).axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}
    assert lines == {
        "before training": ([1, 2, 16], [0.2, 0.5, 0.9]), "jensen_shannon": ([1, 2, 16], [0.4, 0.6, 0.8]),
    }  # fmt: skip
    band = axis.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.38)


def test_settings_are_means_over_seeds():
    runs = [
        _run(RESULT, "js"),
        _run({**RESULT, "after/pass@2": 0.8}, "js"),
        _run(RESULT, "kl"),
        _run({}, "unfinished"),
    ]
    (axis,) = pass_at_k_curves(runs).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
    assert lines["js"] == pytest.approx([0.4, 0.7, 0.8])
    assert set(lines) == {"before training", "js", "kl"} and not len(axis.collections) > 1


def test_no_curve_without_pass_at_k():
    assert pass_at_k_curves([_run({"before/accuracy": 0.5})]) is None
    assert pass_at_k_curves([_run({})]) is None
