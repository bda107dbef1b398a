"""What `prepare:` builds is built by one process while the others wait: nothing in it may take part in their group."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from fdiv.errors import RecipeError
from fdiv.inference.processes import process_state
from fdiv.run.plan import prepare


@pytest.fixture
def zero3():
    kept = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # held weakly: it lives as long as `kept`
    assert is_deepspeed_zero3_enabled()
    yield kept
    unset_hf_deepspeed_config()


@dataclass
class Builder:
    model: str
    seen: list[Any] = field(default_factory=list)

    def build(self, folder: Path) -> dict[str, Any]:
        model = AutoModelForCausalLM.from_pretrained(self.model)
        whole = all(parameter.numel() and not hasattr(parameter, "ds_id") for parameter in model.parameters())
        state = process_state()
        self.seen.append((whole, is_deepspeed_zero3_enabled(), state.num_processes, state.is_main_process))
        raise ValueError("no rows")


def test_models_of_a_build_are_whole_and_the_configuration_comes_back(zero3, tiny_model_dir, tmp_path):
    builder = Builder(str(tiny_model_dir))
    block = SimpleNamespace(name="whole", where="recipe.yaml, line 3", instance=lambda variables: builder)
    with pytest.raises(RecipeError, match=r"line 3: prepare \(whole\): no rows"):
        prepare(SimpleNamespace(recipe=SimpleNamespace(prepare=block), variables={}), tmp_path)
    assert builder.seen == [(True, False, 1, True)]
    assert is_deepspeed_zero3_enabled() and zero3.is_zero3()
