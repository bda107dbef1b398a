"""What `make test-matrix` runs with every tested set of versions: each objective learns, and goes on where it was cut."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import Trainer

from tests.support.runs import unlearning
from tests.support.runs.all_trainers import EVERY, build, flat_weights, losses

pytestmark = pytest.mark.smoke

SETTINGS = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "max_steps": 2}


def moved(trainer, start: torch.Tensor) -> None:
    """Two finite losses, and finite weights other than at the start."""
    end = flat_weights(trainer)
    assert len(losses(trainer)) == 2 and all(map(math.isfinite, losses(trainer)))
    assert torch.isfinite(end).all() and (end - start).abs().max() > 1e-5


@pytest.mark.parametrize("name", EVERY)
def test_two_steps_and_the_second_again(name, tiny_model_dir, tmp_path):
    whole = build(name, tiny_model_dir, tmp_path / "run", **SETTINGS)
    start = flat_weights(whole)
    whole.train()
    moved(whole, start)
    resumed = build(name, tiny_model_dir, tmp_path / "run", **SETTINGS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert losses(resumed) == losses(whole)
    assert torch.equal(flat_weights(resumed), flat_weights(whole))


@pytest.mark.parametrize("method", unlearning.METHODS)
def test_two_steps_of_every_unlearning_method(method, tiny_model_dir, tmp_path):
    trainer = unlearning.make_trainer(method, unlearning.load(tiny_model_dir), tmp_path, max_steps=2)
    start = flat_weights(trainer)
    trainer.train()
    moved(trainer, start)


def second_adapter_alone(self, folder, model=None):
    """Trainer's loading in transformers below 5.18, where a checkpoint holds `default` and another adapter."""
    model = self.accelerator.unwrap_model(self.model)
    (second,) = [path.parent for path in Path(folder).glob("*/adapter_config.json")]
    model.load_adapter(str(second), second.name)
    model.set_adapter("default")


@pytest.mark.parametrize(("name", "older"), [("f_dpo", False), ("f_dpg", False), ("flat", False), ("flat", True)])
def test_a_continued_adapter_goes_on_from_its_checkpoint(name, older, tiny_model_dir, tmp_path, monkeypatch):
    """Its frozen start is a second adapter; both come back, whatever Trainer loads of them."""
    if older:
        monkeypatch.setattr(Trainer, "_load_from_checkpoint", second_adapter_alone)
    torch.manual_seed(0)
    made = PeftModel(
        unlearning.load(tiny_model_dir), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    made.save_pretrained(tmp_path / "adapter")

    def trainer():
        from tests.support.runs import f_dpg, f_dpo

        model = PeftModel.from_pretrained(unlearning.load(tiny_model_dir), tmp_path / "adapter", is_trainable=True)
        options = {"learning_rate": 1e-2, **SETTINGS}
        if name == "f_dpo":
            pairs = Dataset.from_list(f_dpo.preference_rows(8))
            return f_dpo.make_trainer(tiny_model_dir, pairs, tmp_path / "run", model=model, **options)
        if name == "f_dpg":
            return f_dpg.trainer(model, tmp_path / "run", f_dpg.SOFT, **options)
        rows = {"tokenizer": unlearning.load_tokenizer(tiny_model_dir), "retain_term": "divergence"}
        return unlearning.make_trainer("FLAT", model, tmp_path / "run", **rows, **options)

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert losses(resumed) == losses(whole)
    assert torch.equal(flat_weights(resumed), flat_weights(whole))
