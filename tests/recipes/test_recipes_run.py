"""Every packaged recipe is read by the real parser, and trains two steps on a tiny stand-in model."""

import json
import math
from pathlib import Path

import pytest

from fdiv.memory.accelerate import accelerate_config
from fdiv.recipe.document import read_document
from fdiv.recipe.dump import resolved_yaml
from fdiv.recipe.load import load_recipe, packaged_recipes, recipe_name
from fdiv.run.run import plan_run, run_recipe
from fdiv.run.sweep import plan_sweep
from tests.support.stand_in import stand_in_recipe

RECIPES = packaged_recipes()


def test_the_list_of_recipes_is_every_yaml_file(repository):
    files = {path for path in (repository / "recipes").rglob("*.yaml") if path.parent.name != "accelerate"}
    runnable = {path for path in files if "method" in read_document(path).values}
    assert {path.resolve() for path in RECIPES.values()} == {path.resolve() for path in runnable}
    assert all(path.stem == "base" or path.stem.endswith("_base") for path in files - runnable)
    assert "tiny/f_dpo" in RECIPES
    for name, path in RECIPES.items():
        assert recipe_name(path) == name


@pytest.mark.parametrize("name", RECIPES)
def test_parses_with_the_real_parser(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FDIV_SHARED", "/shared")
    first_line = RECIPES[name].read_text().splitlines()[0]
    assert first_line.startswith("# "), "the first line says what the recipe does: `fdiv recipes` shows it"
    recipe = load_recipe(name)
    training = plan_run(recipe, {"prepare": "/prepared"}).configs.training
    assert "trust_remote_code" not in recipe.stated
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(resolved_yaml(recipe))
    again = load_recipe(resolved)
    again = plan_run(again, {"prepare": "/prepared"})
    assert again.configs.training.to_dict() == training.to_dict()
    if recipe.sweep:
        assert list(plan_sweep(name, ["--output_dir", str(tmp_path / "sweep")]).cells())


@pytest.mark.parametrize("name", RECIPES)
def test_trains_two_steps_on_a_stand_in(name, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("FDIV_SHARED", str(tmp_path / "nothing"))  # a path that was not replaced is an error
    recipe = stand_in_recipe(RECIPES[name], tiny_model_dir, tmp_path)
    result = run_recipe(recipe, f"fdiv run {name}")
    assert result["steps"] == 2
    assert math.isfinite(result["train/loss"])
    assert math.isfinite(result["train/grad_norm"])
    history = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]
    saved = {path.name for path in (tmp_path / "out").iterdir()}
    assert saved & {"model.safetensors", "adapter_model.safetensors"}
    stated = read_document(RECIPES[name]).values
    for key in ("method", "beta", "divergence", "learning_rate", "seed"):
        if key in stated:
            used = {"method": recipe.method_name}.get(key, recipe.stated.get(key))
            assert used == stated[key], f"the stand-in changed {key}"


def test_packaged_accelerate_configurations(repository):
    files = list((repository / "recipes" / "accelerate").glob("*.yaml"))
    assert {path.stem for path in files} >= {"single"}
    for path in files:
        assert accelerate_config(path.stem).resolve() == path.resolve()
        assert accelerate_config(str(path)) == Path(path)
        assert {"distributed_type", "num_processes"} <= set(read_document(path).values)
