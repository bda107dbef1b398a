"""A metric where another first reached a level."""

from __future__ import annotations

import json

import pytest

from fdiv.errors import RecipeError
from fdiv.recipe.crossing import never_together, value_when
from fdiv.report.metrics import describe

HISTORY = [
    {"step": 0, "eval_pass@1": 0.30, "eval_pass@64": 0.90},
    {"step": 10, "loss": 1.0},
    {"step": 20, "eval_pass@1": 0.44, "eval_pass@64": 0.80},
    {"step": 40, "eval_pass@1": 0.50, "eval_pass@64": 0.75},
    {"step": 60, "eval_pass@1": 0.45, "eval_pass@64": 0.99},
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("when pass@1>=0.5/pass@64", 0.75),
        ("when pass@1>=0.44/pass@64", 0.80),
        ("when eval_pass@1>=.31/eval_pass@64", 0.80),
        ("when pass@1>=0.2/step", 0),
        ("when pass@64<=0.8/pass@1", 0.44),
        ("when pass@1>=0.51/pass@64", None),
        ("when loss>=1e-1/pass@64", None),  # not in one entry
        ("when loss>=1e-1/step", 10),
        ("when pass@1>=+.5/step", 40),
        ("when pass@1>=5.e-1/step", 40),
    ],
)
def test_the_first_entry_counts(name, expected):
    assert value_when(name, HISTORY) == expected


@pytest.mark.parametrize(
    "name",
    [
        "when",
        "when pass@1",
        "when pass@1>0.5/x",
        "when pass@1>=half/x",
        "when pass@1>=0.5/",
        "when pass@1>=0.5.1/x",
        "when pass@1>=./x",
        "when pass@1>=/x",
    ],
)
def test_another_form_is_refused(name):
    with pytest.raises(RecipeError, match="write `when pass@1>=0.5/pass@64`"):
        value_when(name, HISTORY)


def test_a_level_that_is_not_reached_is_told_from_metrics_that_never_meet():
    assert not never_together("when pass@1>=0.9/pass@64", HISTORY)
    for name in ("when loss>=0/pass@64", "when pass@l>=0.1/pass@64", "when pass@1>=0.1/pass@63"):
        assert value_when(name, HISTORY) is None and never_together(name, HISTORY)


@pytest.mark.parametrize(
    "block",
    [
        {"table": {"when pass@1>0.5/x": None}},
        {"plots": {"a.png": {"kind": "points", "x": "pass@1", "y": "when pass@1>0.5/x"}}},
        {"plots": {"a.png": {"kind": "points", "x": "when pass@1>0.5/x", "y": "pass@1"}}},
    ],
)
def test_another_form_is_refused_before_a_sweep_runs(block):
    from fdiv.recipe.sweep import parse_sweep

    with pytest.raises(RecipeError, match=r"^here: metric 'when pass@1>0.5/x': write `when pass@1>=0.5/pass@64`"):
        parse_sweep({"seed": [0], **block}, lambda path: "here")


def test_the_glossary_knows_what_is_shown():
    assert describe("when pass@1>=0.5/pass@64") == describe("after/pass@64")


def test_a_column_of_a_sweep(tmp_path, capsys):
    from fdiv.recipe.sweep import Column, Panel, SweepBlock
    from fdiv.run.sweep import _crossings

    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in HISTORY))
    block = SweepBlock(
        table={"pass@64": Column(), "when pass@1>=0.5/pass@64": Column(), "when pass@1>=1/step": Column()}
    )
    assert _crossings(block, tmp_path) == {"when pass@1>=0.5/pass@64": 0.75, "when pass@1>=1/step": None}
    assert _crossings(block, tmp_path / "missing") == {}
    assert "no log entry" not in capsys.readouterr().err
    drawn = Panel(y="when pass@1>=0.44/pass@64", x="rehearsal_coefficient")
    assert _crossings(SweepBlock(plots={"a.png": (drawn, drawn)}), tmp_path) == {"when pass@1>=0.44/pass@64": 0.8}
    assert _crossings(SweepBlock(table={"when loss>=0/pass@64": Column()}), tmp_path) == {"when loss>=0/pass@64": None}
    assert "no log entry holds both metrics of 'when loss>=0/pass@64'" in capsys.readouterr().err


def test_seeds_that_never_reached_the_level_are_counted():
    """A mean over the seeds that reached it only is not the mean over seeds, and says so."""
    from fdiv.recipe.sweep import Column
    from fdiv.report.table import rows_table

    name = "when pass@1>=0.5/pass@64"
    cells = [
        {
            "stage": "run",
            "status": "finished",
            "settings": {"method": "a", "seed": seed},
            "values": {name: value, "after/x": 1.0},
        }
        for seed, value in enumerate([0.8, None, 0.6])
    ]
    results = {"cells": cells, "aggregate": [{"label": "a", "settings": {"method": "a"}, "n": 3}]}
    columns = {name: Column(format=".3f"), "x": Column(format=".1f")}
    assert rows_table(results, columns)[1] == [["a", "3", "0.700 ± 0.100 (2 of 3)", "1.0 ± 0.0"]]
