"""Nonsense for every numeric and every choice key of every method, and of every block: the dry run refuses it in one
line, or it stands in a list of values that are valid."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import typing
import zlib

import pytest

from fdiv.bounds import Declaration, fault
from fdiv.catalog import EVALUATIONS, METHODS, TASKS, load
from fdiv.errors import RecipeError
from fdiv.recipe.check import BLOCKS, block_section, top_section
from fdiv.recipe.load import load_recipe
from fdiv.recipe.schema import _members, _options
from fdiv.run.plan import plan_run

NAN, INF = float("nan"), float("inf")
# No number, or none that a machine computes with: never valid for a number.
NO_NUMBER = [
    NAN,
    INF,
    -INF,
    1e300,
    -1e300,
    10**30,
    -(10**30),
    True,
    False,
    "abc",
    "",
    "nan",
    [],
    [1],
    [[]],
    {},
    {"a": 1},
]
SMALL = [-1, 0, -0.5, None]
NO_CHOICE = ["no such choice", "", "NONE ", 3, -1, NAN, True, [], [[]], {}, {"a": 1}]

# Numbers that are valid at 0, at -1, below 0 or at null. What is not listed has to be refused there.
ZERO = {
    "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "label_smoothing_factor", "eval_delay",
    "dataloader_num_workers", "router_aux_loss_coef", "local_rank", "ref_model_mixup_alpha", "label_smoothing",
    "lora_dropout", "seed", "data_seed", "top_k", "min_p", "rehearsal_coefficient", "retain_weight", "forget_weight",
    "text_prompt_tokens", "template_temperature", "delta", "vllm_importance_sampling_clip_min", "online_start_step",
    "z_floor", "log_z", "harmful_above", "skip_first", "layer", "epsilon", "epsilon_high", "entropy_coef",
    "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target", "num_generations", "beta",
    "beta1", "beta2", "proposal_margin", "steering_coefficient", "retain_epsilon", "dual_warmup_epochs", "dual_step",
    "kl_coefficient", "min_used_fraction", "on_policy_share", "reward_threshold",
}  # fmt: skip
MINUS_ONE = {"max_steps", "local_rank", "log_z", "harmful_above", "delta", "reward_threshold"}
NEGATIVE = {"log_z", "harmful_above", "delta", "reward_threshold"}

BASE = "model_name_or_path: x\ndataset_name: y\noutput_dir: runs/nonsense\n"
NEEDED = {
    "pdu": "retain_epsilon: 0.3\n",
    "f_dpg": "target: {name: filter, scorers: [{name: compiles}]}\n",
    "dph": "reward: math\n",
}
# One method of each TRL class has all inherited keys; of the others only their own are tried.
WHOLE = ("f_dpo", "dph", "npo", "f_distill")


def numeric(key):
    return bool({int, float} & set(_options(key.type)))


def choices(key):
    if key.name == "trackio_static_space_id":  # a name of its own, or false
        return False
    literal = any(typing.get_origin(option) is typing.Literal for option in _options(key.type))
    return bool(key.choices or _members(key.type) or literal)


def keys_of(method):
    config = METHODS.find(method)
    inherited = {
        name
        for other in config.config_class.__mro__
        if "fdiv" not in other.__module__
        for name in vars(other).get("__dataclass_fields__", ())
    }
    for name, key in top_section(config).keys.items():
        if name not in BLOCKS and (numeric(key) or choices(key)) and (method in WHOLE or name not in inherited):
            yield name, key


def declared_in(config):
    """The declarations of a config's own options, by name."""
    helps = {entry.name: entry.metadata.get("help") for entry in dataclasses.fields(config)}
    return {name: text for name, text in helps.items() if isinstance(text, Declaration)}


