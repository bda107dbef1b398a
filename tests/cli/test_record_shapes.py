"""Records without a digest: what a report cannot show is named by its place."""

import json
import random

import pytest

from fdiv.errors import DataError
from fdiv.report.page import write_report
from fdiv.report.shapes import check_results
from fdiv.sealed import DIGEST
from tests.fuzz.damage import damage_tree, tree_damage

VALUES = {"before/loss": 1.5, "after/loss": 0.5, "notes": {"ece": "no rows"}, "method": "f_dpo"}
RESULTS = {
    **{"recipe": "r", "command": "fdiv sweep r", "seeds": [1], "columns": ["loss"], "axes": {"reward": "loss", "divergence": "loss"}},
    "cells": [{"name": "a", "settings": {"divergence": "reverse_kl"}, "status": "finished", "stage": "run", "values": VALUES}],
    "aggregate": [{
        **{"label": "reverse_kl", "settings": {"divergence": "reverse_kl"}, "n": 1, "failed": 0},
        "metrics": {f"{stage}/loss": {"mean": 0.5, "se": None, "n": 1} for stage in ("before", "after")},
    }],
    "versions": {"torch": "2"}, "git": {"revision": "abc", "dirty": False}, "device": "cpu", "date": "today",
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("cells", 0, "status"), 3, "`cells.0.status` is '3', not str"),
        (
            ("cells", 0, "values", "after/loss"),
            "0x10",
            "`cells.0.values.after/loss` is '0x10', not int or float or null",
        ),
        (("aggregate", 0, "metrics", "after/loss"), [1], "`aggregate.0.metrics.after/loss` is '[1]', not an object"),
        (
            ("cells", 0, "values", "after/loss"),
            2**64,
            "`cells.0.values.after/loss` is '18446744073709551616', not int",
        ),
        (("aggregate", 0, "n"), True, "`aggregate.0.n` is 'True', not int"),
        (("cells",), {}, "`cells` is '{}', not a list"),
        (("git",), {"dirty": True}, "no `git.revision`"),
    ],
)
def test_a_value_of_another_type_is_named(path, value, reason, tmp_path):
    with pytest.raises(DataError) as error:
        check_results(damage_tree(RESULTS, ("set", path, value)), tmp_path / "results.json", "run it again")
    assert reason in str(error.value) and str(error.value).endswith("; run it again")


def test_damaged_results_are_refused_or_shown(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    write_report([tmp_path], tmp_path / "report.html")
    rng, refused = random.Random(0), 0
    for _ in range(25):
        damaged = damage_tree(RESULTS, tree_damage(rng, RESULTS))
        assert DIGEST not in damaged
        (tmp_path / "results.json").write_text(json.dumps(damaged))
        try:
            write_report([tmp_path], tmp_path / "report.html")
        except DataError:
            refused += 1
    assert refused >= 8
