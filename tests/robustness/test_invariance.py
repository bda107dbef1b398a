"""What must not matter does not: thirty fp32 steps of all five trainers, in pairs of runs (see `tests.support.invariance`).

Tolerances are about ten times what rounding was measured to do (`benchmarks/results/invariance.json`).
"""

import itertools
import json

import pytest
import trl.trainer.grpo_trainer

from tests.support.instruments import damp_logits, forget_positions, recompute_differently, scale_gradients
from tests.support.invariance import AXES, BATCH, STEPS, Invariance, drift, table
from tests.support.runs.all_trainers import ROLLOUT_TRAINERS, TRAINERS

TOLERANCE = {
    "f_dpo": (2e-6, 1e-6),
    "f_dpg": (1e-4, 4e-5),  # its loss is a mean of coefficient · log π(y), log π(y) ≈ -25, and the signs differ
    "d2o": (6e-7, 1e-7),
    "flat": (5e-6, 1e-6),
    "dph": (3e-7, 8e-8),
}
"""Maximum and mean drift of the loss."""
WEIGHTS = 6e-7
EXACT = ("checkpointing", "tokenizer_side")
"""Axes on which runs agree bit for bit."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Invariance(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return Invariance(tmp_path_factory.mktemp("short"), steps=3)


def check(suite, axis, name):
    """The two runs differ in what they should, and in nothing else."""
    one, other = suite.pair(axis, name)
    check_paths(axis, one, other)
    assert len(one.losses) == suite.steps
    found = drift(one, other)
    assert found["loss_range"] > 1e-3 and found["weights_moved"] > 5e-3, f"nothing was trained: {found}"
    largest, mean = (0, 0) if axis in EXACT else TOLERANCE[name]
    assert found["loss_max"] <= largest and found["loss_mean"] <= mean, found
    assert found["weights_max"] <= (0 if axis in EXACT else WEIGHTS), found


def check_paths(axis, one, other):
    """By what was counted: each run took the path that its name says."""
    a, b = one.counts, other.counts
    assert (one.processes, other.processes) == (1, 2 if axis == "processes" else 1)
    assert b["rows"] == a["rows"] or axis == "processes"
    assert min(run.counts["padded_left"] + run.counts["padded_right"] for run in (one, other)) > 0
    if axis == "accumulation":
        assert b["forwards"] >= 6 * a["forwards"]  # 8 times where every step has 8 examples
    else:
        assert b["forwards"] == a["forwards"]
    if axis == "checkpointing":
        assert b["layer"] == 2 * a["layer"] == 2 * a["forwards"]
    if axis == "padding":
        assert a["padded_right"] == b["padded_left"] == 0 and a["padded_left"] == b["padded_right"]
    if axis == "processes":
        assert 0.4 * a["rows"] < b["rows"] < 0.6 * a["rows"]
    if axis == "head":
        assert a["fused"] == b["plain"] >= a["forwards"] and not a.get("plain") and not b.get("fused")
    else:
        assert a["fused"] and b["fused"] and not a.get("plain") and not b.get("plain")


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("axis", AXES)
def test_thirty_steps(whole, axis, name):
    assert whole.steps == STEPS == 30
    check(whole, axis, name)


@pytest.mark.parametrize(
    ("axis", "name"), [*itertools.product(("accumulation", "head"), TRAINERS), ("padding", "f_dpo")]
)
@pytest.mark.processor
def test_first_steps(short, axis, name):
    check(short, axis, name)


def test_the_table_in_the_guide_is_the_measured_one(repository):
    report = json.loads((repository / "benchmarks" / "results" / "invariance.json").read_text())
    assert report["steps"] == STEPS
    assert table(report["drift"]) in (repository / "docs" / "scale.md").read_text(encoding="utf-8")
    for axis, trainers in report["drift"].items():
        for name, found in trainers.items():
            assert found["loss_max"] <= (0 if axis in EXACT else TOLERANCE[name][0]), (axis, name)


# ------------------------------------------------------------------------------------------- and a fault would be seen

FAULTS = {
    "accumulation": ("accumulated", lambda trainer: scale_gradients(trainer, BATCH)),  # the sum, not the mean
    "checkpointing": ("checkpointed", recompute_differently),
    "padding": ("padded_left", forget_positions),
    "head": ("plain_head", damp_logits),
}


def check_seen(suite, axis, name, faulty):
    found = drift(suite.run(name, AXES[axis][0]), faulty)
    assert found["loss_max"] > (0 if axis in EXACT else 10 * TOLERANCE[name][0]), found
    assert found["weights_max"] > 10 * WEIGHTS, found


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("axis", FAULTS)
def test_a_fault_is_seen(short, axis, name):
    variant, fault = FAULTS[axis]
    check_seen(short, axis, name, short.train(name, variant, fault))


@pytest.mark.slow
@pytest.mark.parametrize("name", ROLLOUT_TRAINERS)
def test_prompts_padded_where_the_tokenizer_says_are_seen(short, monkeypatch, name):
    pad = trl.trainer.grpo_trainer.pad
    monkeypatch.setattr(
        trl.trainer.grpo_trainer, "pad", lambda *args, **kwargs: pad(*args, **(kwargs | {"padding_side": "right"}))
    )
    faulty = short.train(name, "tokenizer_right")
    monkeypatch.undo()
    check_seen(short, "tokenizer_side", name, faulty)


@pytest.mark.slow
def test_processes_that_keep_their_gradients_are_seen(short):
    for name, run in short.on_two_processes("--alone").items():
        check_seen(short, "processes", name, run)
