"""`RunPlan`: a recipe is resolved once and does not change."""

import dataclasses

import pytest

from fdiv.errors import RecipeError
from fdiv.recipe.load import load_recipe
from fdiv.run.run import plan_run, prepare


def test_a_recipe_is_frozen(write_recipe):
    recipe = load_recipe(write_recipe())
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.name = "other"
    for mapping in (recipe.stated, recipe.origins, recipe.machine):
        with pytest.raises(TypeError):
            mapping["seed"] = 1
    plan = plan_run(recipe)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.recipe = recipe
    with pytest.raises(TypeError):
        plan.settled["seed"] = 1


def test_keys_win_over_the_recipe_and_leave_it(write_recipe):
    plan = plan_run(load_recipe(write_recipe()))
    other = plan.with_keys(seed=11, model_init_kwargs={"dtype": "float32"})
    assert (other.configs.training.seed, other.configs.training.model_init_kwargs) == (11, {"dtype": "float32"})
    assert plan.configs.training.seed == 7
    assert other.recipe is plan.recipe


def test_prepare_settles_keys_below_the_stated_ones(tmp_path, monkeypatch):
    words = [
        "--output_dir",
        str(tmp_path / "out"),
        "--prepare.train_pairs_per_prompt",
        "1",
        "--prepare.sft_steps",
        "1",
    ]
    plan = plan_run(load_recipe("tiny/f_dpo", words))
    assert plan.variables == {"prepare": "${prepare}"}
    assert plan.configs.model.model_name_or_path is None
    ready = prepare(plan, tmp_path / "prepared")
    folder = ready.variables["prepare"]
    assert folder.startswith(str(tmp_path / "prepared"))
    assert ready.configs.model.model_name_or_path == ready.settled["model_name_or_path"]
    assert ready.settled["model_name_or_path"].startswith(folder)
    assert dict(plan.settled) == {}  # the first plan is as it was
    stated = plan_run(load_recipe("tiny/f_dpo", [*words, "--model_name_or_path", "mine"]))
    assert prepare(stated, tmp_path / "prepared").configs.model.model_name_or_path == "mine"


def test_a_plan_refuses_what_a_config_or_a_block_refuses(write_recipe):
    with pytest.raises(RecipeError, match="total_variation"):
        plan_run(load_recipe(write_recipe(), ["--divergence", "total_variation"]))
    text = "eval: {name: passk, n: 4, k: [8]}\n"
    with pytest.raises(RecipeError, match="k=8 is more than n=4"):
        plan_run(load_recipe(write_recipe(text)))


def test_the_start_is_not_measured_where_a_block_says_so(write_recipe, fails):
    recipe = load_recipe(write_recipe("eval: {name: preferences, before: false}\n"))
    assert recipe.evaluations[0].before is False
    message = fails("run", write_recipe("eval: {name: preferences, before: false, require: {x: improved}}\n"))
    assert "`require` compares with the start: leave out `before`" in message
