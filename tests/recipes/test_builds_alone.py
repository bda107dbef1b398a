"""What `prepare:` builds is built by one process while the others wait: nothing in it takes part in their group."""

from __future__ import annotations

import json

import pytest

from tests.support.processes import run_well
from tests.support.runs.builders import order, prepared


def both(tmp_path, tiny_model_dir, fails=""):
    run_well(prepared, str(tmp_path / "root"), str(tiny_model_dir), fails, str(tmp_path / "said"), processes=2)
    return [json.loads((tmp_path / f"said.{rank}").read_text()) for rank in range(2)]


def test_a_build_that_trains_a_model_trains_it_alone(tiny_model_dir, tmp_path):
    said = both(tmp_path, tiny_model_dir)
    assert said[0] == said[1] == {"group": 2, "processes": 1, "wrapped": "LlamaForCausalLM", "zero3": False}
    assert len(list((tmp_path / "root").iterdir())) == 1


@pytest.mark.parametrize(
    ("fails", "error", "message"),
    [("rows", "FileNotFoundError", "no rows at all"), ("rollouts", "RolloutError", "the server is gone")],
)
def test_its_error_is_that_of_the_builder(fails, error, message, tiny_model_dir, tmp_path):
    said = both(tmp_path, tiny_model_dir, fails)
    assert said[0] == {"group": 2, "error": error, "message": message}


@pytest.mark.slow
def test_a_build_may_take_longer_than_the_group_waits(tmp_path):
    """Half an hour by default; here twenty seconds, in which the processes have to find each other, too."""
    run_well(order, str(tmp_path), 20.0, 23.0, processes=2)
    assert (tmp_path / "order").read_text() == "01"
