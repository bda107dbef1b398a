"""What `prepare:` builds is built by one process while the others wait: nothing in it may take part in their group."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from fdiv.inference.processes import process_state
from fdiv.recipe.prepared import build_once


@pytest.fixture
def zero3():
    kept = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # held weakly: it lives as long as `kept`
    assert is_deepspeed_zero3_enabled()
    yield kept
    unset_hf_deepspeed_config()


@dataclass
class Builder:
    model: str
    seen: ClassVar[list[Any]] = []

    def build(self, folder: Path) -> dict[str, Any]:
        model = AutoModelForCausalLM.from_pretrained(self.model)
        whole = all(parameter.numel() and not hasattr(parameter, "ds_id") for parameter in model.parameters())
        state = process_state()
        self.seen.append((whole, is_deepspeed_zero3_enabled(), state.num_processes, state.is_main_process))
        if "fails" in str(folder.parent):
            raise ValueError("no rows")
        return {"dataset_name": str(folder)}


def test_models_of_a_build_are_whole_and_the_configuration_comes_back(zero3, tiny_model_dir, tmp_path):
    Builder.seen.clear()
    folder, keys = build_once("whole", Builder(str(tiny_model_dir)), tmp_path)
    assert Builder.seen == [(True, False, 1, True)]
    assert keys == {"dataset_name": str(folder)}
    assert is_deepspeed_zero3_enabled() and zero3.is_zero3()


def test_it_comes_back_after_a_failure_too(zero3, tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        build_once("whole", Builder(str(tiny_model_dir)), tmp_path / "fails")
    assert is_deepspeed_zero3_enabled()
