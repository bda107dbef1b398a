"""Values: YAML 1.2 types, coercion by the type of the key, precedence, ${NAME}, and the resolved recipe."""

import os

import pytest
import yaml

from fdiv.catalog import METHODS, load
from fdiv.cli.command import main
from fdiv.errors import RecipeError
from fdiv.recipe.check import all_keys
from fdiv.recipe.document import parse_value, read_document
from fdiv.recipe.dump import resolved_yaml
from fdiv.recipe.load import load_recipe
from fdiv.recipe.schema import CommandLineValue, coerce


def test_yaml_reads_numbers_and_words_as_yaml_1_2(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: 1e-4\nb: no\nc: 2024-01-01\nd: 1_000\ne: -2.5E+3\nf: .inf\ng: true\nh: ~\ni: 0123\nj: 1:30\n")
    assert read_document(path).values == {
        "a": 0.0001, "b": "no", "c": "2024-01-01", "d": 1000, "e": -2500.0, "f": float("inf"), "g": True, "h": None,
        "i": "0123", "j": "1:30",
    }  # fmt: skip
    assert parse_value("{name: alpha, alpha: 3e-1}") == {"name": "alpha", "alpha": 0.3}
    assert parse_value("a: b") == "a: b"
    assert parse_value("[1, x") == "[1, x"


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--learning_rate", "1e-4"], "learning_rate", 1e-4),
        (["--learning-rate=2e-4"], "learning_rate", 2e-4),
        (["--max_steps", "1e3"], "max_steps", 1000),
        (["--bf16", "false"], "bf16", False),
        (["--no_bf16"], "bf16", False),
        (["--gradient_checkpointing"], "gradient_checkpointing", True),
        (["--gradient_checkpointing", "no"], "gradient_checkpointing", False),
        (["--run_name", "12"], "run_name", "12"),
        (["--run_name", "a: b"], "run_name", "a: b"),
        (["--max_length", "null"], "max_length", None),
        (["--lora_target_modules", "q_proj", "v_proj"], "lora_target_modules", ["q_proj", "v_proj"]),
        (["--lora_target_modules", "[q_proj, v_proj]"], "lora_target_modules", ["q_proj", "v_proj"]),
        (["--loss_type", "sigmoid"], "loss_type", ["sigmoid"]),
        (["--report_to", "none"], "report_to", "none"),
        (["--resume_from_checkpoint", "true"], "resume_from_checkpoint", True),
        (["--resume_from_checkpoint", "a/b"], "resume_from_checkpoint", "a/b"),
        (["--pad_to_multiple_of", "8"], "pad_to_multiple_of", 8),
        (["--pad_to_multiple_of", "auto"], "pad_to_multiple_of", "auto"),
        (["--divergence", "{name: alpha, alpha: 0.3}"], "divergence", {"name": "alpha", "alpha": 0.3}),
        (["--divergence", '{"name": "alpha", "alpha": 0.3}'], "divergence", {"name": "alpha", "alpha": 0.3}),
        (["--divergence", "alpha", "--divergence.alpha", "0.3"], "divergence", {"name": "alpha", "alpha": 0.3}),
        (["--eval_strategy", "no"], "eval_strategy", "no"),
        (["--lr_scheduler_kwargs", "{num_cycles: 2}", "--lr_scheduler_type", "cosine"], "lr_scheduler_kwargs", {"num_cycles": 2}),
    ],
)  # fmt: skip
def test_command_line_values(write_recipe, words, key, value):
    stated = load_recipe(write_recipe(), words).stated[key]
    assert stated == value
    assert type(stated) is type(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate: fast\n", "'learning_rate' must be a number, got 'fast'"),
        ("learning_rate: true\n", "'learning_rate' must be a number, got True"),
        ("max_steps: 1.5\n", "'max_steps' must be a whole number, got 1.5"),
        ("bf16: maybe\n", "'bf16' must be true or false or null, got 'maybe'"),
        ("lora_target_modules: {a: 1}\n", "'lora_target_modules' must be a list of text or null, got {'a': 1}"),
        ("dtype: float33\n", "'dtype' must be one of auto, bfloat16, float16, float32, got 'float33'"),
        ("dataset_config: 3\n", "'dataset_config' must be text or null, got 3"),
        ("lr_scheduler_type: cosin\n", "names; did you mean 'cosine'?, got 'cosin'"),
        ("beta: -1\n", "beta=-1.0: must be above 0"),
        ("eval: {name: preferences, batch_size: 0}\n", "batch_size=0: must be at least 1"),
    ],
)
def test_wrong_values_are_one_line_before_anything_is_loaded(write_recipe, fails, text, expected):
    path = write_recipe(text, **dict.fromkeys(("learning_rate", "max_steps") if text[:3] in ("lea", "max") else ()))
    message = fails("run", path)
    assert expected in message
    assert str(path) in message