def tried(key, declared=None):
    """Nonsense for one key, and whether each must be refused; what an option of ours declares is valid."""
    kinds = _options(key.type)
    if choices(key) and not numeric(key):
        for value in NO_CHOICE:
            valid = (
                value in (key.choices or ())
                or (value is True and bool in kinds)
                or (value == [] and list in map(typing.get_origin, kinds))
            )
            yield value, None if valid else True
        return
    for value in NO_NUMBER:
        takes_text = isinstance(value, str) and str in kinds
        large = type(value) is int and abs(value) > 2**63 and float in kinds  # 1e30 is a number, above 0 or not
        yield value, None if takes_text or large else True
    for value in SMALL:
        fraction = value == -0.5
        valid = (
            type(None) in kinds if value is None
            else fault(value, kinds, declared) is None if declared is not None
            else key.name in ZERO if value == 0
            else key.name in NEGATIVE and float in kinds if fraction
            else key.name in MINUS_ONE
        )  # fmt: skip
        yield value, (None if valid else True)  # None: either


def sampled(values, part):
    """The cases of one part of twelve, the same in every run."""
    return [case for case in values if part is None or zlib.crc32(repr(case[:2]).encode()) % 12 == part]


def check(path, settings):
    """The refusal of the dry run in one line; None where it accepts."""
    try:
        plan_run(load_recipe(path, settings=settings))
    except RecipeError as error:
        line = str(error)
        assert "\n" not in line and len(line) < 1_000, settings
        (name, _), *_ = settings.items()
        assert name.split(".")[-1] in line, f"{settings}: the key is not named: {line}"
        return line
    return None


def cases_of(method):
    declared = declared_in(METHODS.find(method).config_class)
    for name, key in keys_of(method):
        for value, refused in tried(key, declared.get(name)):
            yield name, value, refused


def run_cases(path, cases):
    accepted = []
    for name, value, refused in cases:
        line = check(path, {name: value})
        if refused is not None and (line is None) == refused:
            accepted.append((name, value, line))
    assert not accepted


