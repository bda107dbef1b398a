"""A whole run in this process: its files, its protection, resuming, and every way it refuses bad input."""

import json
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors import SafetensorError

from fdiv import catalog as methods
from fdiv import terminal
from fdiv.cli import main
from fdiv.errors import FdivError
from fdiv.recipe.load import load_recipe
from fdiv.recipe.model import Block
from fdiv.run.directory import RunDirectory
from fdiv.run.evaluation import Evaluations, add_metrics, summary_metrics, unmet_requirements
from fdiv.run.run import run_recipe
from tests.cli.conftest import recipe_values, write_pairs


class Cut(Exception):
    """A kill, without a process of its own."""


@dataclass
class WeightEval:
    """A cheap evaluation: the norm of the weights, a draw of random numbers, and one value that is not defined."""

    scale: float = 1.0
    lower_is_better = ("loss_like",)

    def evaluate(self, model, tokenizer, datasets, context):
        assert not model.training
        assert context.output_dir.is_dir()
        torch.rand(17)
        norm = sum(float(p.double().square().sum()) for p in model.parameters()) ** 0.5
        missing = {"undefined": "there is no reference"}
        rows = len(datasets["train"])
        return {"norm": self.scale * norm, "loss_like": -norm, "rows": rows, "undefined": None, "notes": missing}


