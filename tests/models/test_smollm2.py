"""Two steps of the five papers' trainers and of three unlearning methods on a real pretrained model, full and LoRA."""

import json
import math
import shutil
from pathlib import Path

import pytest

from fdiv.models.fetch import FetchError, fetch
from fdiv.recipe.load import packaged_recipes
from fdiv.run.run import run_recipe
from tests.support.stand_in import stand_in_recipe

pytestmark = pytest.mark.slow

NAME = "smollm2-135m-instruct"
RECIPES = {
    "f_dpo": "alignment/f_dpo_hh_pythia_2.8b",
    "d2o": "alignment/d2o_pku_safe_rlhf_alpaca_7b",
    "f_dpg": "alignment/f_dpg_gpt2_sentiment",
    "flat": "tofu/llama_3.2_1b_flat",
    "dph": "rl/dph_math_qwen2.5_7b",
    "npo": "tofu/llama_3.2_1b_npo",
    "simnpo": "tofu/llama_3.2_1b_simnpo",
    "grad_diff": "tofu/llama_3.2_1b_grad_diff",
}
OFFLINE = ("f_dpo", "flat", "npo", "simnpo", "grad_diff")
"""Methods that train on given rows: with a fresh adapter, which changes nothing yet, they begin with the same loss."""
SHORT = {"d2o": {"max_completion_length": 8}}
"""What only costs time and is not cut on a tiny stand-in."""
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return fetch(NAME)[0]
    except FetchError as error:
        pytest.skip(f"{NAME} is not at hand: {error}")


@pytest.mark.parametrize("method", RECIPES)
def test_two_steps_full_and_lora(method, smollm2, tmp_path):
    """The recipe names the model by its packaged name. Every weight, then an adapter alone, gets a finite gradient."""
    first = {}
    for mode, settings in (("full", {"use_peft": False}), ("lora", LORA)):
        folder = tmp_path / mode
        folder.mkdir()
        changes = {"model_name_or_path": NAME, "eval": None, "gradient_checkpointing": False, **settings}
        changes |= SHORT.get(method, {})
        recipe = stand_in_recipe(packaged_recipes()[RECIPES[method]], smollm2, folder, changes)
        result = run_recipe(recipe, f"test of {method}")
        assert (result["method"], result["steps"]) == (method, 2)
        lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "grad_norm" in line]
        assert [line["step"] for line in steps] == [1, 2]
        assert all(math.isfinite(line["loss"]) and 0 < line["grad_norm"] < math.inf for line in steps)
        saved = {path.name for path in (folder / "out").iterdir()}
        assert ("adapter_model.safetensors" in saved) == (mode == "lora")
        assert ("model.safetensors" in saved) == (mode == "full")
        first[mode] = steps[0]["loss"]
        shutil.rmtree(folder)  # 540 MB of weights
    if method == "f_dpo":
        assert first["full"] == pytest.approx(math.log(2), abs=1e-4)  # policy and reference are one
    if method in OFFLINE:
        assert first["lora"] == pytest.approx(first["full"], rel=1e-3, abs=1e-4)