def write(tmp_path, method):
    path = tmp_path / f"{method}.yaml"
    path.write_text(f"method: {method}\n{BASE}{NEEDED.get(method, '')}")
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", sorted(METHODS))
def test_nonsense_is_refused_by_the_dry_run_sample(method, tmp_path):
    path = write(tmp_path, method)
    assert check(path, {"seed": 1}) is None
    run_cases(path, sampled(cases_of(method), 0 if method in WHOLE else 1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", sorted(METHODS))
def test_nonsense_is_refused_by_the_dry_run(method, tmp_path):
    run_cases(write(tmp_path, method), list(cases_of(method)))


# ---------------------------------------------------------------- blocks
# What a block needs to be made at all.
GIVEN = {
    "rehearsal": {"model": "x", "dataset": "y", "reward": "math"},
    "novels_unlearning": {"data": "x", "forget_novels": ["a"], "retain_novels": ["b"]},
    "sampled_preferences": {"model": "x", "prompts": [f"Say {number}." for number in range(40)]},
    "tofu_memorised": {"model": "x", "data": "y"},
    "taught": {"model": "x", "dataset": "y"},
    "own_rows": {"forget": "rows.jsonl"},
    "tofu_distillation": {"teacher": "x", "data": "y"},
    "benchmark": {"data": "tofu"},
    "lm_eval": {"tasks": ["wmdp_cyber"]},
    "thinned_student": {"teacher": "x", "data": "y", "train_novels": ["a"], "test_novels": ["b"]},
}
# Valid at 0, at -1, below 0 or at null, as above.
BLOCK_ZERO = {
    "slips", "base_scale", "reward_scale", "malformed_reward", "validation_fraction", "num_samples", "num_prompts",
    "harmful_above", "temperature", "seed", "min_used_fraction", "validation_prompts", "reward_threshold", "skip_tasks",
    "attack_seed", "num_fewshot", "samples", "sample_retain", "easy_problems", "share_rows",
}  # fmt: skip
BLOCK_NEGATIVE = {"malformed_reward", "harmful_above", "reward_threshold"}
TABLES = [("prepare", name, path) for name, path in TASKS.items()] + [
    ("eval", name, path) for name, path in EVALUATIONS.items()
]


def block_cases(title, name, path):
    for key in block_section(title, name, load(path)).keys.values():
        kinds = _options(key.type)
        if numeric(key):
            for value in NO_NUMBER:
                takes = (isinstance(value, str) and str in kinds) or (type(value) is int and float in kinds)
                yield f"{title}.{key.name}", value, None if takes else True
            for value in SMALL:
                valid = (
                    type(None) in kinds if value is None
                    else key.name in BLOCK_ZERO if value == 0
                    else key.name in BLOCK_NEGATIVE
                )  # fmt: skip
                yield f"{title}.{key.name}", value, None if valid else True
        elif choices(key):
            yield from ((f"{title}.{key.name}", value, True) for value in NO_CHOICE)


def block_recipe(title, name, path, tmp_path):
    keys = block_section(title, name, load(path)).keys.values()
    values = {key.name: "x" for key in keys if key.required} | GIVEN.get(name, {})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: f_dpo\n{BASE}{title}: {json.dumps({**values, 'name': name})}\n")
    return recipe


def short(part):
    return "" if ":" in part else part


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("title", "name", "path"), TABLES, ids=short)
def test_nonsense_in_a_block_is_refused_sample(title, name, path, tmp_path):
    recipe = block_recipe(title, name, path, tmp_path)
    assert check(recipe, {"seed": 1}) is None
    run_cases(recipe, sampled(block_cases(title, name, path), 2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("title", "name", "path"), TABLES, ids=short)
def test_nonsense_in_a_block_is_refused(title, name, path, tmp_path):
    run_cases(block_recipe(title, name, path, tmp_path), list(block_cases(title, name, path)))


NAMES = [
    ("f_dpo", "eval.require", {"nope": "improved"}, "no metric 'nope'"),
    ("f_dpo", "eval.require", {"reward_acuracy": "improved"}, "did you mean 'reward_accuracy'"),
    ("f_dpo", "eval.summary", ["reward_accuracy", "nope"], "no metric 'nope'"),
    ("f_dpo", "eval.summary", "nope", "no metric 'nope'"),
    ("f_dpo", "eval.split", "tets", "no split 'tets'"),
    ("f_dpo", "eval.split", "", "no split ''"),
    ("f_dpo", "eval.name", "nope", "unknown `eval.name` 'nope'"),
    ("npo", "epoch_evaluation", "tofu", "give a mapping with a name"),
    ("npo", "epoch_evaluation", {"name": "tofuu"}, "did you mean 'tofu'"),
    ("npo", "epoch_evaluation", {"name": "tofu", "data": {1: 2}}, "'data' must be text"),
    ("npo", "epoch_evaluation", {"name": "tofu", "gradnorm": " "}, "'gradnorm' must be true or false"),
    ("npo", "epoch_evaluation", {"name": "tofu", "batch_size": NAN}, "must be without NaN"),
    ("npo", "epoch_evaluation", {"name": "tofu", "batch_size": 0}, "batch_size=0: must be at least 1"),
    ("npo", "epoch_evaluation", {"name": "tofu", "max_item": 3}, "did you mean 'max_items'"),
    ("npo", "epoch_evaluation", {"name": "tofu", "split": "forget11"}, "did you mean 'forget"),
    ("npo", "epoch_evaluation", {"name": "muse", "data": "x", "padding_side": "up"}, "padding_side"),
    ("npo", "epoch_evaluation", {"max_items": 3}, "epoch_evaluation: unknown evaluation None"),
    ("npo", "epoch_evaluation", {"name": ["tofu"]}, "epoch_evaluation: unknown evaluation ['tofu']"),
    ("npo", "epoch_evaluation", [], "epoch_evaluation"),
    ("npo", "epoch_evaluation", 3, "epoch_evaluation"),
    ("dph", "reward", "bogus", "unknown reward 'bogus'"),
    ("dph", "reward", {"name": "code"}, "allow_execution: true"),
    ("dph", "reward", {"name": "code", "allow_execution": "yes please"}, "'allow_execution' must be true or false"),
    ("dph", "reward", {"name": "math", "time_limit": -1}, "time_limit=-1"),
    ("dph", "reward", {"name": "math", "time_limit": NAN}, "without NaN"),
    ("dph", "reward", {"name": "math", "time_limit": "x"}, "'time_limit' must be a number"),
    ("dph", "reward", {"name": "math", "answers": "boxes"}, "'answers' must be boxed or any"),
    ("dph", "reward", {"name": "math", "workers": 0}, "workers=0"),
    ("dph", "reward", {"name": "math", "failure_limit": 2}, "failure_limit=2"),
    ("dph", "reward", {"name": "math", "glod": "x"}, "no argument 'glod'"),
    ("dph", "reward", {"name": "sql"}, "database"),
    ("dph", "reward", {"name": "contains_words"}, "words"),
    ("dph", "reward", {}, "unknown reward None"),
    ("dph", "reward", [], "reward"),
    ("dph", "loss_type", "ppo", "must be one of dapo"),
    ("dph", "generation_kwargs", {"temprature": 2}, "did you mean 'temperature'"),
    ("dph", "generation_kwargs", {"top_p": 3}, "top_p"),
    ("f_dpo", "lr_scheduler_kwargs", {"num_cycles": "x"}, "lr_scheduler_kwargs"),
    ("f_dpo", "lr_scheduler_kwargs", {"num_cycles": NAN}, "lr_scheduler_kwargs"),
    ("f_dpo", "optim_args", "momentum", "optim_args"),
    ("f_dpo", "report_to", "nope", "report_to"),
    ("f_dpo", "report_to", ["tensorboard", "nope"], "report_to"),
    ("f_dpo", "attn_implementation", "sdap", "did you mean 'sdpa'"),
    ("f_dpo", "accelerator_config", "no/such/file.json", "accelerator_config"),
    ("f_dpo", "deepspeed", "no/such/file.json", "deepspeed"),
    ("f_dpo", "lora_task_type", "SEQ_CLS", "must be CAUSAL_LM"),
]
EXTRA = {
    "f_dpo": "lr_scheduler_type: cosine\neval: {name: preferences}\n",
    "npo": "eval_strategy: epoch\n",
    "dph": "reward: math\n",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "key", "value", "expected"), NAMES)
def test_names_and_mappings_that_the_run_would_refuse(method, key, value, expected, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"method: {method}\n{BASE}{EXTRA[method]}")
    assert check(path, {"seed": 1}) is None
    with pytest.raises(RecipeError) as caught:
        plan_run(load_recipe(path, settings={key: value}))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ("{divergence: [[]]}", "divergence"),
        ("{seed: [[]]}", "'seed' must be a whole number"),
        ("{seed: [0, -1]}", "seed=-1: must be at least 0"),
        ("{beta: [x]}", "'beta' must be a number"),
        ("{beta: [.nan]}", "beta=nan: must be a finite number"),
        ("{learning_rate: [1e-5, 0]}", "learning_rate=0.0: must be above 0"),
        ("{eval.batch_size: [0]}", "batch_size=0"),
        ("{eval.batch_sise: [1]}", "batch_sise"),
        ("{divergence: [reverse_kl, total_variation]}", "total_variation"),
        ("{seed: [0], metrics: {reward: nope}}", "`sweep.metrics`: no metric 'nope'"),
        ("{seed: [0], table: {reward_acuracy: {}}}", "did you mean 'reward_accuracy'"),
        ("{seed: [0], minutes: .nan}", "`sweep.minutes` must be a number"),
        ("{seed: [0], screen: {key: beta, values: [0.1], metric: train/los}}", "did you mean"),
    ],
)
def test_the_dry_run_looks_into_the_sweep(sweep, expected, write_recipe, fails):
    path = write_recipe(f"eval: {{name: preferences}}\nsweep: {sweep}\n")
    for verb in ("run", "sweep"):
        assert expected in fails(verb, path, "--dry_run"), verb


