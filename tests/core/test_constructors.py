"""Trainers of all five families are built alike: `args=None` works, and what the caller passed stays unchanged."""

from __future__ import annotations

import copy

import pytest
from datasets import Dataset

from fdiv.alignment import D2OConfig, D2OTrainer, FDPGConfig, FDPGTrainer, FDPOConfig, FDPOTrainer
from fdiv.rl import DPHConfig, DPHTrainer
from fdiv.unlearning import FLATConfig, FLATTrainer

ROWS = {
    "prompt": ["The sky is", "Grass is"],
    "chosen": [" blue.", " green."],
    "rejected": [" red.", " pink."],
    "question": ["What is the sky?", "What is grass?"],
    "answer": ["Blue.", "Green."],
}


def _length(completions, **_):
    return [float(len(text)) for text in completions]


@pytest.fixture(scope="module")
def roomy(tmp_path_factory):
    """A tiny model whose context holds the default completion length."""
    from fdiv.models.tiny import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("roomy") / "roomy", max_positions=1024)


FAMILIES = {
    "f_dpo": (FDPOTrainer, FDPOConfig, ("prompt", "chosen", "rejected"), {}),
    "d2o": (D2OTrainer, D2OConfig, ("prompt", "rejected"), {}),
    "f_dpg": (FDPGTrainer, FDPGConfig, ("prompt",), {"target": {"name": "reward", "scorers": _length, "beta": 1.0}}),
    "flat": (FLATTrainer, FLATConfig, ("question", "answer"), {}),
    "dph": (DPHTrainer, DPHConfig, ("prompt",), {"reward_funcs": _length}),
}


def rows(columns):
    return Dataset.from_dict({name: ROWS[name] for name in columns})


@pytest.mark.parametrize("family", FAMILIES)
def test_without_args_the_defaults_of_the_config_hold(family, roomy, tmp_path, monkeypatch):
    trainer_class, config_class, columns, others = FAMILIES[family]
    monkeypatch.chdir(tmp_path)
    trainer = trainer_class(str(roomy), train_dataset=rows(columns), **others)
    assert type(trainer.args) is config_class
    assert trainer.args.output_dir == f"{roomy.name}-{trainer_class._name}"
    assert trainer.args.learning_rate == config_class("x", bf16=False, use_cpu=True).learning_rate


@pytest.mark.parametrize("family", FAMILIES)
def test_the_options_of_the_caller_are_not_touched(family, roomy, tmp_path):
    trainer_class, config_class, columns, others = FAMILIES[family]
    args = config_class(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    before = copy.deepcopy(args.to_dict())
    trainer = trainer_class(str(roomy), args=args, train_dataset=rows(columns), **others)
    assert args.to_dict() == before
    assert trainer.args is not args
    stated = {name: value for name, value in trainer.args.to_dict().items() if name in ("beta", "temperature")}
    assert stated == {name: before[name] for name in stated}


@pytest.mark.parametrize("family", FAMILIES)
def test_options_of_another_method_are_refused(family, roomy, tmp_path):
    trainer_class, config_class, columns, others = FAMILIES[family]
    other = FLATConfig if config_class is not FLATConfig else FDPOConfig
    args = other(str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(
        TypeError, match=f"args is a {other.__name__}: {trainer_class.__name__} needs an? {config_class.__name__}"
    ):
        trainer_class(str(roomy), args=args, train_dataset=rows(columns), **others)
