"""A key or option with a fixed set of values refuses every other before anything is loaded, and lists them."""

import argparse
import enum
import typing

import pytest

from fdiv.catalog import EVAL_COMMANDS, EVALUATIONS, METHODS, TASKS
from fdiv.errors import RecipeError
from fdiv.recipe.schema import coerce, method_config, section_of, trl_configs

METHODS_TRIED = ("f_dpo", "d2o", "f_dpg", "dph", "flat")
# Keys that their libraries declare as free text.
FIXED = {
    "f_dpo": ("truncation_mode", "report_to", "torch_compile_mode", "log_level", "train_sampling_strategy"),
    "d2o": ("anchor_source", "vllm_mode", "vllm_model_impl", "cache_implementation"),
    "f_dpg": ("z_estimate", "baseline", "proposal", "vllm_mode"),
    "dph": (
        "loss_type", "scale_rewards", "importance_sampling_level", "multi_objective_aggregation", "level",
        "vllm_importance_sampling_mode", "rehearsal_weighting",
    ),
    "flat": ("template_source", "retain_term", "retain_level", "packing_strategy"),
}  # fmt: skip


def literals(hint):
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return tuple(member.value for member in hint)
    return ()


def sections():
    for method in METHODS_TRIED:
        for config in (method_config(METHODS.find(method)), *trl_configs()):
            yield method, section_of(config)
    for table in (EVALUATIONS, TASKS):
        for name in table:
            yield name, section_of(table.find(name))


@pytest.mark.parametrize("word", ["nonsense", "", "None "])
def test_a_wrong_value_of_any_such_key_lists_the_right_ones(word):
    tried = set()
    for owner, section in sections():
        for key in section.keys.values():
            allowed = key.choices or literals(key.type)
            if not allowed:
                continue
            with pytest.raises(RecipeError) as caught:
                coerce(word, key, "recipe.yaml")
            assert repr(key.name) in str(caught.value)
            assert all(str(choice) in str(caught.value) for choice in allowed)
            for choice in allowed:
                if type(choice) in typing.get_args(key.type) or type(choice) is key.type:
                    assert coerce(choice, key, "recipe.yaml") == choice
            tried.add((owner, key.name))
    assert {(method, key) for method, keys in FIXED.items() for key in keys} <= tried
    assert ("tofu", "padding_side") in tried or len(tried) > 50


@pytest.mark.parametrize("names", [["wandb", "nonsense"], ["nonsense"]])
def test_a_list_is_checked_entry_by_entry(names):
    key = section_of(method_config(METHODS.find("f_dpo"))).keys["report_to"]
    with pytest.raises(RecipeError, match="'report_to' must be one of none, all, .*wandb"):
        coerce(names, key, "recipe.yaml")
    assert coerce(["wandb", "tensorboard"], key, "recipe.yaml") == ["wandb", "tensorboard"]
    assert coerce("none", key, "recipe.yaml") == "none"


OPTIONS = {
    "passk": {"unscored": "leave_out", "chat_template": "never", "backend": "vllm"},
    "tofu": {"padding_side": "left", "chat_template": "never", "backend": "vllm", "dtype": "bfloat16"},
    "muse": {"padding_side": "left", "chat_template": "never", "backend": "vllm"},
    "preferences": {"dtype": "float16"},
    "lm_eval": {"dtype": "float16", "batch_size": "auto"},
}


@pytest.mark.parametrize(("verb", "option"), [(verb, option) for verb, found in OPTIONS.items() for option in found])
def test_options_of_verbs(verb, option, capsys):
    parser = argparse.ArgumentParser()
    EVAL_COMMANDS.find(verb).add_arguments(parser)
    known = parser._option_string_actions[f"--{option}"]
    right = OPTIONS[verb][option]
    assert (known.type or str)(right) == right and (known.choices is None or right in known.choices)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--{option}", "nonsense"])
    assert right in capsys.readouterr().err


def test_options_of_presample(capsys):
    from fdiv.rl.presample import command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    for option, right in (("wrong", "explore"), ("backend", "server")):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--{option}", "nonsense"])
        assert right in capsys.readouterr().err