def test_an_error_names_the_line_or_the_command_line(write_recipe, fails):
    path = write_recipe("adam_beta1: 2\n")
    line = len(path.read_text().splitlines())
    assert fails("run", path) == f"fdiv: {path}, line {line}: adam_beta1=2.0: must be at least 0 and below 1"
    path = write_recipe()
    said = fails("run", path, "--warmup_steps", "-1", "--dry_run")
    assert said == "fdiv: command line: warmup_steps=-1.0: must be at least 0 and at most 2.14748e+09"


def test_a_python_user_meets_the_same_bounds(tmp_path):
    from fdiv.alignment import FDPOConfig

    for key, value in {
        "learning_rate": -1.0,
        "adam_beta1": math.nan,
        "max_steps": 0,
        "num_train_epochs": True,
    }.items():
        with pytest.raises(ValueError, match=f"^{key}="):
            FDPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{key: value})


# ---------------------------------------------------------------- values at the edge are run
EDGES = [
    {"learning_rate": 1e6}, {"learning_rate": 1e-30}, {"weight_decay": 1e3}, {"warmup_steps": 0.5}, {"adam_beta1": 0},
    {"adam_beta2": 0}, {"adam_epsilon": 1e3}, {"max_grad_norm": 0}, {"max_grad_norm": 1e30}, {"beta": 1e30},
    {"beta": 1e-30}, {"max_exponent": 1e-6}, {"logging_steps": 0.5}, {"save_strategy": "steps", "save_steps": 0.5},
    {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}, {"eval_strategy": "steps", "eval_steps": 0.5},
    {"eval_strategy": "steps", "eval_delay": 2**31 - 1}, {"seed": 2**32 - 1}, {"data_seed": 0}, {"max_steps": 1},
    {"max_steps": -1, "num_train_epochs": 1e-9}, {"max_steps": -1, "num_train_epochs": 0.5}, {"max_length": 1},
    {"max_length": None}, {"pad_to_multiple_of": 4096, "max_length": 8}, {"per_device_train_batch_size": 2**20},
    {"per_device_train_batch_size": 2**20, "dataloader_drop_last": True}, {"gradient_accumulation_steps": 64},
    {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1}, {"dataset_num_proc": 4_096},
    {"use_peft": True, "lora_r": 1, "lora_alpha": 1, "lora_dropout": 0.99}, {"neftune_noise_alpha": 1e6},
    {"use_peft": True, "lora_target_modules": ["no_such_module"]}, {"optim": "sgd"}, {"optim": "adafactor"},
    {"lr_scheduler_type": "constant"}, {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 1e3}},
    {"ece_bins": 2**20}, {"torch_empty_cache_steps": 1}, {"label_smoothing_factor": 0.5}, {"router_aux_loss_coef": 0},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keys", EDGES, ids=str)
def test_what_the_dry_run_accepts_trains_or_says_in_one_line_why_not(keys, write_recipe, tmp_path, capfd, monkeypatch):
    from fdiv.cli import main

    # A library's handler may still hold the stderr of an earlier test, which pytest has closed.
    monkeypatch.setattr(logging, "raiseExceptions", False)

    path = write_recipe(**{**keys, "max_length": keys.get("max_length", 64)})
    if keys.get("max_length", 1) is None:
        path.write_text(path.read_text() + "max_length: null\n")
    assert check(path, {"ece_bins": keys.get("ece_bins", 10)}) is None
    capfd.readouterr()
    code = main(["run", str(path)])
    said = capfd.readouterr().err
    assert "Traceback" not in said
    if code == 0:
        result = json.loads((tmp_path / "out" / "result.json").read_text())
        assert result["steps"] >= 1 and math.isfinite(result["train/loss"])
    else:
        assert said.splitlines()[-1].startswith("fdiv: ") and len(said.splitlines()[-1]) <= 1_010
