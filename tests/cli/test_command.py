"""The other verbs, the launcher, and the command under `accelerate launch` and with two processes."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import fdiv
from fdiv.catalog import EVAL_COMMANDS, EVALUATIONS, METHODS, REWARDS, TASKS
from fdiv.cli import main
from fdiv.divergences import get_divergence, list_distances, list_divergences
from fdiv.divergences.registry import parameters_of
from fdiv.provenance import command_line, environment, git_revision, package_versions


def run_module(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)], capture_output=True, text=True, check=False, **options
    )


def test_every_path_of_the_tables_can_be_imported():
    for table in (METHODS, TASKS, EVALUATIONS, EVAL_COMMANDS, REWARDS):
        for name, path in table.items():
            assert path.startswith("fdiv.")
            assert table.is_one(table.find(name)), f"{name}: {path} is not {table.must_be}"
    for method in map(METHODS.find, METHODS):
        assert method.title and re.fullmatch(r"arXiv:\d{4}\.\d{5}", method.paper)
        if method.check_divergence:
            method.check_divergence("jensen_shannon")  # valid everywhere: nothing raised


@pytest.mark.parametrize("words", [[], ["run"], ["sweep"], ["eval"], ["report"], ["divergences"], ["recipes"]])
def test_every_verb_has_help(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: fdiv")
    if words and words[0] in ("run", "sweep"):
        assert "--divergence.alpha 0.3" in printed


def test_version_and_wrong_verbs(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"fdiv {fdiv.__version__}\n"
    for words in (["rnu"], ["report", "x"], []):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith("fdiv: ")
    assert main(["divergences", "--nmae", "x"]) == 2
    assert capsys.readouterr().err == "fdiv: unrecognized arguments: --nmae (see `fdiv divergences --help`)\n"


def test_methods_are_listed_with_what_they_are_valid_for(capsys):
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines()]
    rows = {row[0]: row for row in rows if len(row) == 4 and row[0]}
    assert set(METHODS) <= set(rows)
    assert rows["npo"][3] == "–" and rows["flat"][3] == "all"
    assert rows["f_dpo"][2] == "arXiv:2309.16240"
    refused = [
        name
        for name in list_divergences()
        if get_divergence({"name": name, **dict.fromkeys(parameters_of(name), 0.5)}).derivative_at_zero
        != -float("inf")
    ]
    assert "total_variation" in refused and rows["f_dpo"][3] == f"all but {', '.join(refused)}"


def test_divergences_lists_the_registry(capsys):
    assert main(["divergences"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {
        cells[0].strip(): [cell.strip() for cell in cells]
        for line in lines
        if len(cells := line.split("│")[1:-1]) == 8
    }
    assert set(rows) == {*list_divergences(), *list_distances()}
    assert rows["jensen_shannon"][2:7] == ["0.5000", "-inf", "0.6931", "0.9091", "0.0909"]
    assert rows["total_variation"][2:7] == ["–", "-0.5000", "0.5000", "–", "–"]
    assert rows["gated"][1:7] == ["forward, reverse, gate", *["–"] * 5]


def test_one_divergence_in_full(capsys, fails):
    assert main(["divergences", "{name: alpha, alpha: 0.25}"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"f'\(inf\) +│ 4.0 ", printed)
    assert "1.0 at t = 1," in printed and "0.5623 at t = 10," in printed
    assert main(["divergences", "total_variation"]) == 0
    printed = capsys.readouterr().out
    assert "not for f_dpo" in printed
    assert "f'(0+) = -inf" in printed.replace("\n", " ")
    assert main(["divergences", "gated"]) == 0
    printed = capsys.readouterr().out
    assert "gated(forward_kl,reverse_kl,entropy_gap(1))" in printed and "not for f_dpg" in printed
    assert re.search(r"valid for +│ f_distill ", printed)
    assert "ambiguous" in fails("divergences", "kl")
    assert "did you mean reverse_kl" in fails("divergences", "revers_kl")


def test_recipes_are_listed_shown_and_copied(capsys, tmp_path, fails, repository):
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"tiny/f_dpo +│ f_dpo ", printed)
    assert main(["recipes", "tiny/f_dpo"]) == 0
    text = (repository / "recipes" / "tiny" / "f_dpo.yaml").read_text()
    assert capsys.readouterr().out == text
    assert main(["recipes", "tiny/f_dpo", "--copy", str(tmp_path)]) == 0
    assert (tmp_path / "f_dpo.yaml").read_text() == text
    assert "exists and is left alone" in fails("recipes", "tiny/f_dpo", "--copy", tmp_path)
    assert "needs the name of a recipe" in fails("recipes", "--copy", tmp_path)


def test_keys_lists_the_whole_schema(capsys, fails):
    assert main(["recipes", "--keys", "f_dpo"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "method: text; default 'required'",
        "divergence: a mapping or text or null; default 'reverse_kl'",
        "learning_rate: a number; default 1e-06",
        "lora_r: a whole number; default 16",
        "dataset_name: text or null; default None",
        "prepare.sft_steps: a whole number; default ",
        "eval.num_samples: a whole number; default ",
        "report.title: text or null; default None",
        "sweep.metrics: a mapping or null; default None",
    ):
        assert f"\n{expected}" in printed, expected
    assert "unknown method 'f_dop'" in fails("recipes", "--keys", "f_dop")


def test_keys_print_bounds_and_choices_from_the_declaration(capsys, write_recipe, fails):
    assert main(["recipes", "--keys", "npo"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "beta: a number; default 0.1. Inverse temperature β; above 0.\n",
        "retain_term: text, one of nll, none, divergence; default 'nll'. Retain half of the loss",
        "utility_floor: a number; default 0.9. Share of the model utility at the start that the chosen epoch must keep; "
        "above 0 and at most 1.\n",
    ):
        assert f"\n{expected}" in printed, expected
    assert printed.startswith("\n# NPOConfig, the method's own keys\nmin_used_fraction: ")
    assert printed.index("\nbeta: ") < printed.index("\nlearning_rate: ")
    line = fails("run", write_recipe("retain_term: nll\n", method="grad_ascent"))
    assert "'retain_term' must be one of none, got 'nll'. With a retain term it is the method grad_diff" in line


def test_eval_hands_over_to_the_kind(capsys, fails):
    assert "fdiv eval: unknown evaluation 'tofuu'; did you mean 'tofu'?" in fails("eval", "tofuu")
    assert "--model" in _exit_line(["eval", "preferences"], capsys)
    with pytest.raises(SystemExit) as stop:
        main(["eval", "preferences", "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: fdiv eval preferences")


def _exit_line(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_accelerate_runs_the_same_command_under_the_launcher(write_recipe, monkeypatch, repository, capsys):
    launched = []

    class Recorded:
        """Stands for `subprocess.Popen`: a launcher that ends with exit code 3."""

        pid = 0

        def __init__(self, command, start_new_session, env):
            launched.append(command)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def wait(self):
            return 3

    monkeypatch.setattr("fdiv.cli.launch.subprocess.Popen", Recorded)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    path = str(write_recipe())
    assert main(["run", path, "--accelerate", "single", "--beta", "0.3"]) == 3
    (command,) = launched
    config = repository / "recipes" / "accelerate" / "single.yaml"
    assert command[1:3] == ["-m", "accelerate.commands.launch"]
    assert Path(command[command.index("--config_file") + 1]).resolve() == config
    on_cpu = ["--use_cpu", "true"]
    assert command[command.index("fdiv") - 1 :] == ["-m", "fdiv", "run", path, "--beta", "0.3", *on_cpu]
    assert command[command.index("--mixed_precision") + 1] == "no"  # what the run says, not the configuration
    assert main(["run", path, "--accelerate", "zero2", "--bf16", "true"]) == 3
    command = launched.pop()
    assert command[command.index("--mixed_precision") + 1] == "bf16"
    words = ["run", path, "--accelerate", "zero3", "--num_processes", "4", "--use_cpu", "false"]
    assert main(words) == 3
    command = launched.pop()
    assert command[command.index("--num_processes") :] == [
        "--num_processes", "4", "-m", "fdiv", "run", path, "--use_cpu", "false",
    ]  # fmt: skip
    assert main(["run", path, "--accelerate=cpu_ddp"]) == 3
    command = launched.pop()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "fdiv"]
    assert command[1:] == [*torchrun, "run", path, *on_cpu]
    capsys.readouterr()
    assert main(["run", path, "--accelerate", "fsdp2"]) == 2
    assert "accelerate leaves FSDP out on a CPU, silently" in capsys.readouterr().err
    assert main(["run", path, "--accelerate", "single", "--bta", "0.3"]) == 2
    assert len(launched) == 1  # a wrong key is found before anything is launched


def test_provenance(monkeypatch):
    assert environment("fdiv run x")["distributed"] == "NO"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # what `accelerate launch` sets
    assert environment("fdiv run x")["distributed"] == "DEEPSPEED"
    versions = package_versions()
    assert versions["fdiv"] == fdiv.__version__
    assert versions["torch"].startswith("2.")
    git = git_revision()
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    if head.returncode == 0:
        assert git["revision"] == head.stdout.strip()
        assert isinstance(git["dirty"], bool)
    words = ["run", "a b.yaml", "--hub_token", "hf_x", "--hub_token=hf_y"]
    assert command_line(words) == "fdiv run 'a b.yaml' --hub_token REDACTED --hub_token=REDACTED"


@pytest.mark.slow
def test_accelerate_launch_and_two_processes_give_the_run_of_one(write_recipe, tmp_path):
    """One process, `accelerate launch -m fdiv`, and two processes at the same global batch: the same numbers."""
    text = "eval: {name: preferences, num_samples: 0}\n"
    path = str(write_recipe(text, use_cpu=True, per_device_train_batch_size=4, optim="sgd", learning_rate=0.05))
    launches = {
        "plain": ["fdiv"],
        "accelerate": ["accelerate.commands.launch", "--num_processes", "1", "--cpu", "-m", "fdiv"],
        "two": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "fdiv"],
    }
    results = {}
    for name, launcher in launches.items():
        batch = ["--per_device_train_batch_size", "2"] if name == "two" else []
        done = run_module(*launcher, "run", path, "--output_dir", tmp_path / name, *batch)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("everything is in") == 1  # only the main process prints
        results[name] = json.loads((tmp_path / name / "result.json").read_text())
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 3
        environment = json.loads((tmp_path / name / "environment.json").read_text())
        assert environment["processes"] == (2 if name == "two" else 1)
        assert yaml.safe_load((tmp_path / name / "recipe_resolved.yaml").read_text())["seed"] == 7
    for name in ("accelerate", "two"):
        for key in ("train/loss", "train/grad_norm", "before/reward_margin", "after/reward_margin"):
            assert results[name][key] == pytest.approx(results["plain"][key], rel=1e-4, abs=1e-6), (name, key)


@pytest.mark.parametrize(
    "words",
    [["recipes", "tiny/f_dpo", "--copy", "FOLDER/a\0b"], ["report", "a\0b", "--output", "c"], ["a\0b"], ["run", "\0"]],
)
def test_a_nul_is_refused_by_every_verb(words, fails, tmp_path):
    assert "the command line holds a NUL" in fails(*(word.replace("FOLDER", str(tmp_path)) for word in words))


def test_a_name_that_is_no_text_is_shown(tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["recipes", "tiny/f_dpo", "--copy", f"{tmp_path}/\udcff.yaml"]) == 0
    terminal.flush()
    assert b"\\udcff.yaml" in terminal.buffer.getvalue()