def test_strings_of_numbers_become_numbers(write_recipe):
    path = write_recipe('learning_rate: "3e-4"\nwarmup_steps: "5"\n', learning_rate=None)
    recipe = load_recipe(path)
    assert recipe.stated["learning_rate"] == 3e-4
    configs = recipe.configs()
    assert configs.training.learning_rate == 3e-4
    assert configs.training.warmup_steps == 5


def test_precedence_default_recipe_command_line(write_recipe):
    default = load_recipe(write_recipe(learning_rate=None)).configs().training.learning_rate
    assert default == 1e-6  # TRL's own
    assert load_recipe(write_recipe()).configs().training.learning_rate == 1e-2
    assert load_recipe(write_recipe(), ["--learning_rate", "1e-5"]).configs().training.learning_rate == 1e-5


def test_a_machine_without_accelerator_trains_in_float32_unless_told_otherwise(write_recipe, monkeypatch):
    import torch

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    training = load_recipe(write_recipe()).configs().training
    assert (training.bf16, training.use_cpu) == (False, True)
    assert load_recipe(write_recipe(), ["--bf16"]).configs().training.bf16 is True
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert load_recipe(write_recipe()).machine == {}
    assert load_recipe(write_recipe(), ["--use_cpu"]).machine == {"bf16": False}


def test_environment_variables_stand_for_paths(write_recipe, monkeypatch, fails):
    path = write_recipe(dataset_name="${FDIV_TEST_DATA}/rows.jsonl")
    monkeypatch.setenv("FDIV_TEST_DATA", "/somewhere")
    assert load_recipe(path).configs().script.dataset_name == "/somewhere/rows.jsonl"
    assert "dataset_name: ${FDIV_TEST_DATA}/rows.jsonl" in resolved_yaml(load_recipe(path))
    monkeypatch.delenv("FDIV_TEST_DATA")
    message = fails("run", path)
    assert "'dataset_name' uses ${FDIV_TEST_DATA}" in message
    assert message.endswith("export FDIV_TEST_DATA=DIRECTORY, or give --dataset_name PATH")
    assert load_recipe(path, ["--dataset_name", "here"]).configs().script.dataset_name == "here"
    assert "no `prepare:` block" in fails("run", write_recipe(dataset_name="${prepare}/data"))


def test_env_block_is_exported(write_recipe, monkeypatch):
    monkeypatch.delenv("FDIV_TEST_FLAG", raising=False)
    load_recipe(write_recipe("env: {FDIV_TEST_FLAG: 1}\n"))
    assert os.environ.pop("FDIV_TEST_FLAG") == "1"


def test_the_resolved_recipe_gives_the_same_configs(write_recipe, tmp_path):
    text = "divergence: {name: alpha, alpha: 0.3}\nlr_scheduler_type: cosine\nenv: {A_TOKEN: s3cret, B: x}\n"
    text += "eval: {name: preferences, num_samples: 0, require: {reward_accuracy: improved}}\n"
    recipe = load_recipe(write_recipe(text), ["--no_bf16", "--loss_type", "sigmoid", "--hub_token", "s3cret"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(resolved_yaml(recipe))
    assert "s3cret" not in resolved.read_text()
    again = load_recipe(resolved)
    for name in ("script", "model", "mixture"):
        assert getattr(again.configs(), name) == getattr(recipe.configs(), name)
    mine, theirs = recipe.configs().training.to_dict(), again.configs().training.to_dict()
    assert {k: v for k, v in mine.items() if k != "hub_token"} == {k: v for k, v in theirs.items() if k != "hub_token"}
    assert again.evaluations[0].instance() == recipe.evaluations[0].instance()
    assert again.evaluations[0].require == {"reward_accuracy": "improved"}
    lines = resolved.read_text().splitlines()
    assert "learning_rate: 0.01  # recipe, line 7" in lines
    assert "bf16: false  # command line" in lines
    assert "weight_decay: 0.0" in lines  # a default: not marked
    os.environ.pop("A_TOKEN")
    os.environ.pop("B")


def test_dry_run_prints_the_resolved_recipe_and_loads_no_model(write_recipe, capsys, monkeypatch, tmp_path):
    import transformers

    from fdiv.cli import main

    def refuse(*_, **__):
        raise AssertionError("a dry run loads nothing")

    for name in ("AutoModelForCausalLM", "AutoTokenizer", "AutoConfig"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", refuse)
    block = "prepare: {name: tofu_preferences, data: '${FDIV_UNSET_FOLDER}/tofu'}\n"
    path = write_recipe(block, dataset_name=None, model_name_or_path=None)
    assert main(["run", str(path), "--dry_run", "--beta", "0.3"]) == 0
    captured = capsys.readouterr()
    values = yaml.safe_load(captured.out)
    assert values["beta"] == 0.3
    assert values["prepare"]["data"] == "${FDIV_UNSET_FOLDER}/tofu"
    note, plan = captured.err.splitlines()
    assert note == "note: the environment variable FDIV_UNSET_FOLDER is not set; the run needs it"
    assert plan.startswith("memory plan: unknown: the model is built by the `prepare` block (tofu_preferences)")
    assert not (tmp_path / "out").exists()


def test_settings_of_a_sweep_win_over_the_command_line(write_recipe):
    recipe = load_recipe(write_recipe(), ["--seed", "3"], {"seed": 4, "divergence": {"name": "alpha", "alpha": 0.2}})
    assert recipe.configs().training.seed == 4
    assert recipe.configs().training.divergence == {"name": "alpha", "alpha": 0.2}
    with pytest.raises(RecipeError, match=r"^sweep: unknown key 'seeed'"):
        load_recipe(write_recipe(), [], {"seeed": 1})


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["q_proj"], ["q_proj"]),  # TRL would make a pattern of it that no path matches
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["all-linear"], "all-linear"),
        ([".*q_proj"], ".*q_proj"),
    ],
)
def test_one_lora_module_is_a_name(write_recipe, modules, expected):
    recipe = load_recipe(write_recipe(use_peft=True, lora_target_modules=modules))
    assert recipe.configs().model.lora_target_modules == expected