@pytest.fixture(autouse=True)
def weight_eval(monkeypatch):
    monkeypatch.setitem(methods.EVALUATIONS, "weights", f"{__name__}:WeightEval")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir) -> Path:
    """A finished run with an evaluation and a report."""
    folder = tmp_path_factory.mktemp("run")
    write_pairs(folder / "data" / "train.jsonl", 8)
    write_pairs(folder / "data" / "test.jsonl", 4)
    values = recipe_values(tiny_model_dir, folder / "data", folder / "out")
    values |= {"eval": {"name": "weights", "scale": 2.0}, "report": {"title": "a < b"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(methods.EVALUATIONS, "weights", f"{__name__}:WeightEval")
        assert main(["run", str(folder / "recipe.yaml"), "--beta", "0.25"]) == 0
    return folder


def read(path):
    return json.loads(path.read_text())


@pytest.mark.smoke
def test_a_run_leaves_everything_needed_to_judge_and_repeat_it(finished):
    out = finished / "out"
    result = read(out / "result.json")
    assert (result["method"], result["divergence"], result["beta"]) == ("f_dpo", "reverse_kl", 0.25)
    assert (result["seed"], result["steps"], result["unmet_requirements"]) == (7, 2, [])
    assert result["notes"] == {"undefined": "there is no reference"}
    before, after = read(out / "eval_before.json")["metrics"], read(out / "eval_after.json")["metrics"]
    assert before["rows"] == 8.0
    assert before["undefined"] is None
    assert result["before/norm"] == before["norm"] != after["norm"] == result["after/norm"]
    from safetensors.torch import load_file

    weights = load_file(out / "model.safetensors")
    norm = sum(float(value.double().square().sum()) for value in weights.values()) ** 0.5
    assert after["norm"] == pytest.approx(2.0 * norm, rel=1e-9)
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]
    assert history[0]["loss"] == pytest.approx(0.6931, abs=2e-3)  # log 2 at the reference
    assert result["train/loss"] == history[1]["loss"]
    environment = read(out / "environment.json")
    assert environment["command"] == f"fdiv run {finished / 'recipe.yaml'} --beta 0.25"
    assert environment["versions"]["trl"].startswith("1.16")
    assert environment["seed"] == 7
    assert environment["wall_seconds"] > 0
    card = (out / "README.md").read_text()
    assert "## Measured" in card
    assert environment["command"] in card
    assert "a &lt; b" in (out / "report.html").read_text()
    assert {path.name for path in (out / "plots").iterdir()} == {"curves.png", "before_after.png"}


def test_the_resolved_recipe_runs_again_to_the_same_weights(finished, tmp_path):
    from safetensors.torch import load_file

    resolved = finished / "out" / "recipe_resolved.yaml"
    assert main(["run", str(resolved), "--output_dir", str(tmp_path / "again"), "--report", "null"]) == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (finished / "out", tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_evaluation_does_not_change_the_training(finished, tmp_path):
    from safetensors.torch import load_file

    words = ["--beta", "0.25", "--eval", "null", "--report", "null", "--output_dir", str(tmp_path / "plain")]
    assert main(["run", str(finished / "recipe.yaml"), *words]) == 0
    first, second = (load_file(folder / "model.safetensors") for folder in (finished / "out", tmp_path / "plain"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not (tmp_path / "plain" / "eval_before.json").exists()


def test_a_finished_run_is_never_touched(finished, fails):
    out = finished / "out"
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    message = fails("run", finished / "recipe.yaml", code=1)
    assert message == (
        f"fdiv: {out} holds a finished run, which is left alone; choose another --output_dir, or replace it with "
        "--overwrite_output_dir true"
    )
    assert "finished run" in fails("run", finished / "recipe.yaml", "--resume_from_checkpoint", code=1)
    assert files == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_a_finished_run_is_replaced_only_when_the_new_one_can_begin(finished, tmp_path, fails):
    out = tmp_path / "out"
    shutil.copytree(finished / "out", out)
    words = ("--output_dir", out, "--overwrite_output_dir", "true")
    assert "no-such-model" in fails(
        "run", finished / "recipe.yaml", *words, "--model_name_or_path", "no-such-model", code=1
    )
    for name in ("result.json", "metrics.jsonl", "environment.json", "recipe_resolved.yaml", "model.safetensors"):
        assert (out / name).read_bytes() == (finished / "out" / name).read_bytes(), name


def test_a_refused_resumption_leaves_the_record_of_the_run(finished, tmp_path, capsys):
    run = (
        "run",
        str(finished / "recipe.yaml"),
        "--eval",
        "null",
        "--report",
        "null",
        "--output_dir",
        str(tmp_path / "out"),
    )
    assert main([*run, "--save_strategy", "steps", "--save_steps", "1"]) == 0
    (tmp_path / "out" / "result.json").unlink()  # as if it had been cut off
    before = (tmp_path / "out" / "recipe_resolved.yaml").read_bytes()
    words = ("--divergence", "forward_kl", "--resume_from_checkpoint", "true")
    assert main([*run, *words]) == 1
    assert "was written by another run" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "out" / "recipe_resolved.yaml").read_bytes() == before


def test_a_model_that_cannot_be_written_is_one_line(finished, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("fdiv.alignment.FDPOTrainer.save_model", full)
    words = ("--eval", "null", "--report", "null", "--output_dir", tmp_path / "out")
    assert main(["run", str(finished / "recipe.yaml"), *map(str, words)]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"fdiv: the trained model could not be written to {tmp_path / 'out'}: I/O error")


def test_directories_that_may_and_may_not_be_written(tmp_path):
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FdivError, match=r"not empty and not a run of fdiv \(it holds 'thesis.tex'\)"):
            RunDirectory(stranger).check(overwrite=overwrite, resume=None)
    half = tmp_path / "half"
    half.mkdir()
    (half / "environment.json").write_text("{}")
    RunDirectory(half).check(overwrite=False, resume=None)  # nothing in it is worth keeping
    (half / "checkpoint-10").mkdir()
    (half / "checkpoint-9").mkdir()
    with pytest.raises(FdivError, match="holds checkpoints of an unfinished run"):
        RunDirectory(half).check(overwrite=False, resume=None)
    RunDirectory(half).check(overwrite=False, resume=True)
    RunDirectory(half).check(overwrite=True, resume=None)
    assert [path.name for path in RunDirectory(half).checkpoints()] == ["checkpoint-9", "checkpoint-10"]
    with pytest.raises(FdivError, match="there is no checkpoint in"):
        RunDirectory(tmp_path / "new").check(overwrite=False, resume=True)
    with pytest.raises(FdivError, match="no such directory"):
        RunDirectory(half).check(overwrite=False, resume="nowhere")


@pytest.mark.parametrize("seen", [".writable", "..writable.part", "anything"])
def test_other_processes_do_not_look_at_what_the_main_one_is_writing(tmp_path, monkeypatch, seen):
    """The main process opens the directory while they start, and what they would see of it is no run of fdiv."""
    (tmp_path / seen).write_text("")
    with pytest.raises(FdivError, match="is not empty and not a run of fdiv"):
        RunDirectory(tmp_path).check(overwrite=False, resume=None)
    monkeypatch.setenv("RANK", "1")
    with RunDirectory(tmp_path).claimed(overwrite=False, resume=None):
        assert [path.name for path in tmp_path.iterdir()] == [seen]  # nor do they write there


def test_an_error_that_another_process_has_alone_is_said(tmp_path, monkeypatch, capsys):
    """With its number, and late: the main process has the word where it fails as well."""
    waited = []
    monkeypatch.setattr(terminal.time, "sleep", waited.append)
    words = ["run", str(tmp_path / "missing.yaml")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("fdiv: ") and "missing.yaml" in said and not waited
    monkeypatch.setenv("RANK", "3")
    assert main(words) == 2
    assert capsys.readouterr().err == said.replace("fdiv: ", "fdiv: process 3: ", 1)
    assert waited == [terminal._LATE]


def test_a_resumed_run_ends_as_the_uninterrupted_one(write_recipe, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    keys = ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--eval.name", "weights"]
    assert main(["run", str(write_recipe()), *keys, "--output_dir", str(tmp_path / "whole")]) == 0
    broken = [*keys, "--output_dir", str(tmp_path / "broken")]
    from fdiv.alignment.f_dpo.trainer import FDPOTrainer

    original = FDPOTrainer.training_step

    def stop_after_two(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(FDPOTrainer, "training_step", stop_after_two)
    assert main(["run", str(write_recipe()), *broken]) == 130
    monkeypatch.setattr(FDPOTrainer, "training_step", original)
    assert main(["run", str(write_recipe()), *broken]) == 1
    assert main(["run", str(write_recipe()), *broken, "--resume_from_checkpoint"]) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    whole, resumed = (read(tmp_path / name / "result.json") for name in ("whole", "broken"))
    for key in ("before/norm", "after/norm", "train/loss", "steps"):
        assert whole[key] == resumed[key]
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 4]  # the last line is the training's total


def test_a_failed_evaluation_loses_no_model(write_recipe, tmp_path, monkeypatch, fails):
    """`save_strategy: "no"`: there is no checkpoint, so what is saved after the last step is the only copy."""
    from safetensors.torch import load_file

    whole = ["--eval.name", "weights", "--output_dir", str(tmp_path / "whole")]
    assert main(["run", str(write_recipe()), *whole]) == 0
    original = WeightEval.evaluate

    def fail_after_training(self, model, tokenizer, datasets, context):
        if context.stage == "after":
            raise torch.OutOfMemoryError("out of memory")
        return original(self, model, tokenizer, datasets, context)

    monkeypatch.setattr(WeightEval, "evaluate", fail_after_training)
    with pytest.raises(torch.OutOfMemoryError):
        main(["run", str(write_recipe()), "--eval.name", "weights"])
    saved, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    assert not (tmp_path / "out" / "result.json").exists()
    message = fails("run", write_recipe(), "--eval.name", "weights", code=1)
    assert "holds a trained model whose evaluation was not finished; measure it with `fdiv eval`" in message
    monkeypatch.setattr(WeightEval, "evaluate", original)
    assert main(["run", str(write_recipe()), "--eval.name", "weights", "--overwrite_output_dir", "true"]) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize(
    ("place", "advice"),
    [
        ("fdiv.run.run.load_datasets", "no checkpoint was written; run the same command again"),
        ("before", "no checkpoint was written; run the same command again"),
        ("after", "the trained model is saved in"),
        ("fdiv.run.run._append_results", "the trained model is saved in"),
    ],
)
def test_a_signal_at_any_moment_is_one_line(write_recipe, monkeypatch, capsys, tmp_path, place, advice, number, code):
    def kill(*_):
        os.kill(os.getpid(), number)
        time.sleep(10)  # the signal comes at the latest here

    def evaluate(self, model, tokenizer, datasets, context):
        return kill() if context.stage == place else {}

    monkeypatch.setattr(WeightEval, "evaluate", evaluate)
    if "." in place:
        monkeypatch.setattr(place, kill)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["run", str(write_recipe()), "--eval.name", "weights"]) == code
    word = "terminated (SIGTERM)" if code == 143 else "interrupted (Ctrl-C)"
    lines = [line for line in capsys.readouterr().err.splitlines() if "fdiv: " in line]
    assert len(lines) == 1 and f"fdiv: {word}: " in lines[0] and advice in lines[0]
    assert (tmp_path / "out" / "model.safetensors").is_file() == ("model is saved" in advice)
    assert signal.getsignal(signal.SIGTERM) is before


def kill_with(number):
    def kill(*_, **__):
        os.kill(os.getpid(), number)
        time.sleep(0.01)

    return kill


def one_line(capsys):
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fdiv: ")]
    return line


@pytest.mark.parametrize("place", ["after the last step", "while it saves"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_after_the_last_step_saves_the_model_first(
    number, code, place, write_recipe, monkeypatch, capsys, tmp_path
):
    from fdiv.alignment import FDPOTrainer
    from fdiv.training.sums import RunSumsMixin

    if place == "while it saves":
        monkeypatch.setattr(FDPOTrainer, "create_model_card", kill_with(number))
    elif number == signal.SIGTERM:
        finalize = RunSumsMixin._finalize_training

        def late(self, *arguments):
            result = finalize(self, *arguments)
            kill_with(number)()
            return result

        monkeypatch.setattr(RunSumsMixin, "_finalize_training", late)
    else:
        pytest.skip("Ctrl-C in training ends it at once")
    assert main(["run", str(write_recipe())]) == code
    assert "the trained model is saved in" in one_line(capsys)
    assert (tmp_path / "out" / "model.safetensors").is_file() and not (tmp_path / "out" / "_saving").exists()


def test_a_second_ctrl_c_does_not_wait(write_recipe, monkeypatch, capsys, tmp_path):
    from fdiv.alignment import FDPOTrainer

    def twice(*_, **__):
        kill_with(signal.SIGINT)()
        kill_with(signal.SIGINT)()
        raise AssertionError

    monkeypatch.setattr(FDPOTrainer, "save_model", twice)
    assert main(["run", str(write_recipe())]) == 130
    assert "no checkpoint was written; run the same command again" in one_line(capsys)


def test_half_a_model_is_none(write_recipe, monkeypatch, tmp_path):
    """Killed while the trained model is written: what stands in the directory is no trained model."""
    from fdiv.alignment import FDPOTrainer

    original = FDPOTrainer.save_model

    def half(self, folder, *_):
        original(self, folder)
        weights = Path(folder) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        raise Cut

    path = str(write_recipe())
    monkeypatch.setattr(FDPOTrainer, "save_model", half)
    with pytest.raises(Cut):
        main(["run", path])
    assert not (tmp_path / "out" / "model.safetensors").exists()
    monkeypatch.setattr(FDPOTrainer, "save_model", original)
    assert main(["run", path]) == 0  # as it says: run the same command again


def test_a_signal_when_all_is_written_says_so(write_recipe, monkeypatch, capsys):
    monkeypatch.setattr("fdiv.report.write_report", kill_with(signal.SIGTERM))
    assert main(["run", str(write_recipe("report: {}"))]) == 143
    assert "is finished; its page is made again with `fdiv report" in one_line(capsys)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("place", ["_learn_secrets", "build_parser"])
def test_a_signal_in_the_first_lines(place, number, code, monkeypatch, capsys):
    monkeypatch.setattr(f"fdiv.cli.command.{place}", kill_with(number))
    assert main(["run", "tiny/f_dpo"]) == code
    assert "run the same command again" in one_line(capsys)


def test_a_signal_before_a_resumed_training_names_the_checkpoints(write_recipe, monkeypatch, capsys):
    path = str(write_recipe(save_strategy="steps", save_steps=1, max_steps=1))
    monkeypatch.setattr("fdiv.run.run._save", lambda *_: (_ for _ in ()).throw(Cut()))
    with pytest.raises(Cut):
        main(["run", path])
    monkeypatch.setattr("fdiv.run.run.load_datasets", kill_with(signal.SIGTERM))
    capsys.readouterr()
    assert main(["run", path, "--resume_from_checkpoint", "true"]) == 143
    assert "holds checkpoints; go on with --resume_from_checkpoint true" in one_line(capsys)


def test_weights_that_are_not_finite_are_no_checkpoint(write_recipe, tmp_path, capsys, monkeypatch):
    from fdiv.alignment import FDPOTrainer

    step = FDPOTrainer.training_step

    def breaking(trainer, *arguments, **options):
        loss = step(trainer, *arguments, **options)
        next(trainer.model.parameters()).data.view(-1)[0] = float("inf")
        return loss

    monkeypatch.setattr(FDPOTrainer, "training_step", breaking)
    path = write_recipe(save_strategy="steps", save_steps=1)
    assert main(["run", str(path)]) == 1
    assert "fdiv: step 1: the optimizer made weights NaN or infinite" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_the_result_of_a_resumed_run_is_that_of_the_whole(write_recipe, tmp_path, monkeypatch):
    """Cut in the third step, after the last step, and not at all; the records are equal but for what a clock says."""
    import fdiv.run.run
    from fdiv.alignment import FDPOTrainer

    path = write_recipe("eval: {name: weights}", save_strategy="steps", save_steps=1, max_steps=5, logging_steps=2)
    assert main(["run", str(path), "--output_dir", str(tmp_path / "whole")]) == 0
    step, save = FDPOTrainer.training_step, fdiv.run.run._save

    def cut_step(trainer, *arguments, **options):
        if trainer.state.global_step == 2:
            raise Cut
        return step(trainer, *arguments, **options)

    monkeypatch.setattr(FDPOTrainer, "training_step", cut_step)
    with pytest.raises(Cut):
        main(["run", str(path)])
    monkeypatch.setattr(FDPOTrainer, "training_step", step)
    monkeypatch.setattr("fdiv.run.run._save", lambda *_: (_ for _ in ()).throw(Cut()))
    with pytest.raises(Cut):
        main(["run", str(path), "--resume_from_checkpoint", "true"])
    monkeypatch.setattr("fdiv.run.run._save", save)
    assert main(["run", str(path), "--resume_from_checkpoint", "true"]) == 0

    def records(folder):
        result = json.loads((tmp_path / folder / "result.json").read_text())
        lines = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        return [
            {
                name: value
                for name, value in entry.items()
                if not any(part in name for part in ("second", "runtime", "digest"))
            }
            for entry in (result, *lines)
        ]

    assert records("out") == records("whole")
    parts = json.loads((tmp_path / "out" / "checkpoint-5" / "trainer_state.json").read_text())
    assert parts["global_step"] == 5
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["train_seconds"] <= result["wall_seconds"]
    assert result["train/train_runtime"] <= result["train_seconds"] + 0.1


@pytest.mark.parametrize("verb", ["run", "sweep", "eval", "presample"])
def test_a_directory_in_use_is_refused(write_recipe, tmp_path, tiny_model_dir, fails, verb):
    from fdiv.lock import output_lock

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text("{}")
    words = {
        "run": [write_recipe()],
        "sweep": [write_recipe(), "--seeds", "1", "2"],
        "eval": [
            *("preferences", "--divergence", "reverse_kl", "--beta", "1"),
            "--model",
            tiny_model_dir,
            "--dataset",
            tmp_path / "data",
            "--output",
            tmp_path / "out",
        ],
        "presample": ["--model", tiny_model_dir, "--dataset", tmp_path / "data", "--output", tmp_path / "out"],
    }[verb]
    words += ["--reward", "length"] if verb == "presample" else []
    with output_lock(tmp_path / "out"):
        line = fails(verb, *words, code=1)
    assert f"{tmp_path / 'out'} is in use by process {os.getpid()} on " in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("verb", ["eval", "presample", "sweep", "merge"])
def test_every_long_verb_says_how_to_go_on(verb, number, monkeypatch, fails):
    from fdiv.cli import command

    def kill(*_):
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setitem(command._VERBS, verb, kill)
    words = {"eval": ["tofu"], "presample": [], "sweep": ["tiny/f_dpo"], "merge": ["a", "--output", "b"]}[verb]
    line = fails(verb, *words, code=128 + number)
    assert line.partition(": ")[2].split(": ")[0] in ("terminated (SIGTERM)", "interrupted (Ctrl-C)")
    assert "run the same command again" in line


def test_evaluations_of_one_name_do_not_overwrite_each_other():
    """Of three evaluations `tofu` the second and the third get the name and a number in front."""
    metrics: dict[str, float | None] = {}
    given = [add_metrics(metrics, {"a": value, "b": 0.5}, "tofu") for value in (1, 2, None)]
    assert given == [{"a": "a", "b": "b"}, {"a": "tofu_a", "b": "tofu_b"}, {"a": "tofu_2_a", "b": "tofu_2_b"}]
    assert add_metrics(metrics, {"a": 4, "c": 5}, "muse") == {"a": "muse_a", "c": "c"}
    assert metrics == {
        "a": 1.0, "b": 0.5, "tofu_a": 2.0, "tofu_b": 0.5, "tofu_2_a": None, "tofu_2_b": 0.5, "muse_a": 4.0, "c": 5.0,
    }  # fmt: skip


def test_the_start_is_named_as_the_end(tmp_path):
    """The first block measures the end alone and takes the plain name there; at the start it was the second's."""

    class Counts:
        def __init__(self, start, end):
            self.values = {"before": start, "after": end}

        def evaluate(self, model, tokenizer, datasets, context):
            return dict(self.values[context.stage])

    late, both = (Block("eval", name, Counts, {}, "here", before=name == "both") for name in ("late", "both"))
    pairs = [(late, Counts({}, {"a": 1.0})), (both, Counts({"a": 2.0, "once": 3.0}, {"a": 4.0}))]
    evaluations = Evaluations(pairs, {}, tmp_path)
    evaluations.trainer = SimpleNamespace(
        model=torch.nn.Linear(1, 1),
        processing_class=None,
        args=SimpleNamespace(seed=0),
        is_world_process_zero=lambda: True,
    )
    assert evaluations.measure("before") == {"a": 2.0, "once": 3.0}
    assert evaluations.measure("after") == {"a": 1.0, "both_a": 4.0}
    assert evaluations.results["before"] == {"both_a": 2.0, "once": 3.0}
    assert evaluations.names["before"] == [{}, {"a": "both_a", "once": "once"}]


@pytest.mark.parametrize(("direction", "code"), [("increased", 0), ("decreased", 1)])
def test_require_decides_the_exit_code(write_recipe, tmp_path, monkeypatch, capsys, direction, code):
    norms = iter([1.0, 2.0])

    def evaluate(self, *_):
        return {"norm": next(norms)}

    monkeypatch.setattr(WeightEval, "evaluate", evaluate)
    path = write_recipe(f"eval: {{name: weights, require: {{norm: {direction}}}}}\n")
    assert main(["run", str(path)]) == code
    captured = capsys.readouterr()
    assert "norm " in captured.out
    assert ("fdiv: eval.require: norm has not decreased: 1 before training, 2 after" in captured.err) == bool(code)
    assert (tmp_path / "out" / "result.json").is_file()


def test_a_second_block_is_held_to_its_own_numbers(write_recipe, tmp_path, monkeypatch):
    """The first block's norm falls and the second's rises; each block's `require` and `summary` mean its own."""
    norms = iter([5.0, 1.0, 4.0, 2.0])  # before: first, second; after: first, second
    monkeypatch.setattr(WeightEval, "evaluate", lambda self, *_: {"norm": next(norms)})
    path = write_recipe(
        "eval:\n- {name: weights, require: {norm: increased}}\n"
        "- {name: weights, require: {norm: decreased}, summary: [norm]}\n"
    )
    result = run_recipe(load_recipe(path))
    assert result["unmet_requirements"] == [
        "norm has not increased: 5 before training, 4 after",
        "weights_norm has not decreased: 1 before training, 2 after",
    ]
    assert result["summary_metrics"] == ["weights_norm"]
    written = json.loads((tmp_path / "out" / "eval_before.json").read_text())
    assert written["names"] == [{"norm": "norm"}, {"norm": "weights_norm"}]


def test_a_requirement_by_the_name_in_the_results():
    """Names of the start differ from those of the end where the first block leaves the start out."""
    skipped = SimpleNamespace(require={}, summary=[])
    own = SimpleNamespace(require={"norm": "increased"}, summary=["norm"])
    names = {"before": [{}, {"norm": "norm"}], "after": [{"norm": "norm"}, {"norm": "weights_norm"}]}
    before, after = {"norm": 1.0}, {"norm": 0.5, "weights_norm": 2.0}
    pairs = [(skipped, object()), (own, object())]
    assert unmet_requirements(pairs, before, after, "f_dpo", names) == []
    # What it does not measure itself is another's, by the name that it has in the results.
    other = SimpleNamespace(require={"weights_norm": "increased"}, summary=[])
    one = {"norm": 1.0, "weights_norm": 1.0}
    assert unmet_requirements([(other, object())], one, after, "f_dpo", {"before": [{}], "after": [{}]}) == []
    # A block that did not measure the start has no number there, whatever another block has by that name.
    with pytest.raises(FdivError, match="'norm' was not measured before and after; metrics are: norm, weights_norm"):
        unmet_requirements(
            [(own, object()), (skipped, object())],
            before,
            after,
            "f_dpo",
            {"before": [{}, {}], "after": [{"norm": "norm"}, {}]},
        )
    # An earlier release wrote no names of the start: those of the end hold.
    assert unmet_requirements(pairs, one, after, "f_dpo", {"after": names["after"]}) == []
    assert summary_metrics(pairs, after, names["after"]) == ["weights_norm"]
    assert summary_metrics([(skipped, object())], after, [{}]) == ["norm", "weights_norm"]


def test_improved_knows_which_metrics_should_fall(write_recipe, monkeypatch):
    values = iter([{"loss_like": 2.0, "norm": 1.0}, {"loss_like": 1.0, "norm": 1.0}])
    monkeypatch.setattr(WeightEval, "evaluate", lambda self, *_: next(values))
    path = write_recipe("eval: {name: weights, require: {loss_like: improved, norm: improved}}\n")
    result = run_recipe(load_recipe(path))
    assert result["unmet_requirements"] == ["norm has not improved: 1 before training, 1 after"]


def test_missing_column_empty_data_missing_split_missing_file(write_recipe, tmp_path, fails):
    renamed = write_pairs(tmp_path / "renamed.jsonl", 4, rejected="bad")
    message = fails("run", write_recipe(dataset_name=str(renamed)), code=1)
    assert "has no column 'rejected'; it has: prompt, chosen, bad; f_dpo needs chosen, rejected" in message
    assert "rename the columns" in message
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl" in fails("run", write_recipe(dataset_name=str(tmp_path / "empty.jsonl")), code=1)
    message = fails("run", write_recipe(), "--dataset_train_split", "training")  # known before anything is loaded
    assert "has no split 'training' (it has: test, train); set `dataset_train_split`" in message
    message = fails("run", write_recipe(dataset_name=str(renamed.with_name("none.jsonl"))), code=1)
    assert message.endswith(f"no such file or directory: {tmp_path / 'none.jsonl'}")
    assert "set `dataset_name`" in fails("run", write_recipe(dataset_name=None), code=1)
    assert "a file must end in" in fails(
        "run", write_recipe(dataset_name=str(write_pairs(tmp_path / "x.txt", 1))), code=1
    )


def test_saved_datasets_and_hub_names(write_recipe, tmp_path, fails):
    from datasets import Dataset, DatasetDict

    from fdiv.run.data import load_datasets
    from fdiv.run.run import plan_run

    rows = Dataset.from_dict({"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]})
    DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(str(tmp_path / "saved"))
    recipe = load_recipe(write_recipe(dataset_name=str(tmp_path / "saved")))
    loaded = load_datasets(plan_run(recipe))
    assert (len(loaded["train"]), len(loaded["test"])) == (2, 1)
    rows.select([]).save_to_disk(str(tmp_path / "empty"))
    message = fails("run", write_recipe(dataset_name=str(tmp_path / "empty")), code=1)
    assert "is empty or damaged" in message
    message = fails("run", write_recipe(dataset_name="nobody/nothing"), code=1)
    assert "cannot load the dataset 'nobody/nothing'" in message
    assert "give a local path" in message


def test_a_model_without_pad_token(write_recipe, tmp_path, tiny_model_dir, fails):
    import shutil

    from transformers import AutoTokenizer

    model = tmp_path / "no-pad"
    shutil.copytree(tiny_model_dir, model)
    config = read(model / "tokenizer_config.json")
    config["pad_token"] = None
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.pad_token is None
    message = fails("run", write_recipe(model_name_or_path=str(model)), code=1)
    assert f"the tokenizer of {str(model)!r} has no pad token: set `pad_token`" in message
    message = fails("run", write_recipe(model_name_or_path=str(model)), "--pad_token", "<nope>", code=1)
    assert "pad_token '<nope>' is not in the vocabulary" in message
    words = ["--pad_token", tokenizer.eos_token]
    assert main(["run", str(write_recipe(model_name_or_path=str(model))), *words]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == tokenizer.eos_token


def test_models_that_are_not_there(write_recipe, tmp_path, fails):
    assert "set `model_name_or_path`" in fails("run", write_recipe(model_name_or_path=None), code=1)
    message = fails("run", write_recipe(model_name_or_path=str(tmp_path / "none")), code=1)
    assert message == f"fdiv: model_name_or_path: no such directory: {tmp_path / 'none'}"
    message = fails("run", write_recipe(model_name_or_path="nobody/nothing"), code=1)
    assert "cannot load the tokenizer of the model 'nobody/nothing'" in message
    message = fails("run", write_recipe(), "--model_init_kwargs", "{dtpye: float32}")
    assert "unknown key 'dtpye' in `model_init_kwargs` for a LlamaConfig; did you mean 'dtype'?" in message


def test_non_finite_loss_is_one_line(write_recipe, fails, monkeypatch, tmp_path):
    from fdiv.alignment.f_dpo import trainer as f_dpo

    monkeypatch.setattr(f_dpo, "f_dpo_loss", lambda chosen, *_, **__: chosen * float("nan"))
    message = fails_last(fails, "run", write_recipe())
    assert message.startswith("fdiv: step 1: the loss is nan")
    assert not (tmp_path / "out" / "result.json").exists()
    from fdiv.errors import NonFiniteLossError

    with pytest.raises(NonFiniteLossError):
        main(["run", str(write_recipe()), "--debug"])


def fails_last(fails, *words):
    """The last line of a command that fails after training has begun, when bars stand on stderr too."""
    import contextlib
    import io

    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        assert main([str(word) for word in words]) == 1
    return stderr.getvalue().rstrip().splitlines()[-1]


def test_prepare_is_built_once_per_configuration(write_recipe, tmp_path, monkeypatch):
    builds = []

    @dataclass
    class Builder:
        rows: int = 8

        def build(self, output_dir):
            builds.append(self.rows)
            write_pairs(output_dir / "train.jsonl", self.rows)
            return {"dataset_name": str(output_dir / "train.jsonl"), "per_device_train_batch_size": 1}

    monkeypatch.setattr(f"{__name__}.BUILDER", Builder, raising=False)
    monkeypatch.setitem(methods.PREPARE, "rows", f"{__name__}:BUILDER")
    path = write_recipe("prepare: {name: rows}\neval: {name: weights}\n", dataset_name=None)
    run_recipe(load_recipe(path))
    again = ["--overwrite_output_dir"]
    run_recipe(load_recipe(path, again))
    assert builds == [8]
    result = run_recipe(load_recipe(path, [*again, "--prepare.rows", "6"]))
    assert builds == [8, 6]
    assert result["before/rows"] == 6.0
    resolved = (tmp_path / "out" / "recipe_resolved.yaml").read_text()
    assert "# dataset_name: set by prepare" in resolved
    assert "per_device_train_batch_size: 2  # recipe" in resolved  # stated: wins over the builder
    for marker in (tmp_path / "out" / "prepared").glob("*/recipe_keys.json"):
        marker.unlink()  # as a build that was cut off leaves it
    run_recipe(load_recipe(path, again))
    assert builds == [8, 6, 8]
