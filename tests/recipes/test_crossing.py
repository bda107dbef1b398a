"""A metric where another first reached a level."""

from __future__ import annotations

import json

import pytest

from fdiv.errors import RecipeError
from fdiv.recipe.crossing import value_when
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
    ],
)
def test_the_first_entry_counts(name, expected):
    assert value_when(name, HISTORY) == expected


@pytest.mark.parametrize(
    "name", ["when", "when pass@1", "when pass@1>0.5/x", "when pass@1>=half/x", "when pass@1>=0.5/"]
)
def test_another_form_is_refused(name):
    with pytest.raises(RecipeError, match="write `when pass@1>=0.5/pass@64`"):
        value_when(name, HISTORY)


def test_the_glossary_knows_what_is_shown():
    assert describe("when pass@1>=0.5/pass@64") == describe("after/pass@64")


def test_a_column_of_a_sweep(tmp_path):
    from fdiv.recipe.sweep import Column, SweepBlock
    from fdiv.run.sweep import _crossings

    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in HISTORY))
    block = SweepBlock(
        table={"pass@64": Column(), "when pass@1>=0.5/pass@64": Column(), "when pass@1>=1/step": Column()}
    )
    assert _crossings(block, tmp_path) == {"when pass@1>=0.5/pass@64": 0.75, "when pass@1>=1/step": None}
    assert _crossings(block, tmp_path / "missing") == {}