def test_lora_modules_that_the_model_lacks_are_refused_by_the_dry_run(write_recipe, fails):
    path = write_recipe(use_peft=True, lora_target_modules=["c_attn", "x"])
    assert "the adapter does not fit the model: Target modules " in fails("run", path, "--dry_run").splitlines()[-1]


@pytest.mark.parametrize("value", [1e300, 10**30, -(10**30), "1e25"])
def test_a_whole_number_of_more_than_64_bits_is_refused(write_recipe, fails, value):
    assert "'max_steps' must be a whole number" in fails("run", write_recipe(max_steps=value), "--dry_run")


@pytest.mark.parametrize("key", ["gradient_checkpointing_kwargs", "lr_scheduler_kwargs", "model_init_kwargs"])
def test_keyword_arguments_are_a_mapping(write_recipe, fails, key):
    assert f"{key!r} must be a mapping, got 'é'" in fails("run", write_recipe(**{key: "é"}), "--dry_run")


@pytest.mark.parametrize(
    ("files", "keys", "expected"),
    [
        (["pairs.jsonl"], {"dataset_train_split": "trian"}, "has no split 'trian' (it has: train); set `dataset_train_split`"),
        (["pairs.jsonl"], {"dataset_test_split": "held_out"}, "has no split 'held_out' (it has: train); set `dataset_test_"),
        (["train.jsonl", "test.jsonl"], {"dataset_train_split": "tset"}, "(it has: test, train); set `dataset_train_split`"),
        (["train.jsonl"], {"eval_strategy": "steps", "eval_steps": 1}, "has no split 'test' (it has: train); set `dataset_test_"),
        (["train.jsonl", "test.jsonl"], {"eval_strategy": "steps", "eval_steps": 1}, None),
        (["a.jsonl", "b.jsonl"], {"dataset_train_split": "a"}, None),  # what splits these are takes reading them
    ],
)  # fmt: skip
def test_names_of_splits_are_checked_by_the_dry_run(write_recipe, fails, pairs, tmp_path, files, keys, expected):
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in files:
        (folder / name).write_bytes((pairs / "train.jsonl").read_bytes())
    data = folder / files[0] if files == ["pairs.jsonl"] else folder
    path = write_recipe(dataset_name=str(data), **keys)
    if expected is None:
        assert main(["run", str(path), "--dry_run"]) == 0
    else:
        assert expected in fails("run", path, "--dry_run")


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_quantized_model_needs_an_adapter(write_recipe, fails, bits):
    said = fails("run", write_recipe(**{bits: True}), "--dry_run")
    assert (
        f"{bits}: true without an adapter: weights of {bits[8]} bits are not trained themselves; set `use_peft" in said
    )


def test_a_key_whose_default_is_null_takes_null():
    """So that an override can take back what a recipe says: `--eval.require null`."""
    taken = 0
    for method in map(load, METHODS.values()):
        for name, key in all_keys(method):
            if key.default is None:
                for value in (None, CommandLineValue(["null"])):
                    found = coerce(value, key, "here")
                    assert (found.read() if isinstance(found, CommandLineValue) else found) is None, name
                taken += 1
    assert taken > 1000
