"""Strict keys: at every level, from file and command line, one line that names the key, its place and the nearest."""

import subprocess
import sys

import pytest


def line_of(path, text):
    return next(n for n, line in enumerate(path.read_text().splitlines(), start=1) if text in line)


def test_misspelt_top_level_key_names_line_and_nearest(write_recipe, fails):
    path = write_recipe("learnng_rate: 1e-5\n")
    line = line_of(path, "learnng_rate")
    expected = f"fdiv: {path}, line {line}: unknown key 'learnng_rate'; did you mean 'learning_rate'?"
    assert fails("run", path) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--learnng_rate", "1e-5"], "unknown key '--learnng_rate'; did you mean '--learning_rate'?"),
        (["--lora-rr", "4"], "unknown key '--lora_rr'; did you mean '--lora_r'?"),
        (["--dataset_nam", "x"], "unknown key '--dataset_nam'; did you mean '--dataset_name'?"),
        (["--divergense", "reverse_kl"], "unknown key '--divergense'; did you mean '--divergence'?"),
        (["--pad_tokn", "x"], "unknown key '--pad_tokn'; did you mean '--pad_token'?"),
        (["--test_fractoin", "0.1"], "unknown key '--test_fractoin'; did you mean '--prepare.test_fraction'?"),
        (
            ["--eval.name", "preferences", "--eval.batch_sise", "8"],
            "unknown key '--eval.batch_sise'; did you mean '--eval.batch_size'?",
        ),
        (
            ["--eval.name", "preferences", "--eval.lerning_rate", "8"],
            "unknown key '--eval.lerning_rate'; did you mean '--learning_rate'?",
        ),
        (["--report.titel", "x"], "unknown key '--report.titel'; did you mean '--report.title'?"),
        (["--sweep.sed", "[1]"], "unknown key '--sweep.sed'; did you mean '--sweep.seed'?"),
        (
            ["--accelerator_config.split_batch", "true"],
            "unknown key '--accelerator_config.split_batch'; did you mean '--accelerator_config.split_batches'?",
        ),
        (
            ["--gradient_checkpointing_kwargs.use_rentrant", "true"],
            "unknown key '--gradient_checkpointing_kwargs.use_rentrant'; "
            "did you mean '--gradient_checkpointing_kwargs.use_reentrant'?",
        ),
        (
            ["--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs.num_cycle", "2"],
            "unknown key '--lr_scheduler_kwargs.num_cycle'; did you mean '--lr_scheduler_kwargs.num_cycles'?",
        ),
        (["--qqqqqqq", "1"], "unknown key '--qqqqqqq'; list the keys with `fdiv recipes --keys f_dpo`"),
    ],
)
def test_misspelt_key_on_the_command_line(write_recipe, fails, words, expected):
    assert fails("run", write_recipe(), *words) == f"fdiv: command line: {expected}"


def test_misspelt_key_in_a_block_names_the_block(write_recipe, fails):
    path = write_recipe("prepare:\n  name: tiny_preferences\n  sft_step: 3\n")
    line = line_of(path, "sft_step")
    expected = f"fdiv: {path}, line {line}: unknown key 'sft_step' in `prepare`; did you mean 'prepare.sft_steps'?"
    assert fails("run", path) == expected


def test_a_list_of_evaluations_is_checked_entry_by_entry(write_recipe, fails):
    path = write_recipe("eval:\n- name: preferences\n- name: preferences\n  max_row: 3\n")
    assert f"line {line_of(path, 'max_row')}: unknown key 'max_row' in `eval.1`" in fails("run", path)
    path = write_recipe("eval:\n- name: preferences\n")
    message = fails("run", path, "--eval.1.max_rows", "3")
    assert message.endswith("the block is a list of 1; use a number from 0 to 0")


def test_misspelt_parameter_of_a_divergence(write_recipe, fails):
    path = write_recipe("divergence: {name: alpha, alhpa: 0.3}\n")
    assert "divergence 'alpha' has no parameter 'alhpa': it takes alpha" in fails("run", path)
    assert "has no parameter 'weight'" in fails("run", path, "--divergence", "{name: alpha, alpha: 0.3, weight: 1}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("method: f_dop\n", "unknown method 'f_dop'; did you mean 'f_dpo'?"),
        ("eval: {name: preference}\n", "unknown `eval.name` 'preference'; did you mean 'preferences'?"),
        ("eval: {batch_size: 3}\n", "`eval:` needs a `name`: one of "),
        ("eval: preferences\n", "`eval:` must be a mapping of keys, got 'preferences'"),
        ("prepare: {name: tiny_world}\n", "unknown `prepare.name` 'tiny_world'; "),
        ("sweep: {seed: 3}\n", "`sweep.seed` must be a list of values, got 3"),
        ("sweep: {seed: [1], metrics: {rewrd: x}}\n", "unknown key 'rewrd' in `sweep.metrics`"),
        (
            "eval: {name: preferences, require: {reward_accuracy: better}}\n",
            "`eval.require.reward_accuracy` must be improved, increased or decreased, got 'better'",
        ),
        ("trust_remote_code: true\n", "trust_remote_code is refused"),
        ("eval: {name: tiny_world}\n", "`eval.world` is missing"),
    ],
)
def test_wrong_names_and_shapes(write_recipe, fails, text, expected):
    assert expected in fails("run", write_recipe(text, **({"method": None} if "method" in text else {})))


def test_duplicate_keys_are_refused(write_recipe, fails):
    path = write_recipe("seed: 1\n")
    first = line_of(path, "seed: 7")
    message = fails("run", path)
    assert message.endswith(f"line {first + 1}: duplicate key 'seed' (first on line {first}); keep one of them")


def test_not_a_recipe(tmp_path, fails):
    path = tmp_path / "x.yaml"
    for text, expected in (
        ("", "is empty"),
        ("- 1\n", "must be a mapping"),
        ("a: [1\n", "not valid YAML"),
        ("a: 1\n--- \nb: 2\n", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("seed: 1\n", "no `method:`"),
    ):
        path.write_text(text)
        assert expected in fails("run", path)
    assert "no recipe file 'tiny/f_dpoo' and no packaged recipe" in fails("run", "tiny/f_dpoo")
    assert "did you mean 'tiny/f_dpo'?" in fails("run", "tiny/f_dpoo")


def test_command_line_shapes(write_recipe, fails):
    path = write_recipe()
    assert fails("run", "--seed", "1", path) == "fdiv: the recipe comes first: fdiv run RECIPE --seed …"
    assert fails("run", path, "stray") == "fdiv: command line: unexpected 'stray'; overrides are written --key value"
    assert "needs a value" in fails("run", path, "--learning_rate")
    assert "takes one value" in fails("run", path, "--learning_rate", "1", "2")
    assert "neither a file nor packaged" in fails("run", path, "--accelerate", "zero9")


def test_invalid_divergence_is_one_line(write_recipe, fails):
    message = fails("run", write_recipe(), "--divergence", "total_variation")
    assert "f-DPO cannot use the divergence 'total_variation'" in message
    assert "alpha" in fails("run", write_recipe(), "--divergence", "{name: alpha, alpha: 1.5}")
    assert "unknown divergence 'revers_kl'" in fails("run", write_recipe(), "--divergence", "revers_kl")


def test_one_line_and_exit_code_two_in_a_process_of_its_own(write_recipe):
    command = [sys.executable, "-m", "fdiv", "run", str(write_recipe()), "--learnng_rate", "1e-5"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "fdiv: command line: unknown key '--learnng_rate'; did you mean '--learning_rate'?\n"


def test_the_command_line_imports_nothing_heavy():
    script = (
        "import sys, fdiv, fdiv.cli\n"
        "try: fdiv.cli.main(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'numpy', 'matplotlib', 'rich', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "RECIPE" in result.stdout
