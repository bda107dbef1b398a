"""Faults end with one clear line and a non-zero exit, and never cost a finished checkpoint."""

import errno
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from fdiv.cli import main
from fdiv.errors import CheckpointError, DataError, NonFiniteLossError, RolloutError
from fdiv.training.checkpoints import (
    STAGING,
    checkpoint_fault,
    checkpoint_folders,
    newest_checkpoint,
    publish,
    read_marker,
)
from fdiv.training.signals import StopOnSigterm
from tests.cli.conftest import pairs, write_recipe  # noqa: F401 (fixtures)
from tests.support.processes import wait_for_step
from tests.support.runs.all_trainers import EVERY, build, flat_weights
from tests.support.runs.dph import cache
from tests.support.runs.unlearning import retain_rows

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ---------------------------------------------------------------- disk
def test_a_disk_that_fills_up_while_saving(tiny_model_dir, tmp_path, monkeypatch):
    """The second checkpoint meets a file size limit, which fails in the same calls as a full disk."""
    trainer = build("f_dpo", tiny_model_dir, tmp_path, **SAVING)
    save = trainer._save_optimizer_and_scheduler
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limited(folder):
        if trainer.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        save(folder)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", limited)
    try:
        with pytest.raises(CheckpointError) as error:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert re.search(r"checkpoint of step 4 could not be written to .*resume_from_checkpoint", one_line(error))
    assert newest_checkpoint(tmp_path)[0].name == "checkpoint-2"
    assert not (tmp_path / STAGING).exists()


def test_no_space_left_is_named(tiny_model_dir, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fdiv.training.resume.publish", full)
    with pytest.raises(CheckpointError, match=r"step 2 could not be written .*No space left on device"):
        build("flat", tiny_model_dir, tmp_path, **SAVING).train()
    assert checkpoint_folders(tmp_path) == []


def test_a_save_that_fails_while_replacing_a_checkpoint_keeps_it(tiny_model_dir, tmp_path, monkeypatch):
    """The same step is saved again; the finished one has been moved aside when the second rename fails."""
    settings = {**SAVING, "max_steps": 2}
    build("flat", tiny_model_dir, tmp_path, **settings).train()
    finished = read_marker(tmp_path / "checkpoint-2")
    rename = os.replace

    def failing(source, target):
        if os.fspath(source) == str(tmp_path / STAGING / "checkpoint-2"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr("fdiv.training.checkpoints.os.replace", failing)
    with pytest.raises(CheckpointError, match=r"step 2 could not be written .*Make room"):
        build("flat", tiny_model_dir, tmp_path, **settings, seed=7).train()
    folder, passed_over = newest_checkpoint(tmp_path)
    assert folder.name == "checkpoint-2" and passed_over == []
    assert read_marker(folder) == finished
    assert not (tmp_path / STAGING).exists()


def test_what_a_file_system_leaves_in_the_staging_folder_fails_no_save(tiny_model_dir, tmp_path, monkeypatch):
    def publish_leaving(staged, *arguments):
        target = publish(staged, *arguments)
        (staged.parent / ".nfs0001").write_text("")
        return target

    monkeypatch.setattr("fdiv.training.resume.publish", publish_leaving)
    trainer = build("flat", tiny_model_dir, tmp_path, **SAVING)
    trainer.train()
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_an_output_folder_that_cannot_be_written(write_recipe, monkeypatch, capsys, code):  # noqa: F811
    """Simulated, since root may write anywhere."""

    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    path = str(write_recipe())
    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    assert main(["run", path]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fdiv:")]
    assert "cannot be written" in line and os.strerror(code) in line and "--output_dir" in line


# ---------------------------------------------------------------- numbers
@pytest.mark.parametrize("name", EVERY)
def test_a_gradient_that_is_not_finite_stops_before_the_step(name, tiny_model_dir, tmp_path):
    """The loss is finite; a hook makes one gradient infinite in the third step."""
    trainer = build(name, tiny_model_dir, tmp_path)
    seen = []

    def poison(gradient):
        seen.append(flat_weights(trainer))
        return gradient * math.inf if trainer.state.global_step == 2 else gradient

    next(trainer.model.parameters()).register_hook(poison)
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train()
    assert re.match(r"step 3: the gradient norm is (inf|nan) with a finite loss", one_line(error))
    assert torch.equal(flat_weights(trainer), seen[-1])  # the third step was not made
    assert not torch.equal(seen[0], seen[-1])


# ---------------------------------------------------------------- data
def test_a_row_far_too_long(tiny_model_dir, tmp_path):
    from datasets import Dataset

    from tests.support.runs.f_dpo import make_trainer, preference_rows

    rows = preference_rows(6)
    rows[4]["prompt"] = "very " * 5000
    with pytest.raises(DataError) as error:
        make_trainer(tiny_model_dir, Dataset.from_list(rows), tmp_path, max_length=None)
    assert re.match(
        r"row 4 of the training data has \d{4,} tokens, more than the model's context of 512: set", one_line(error)
    )
    make_trainer(tiny_model_dir, Dataset.from_list(rows), tmp_path, max_length=128)  # truncated, as asked for


@pytest.mark.parametrize("name", ["f_dpg", "dph"])
def test_a_prompt_that_leaves_no_room(name, tiny_model_dir, tmp_path):
    with pytest.raises((DataError, RolloutError)) as error:
        build(name, tiny_model_dir, tmp_path, prompts=["The", "very " * 1000]).train()
    assert re.search(r"row 1: the prompt .* more than the model's context of 512", one_line(error))


# ---------------------------------------------------------------- signals and ranks
def test_a_line_that_is_being_written_is_waited_for(tmp_path, monkeypatch):
    """Whoever reads `metrics.jsonl` of a run that goes on may see half of its last line."""
    metrics, process, seen = tmp_path / "metrics.jsonl", SimpleNamespace(poll=lambda: None), []

    def go_on(_):
        seen.append(metrics.is_file())
        metrics.write_text('{"step": 2}\n{"step": 3, "lo' + ('ss": 0.5}\n' if len(seen) > 1 else ""))

    monkeypatch.setattr("tests.support.processes.time.sleep", go_on)
    wait_for_step(process, metrics, 3)
    assert seen == [False, True]


def start(*words, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def test_sigterm_saves_the_step_and_logs_nothing_of_its_own(tiny_model_dir, tmp_path):
    """The checkpoint holds the unfinished averages (see test_resumed_numbers.py)."""
    sigterm = StopOnSigterm()

    class Terminate(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            sigterm.requested = state.global_step == 2

    trainer = build("flat", tiny_model_dir, tmp_path, max_steps=10, logging_steps=10, callbacks=[Terminate()])
    trainer.add_callback(sigterm)
    trainer.train()
    assert sigterm.stopped_at == 3
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["log_history"] == [] and state["global_step"] == 3


@pytest.mark.slow
def test_sigterm_saves_stops_and_can_be_resumed(write_recipe, tmp_path):  # noqa: F811
    path = write_recipe(max_steps=40, save_strategy="no", use_cpu=True)
    output = tmp_path / "out"
    process = start("tests.support.scripts.slow_run", "run", path)
    wait_for_step(process, output / "metrics.jsonl", 3)
    process.terminate()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 143, stderr
    folder, _ = newest_checkpoint(output)
    step = int(folder.name.split("-")[1])
    assert 3 <= step < 40
    lines = [line for line in stderr.splitlines() if line.startswith("fdiv:")]
    assert len(lines) == 1 and f"stopped after step {step}" in lines[0]
    assert main(["run", str(path), "--output_dir", str(tmp_path / "whole")]) == 0
    assert main(["run", str(path), "--resume_from_checkpoint", "true"]) == 0
    whole, resumed = (json.loads((tmp_path / run / "result.json").read_text()) for run in ("whole", "out"))
    assert resumed["steps"] == 40
    assert resumed["train/loss"] == whole["train/loss"]


@pytest.mark.slow
def test_a_dead_rank_ends_the_run_and_keeps_its_checkpoint(write_recipe, tmp_path):  # noqa: F811
    path = write_recipe(
        max_steps=400, save_strategy="steps", save_steps=2, per_device_train_batch_size=1, use_cpu=True
    )
    output = tmp_path / "out"
    launcher = start("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "fdiv", "run", path)
    wait_for_step(launcher, output / "metrics.jsonl", 5)
    ranks = subprocess.run(
        ["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    folder, _ = newest_checkpoint(output)
    assert int(folder.name.split("-")[1]) >= 4
    assert checkpoint_fault(folder) is None


# ---------------------------------------------------------------- resuming another run
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"divergence": "reverse_kl"}, "divergence is 'reverse_kl' and was 'jensen_shannon'"),
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size is 2 and was 4"),
    ],
)
def test_another_run_is_not_resumed_unless_forced(changed, reason, tiny_model_dir, tmp_path):
    build("f_dpo", tiny_model_dir, tmp_path, **SAVING).train()
    other = build("f_dpo", tiny_model_dir, tmp_path, **{**SAVING, "max_steps": 6, **changed})
    with pytest.raises(CheckpointError) as error:
        other.train(resume_from_checkpoint=True)
    assert reason in one_line(error) and "force_resume" in one_line(error)
    other.force_resume = True
    other.train(resume_from_checkpoint=True)
    assert other.state.global_step == 6


RETAIN = {"retain_term": "divergence", "retain_divergence": "forward_kl"}
FIXED = {"template_source": "fixed", "template_text": "No."}


@pytest.mark.parametrize(
    ("before", "changed", "reason"),
    [
        (RETAIN, {"retain_divergence": "reverse_kl"}, "retain_divergence is 'reverse_kl' and was 'forward_kl'"),
        ({}, RETAIN, "retain_term is 'divergence' and was 'nll'"),
        ({}, {"retain": 9}, "retain dataset is '9 rows, "),
        (FIXED, {"template_text": "Never."}, "template answers is '12 rows, "),
    ],
)
def test_other_retain_terms_rows_and_templates_are_not_resumed(before, changed, reason, tiny_model_dir, tmp_path):
    def trainer(options):
        options = {"retain": 7, **SAVING, **options}
        return build("flat", tiny_model_dir, tmp_path, **{**options, "retain": retain_rows(options["retain"])})

    trainer(before).train()
    with pytest.raises(CheckpointError) as error:
        trainer({**before, **changed}).train(resume_from_checkpoint=True)
    assert reason in one_line(error)
    trainer({**before, "max_steps": 5}).train(resume_from_checkpoint=True)


def test_another_rehearsal_cache_is_not_resumed(tiny_model_dir, tmp_path):
    first, other = (cache(tiny_model_dir, shift=shift) for shift in (0.5, 0.6))  # other reference log-probabilities
    build("dph", tiny_model_dir, tmp_path, rehearsal=first, **SAVING).train()
    with pytest.raises(CheckpointError, match=r"rehearsal cache is '6 rows, \w+' and was '6 rows, "):
        build("dph", tiny_model_dir, tmp_path, rehearsal=other, **SAVING).train(resume_from_checkpoint=True)


def test_other_settings_are_resumed_and_named(tiny_model_dir, tmp_path, capsys):
    build("f_dpo", tiny_model_dir, tmp_path, **SAVING).train()
    changed = {**SAVING, "learning_rate": 0.5, "beta": 0.7, "max_steps": 6}
    build("f_dpo", tiny_model_dir, tmp_path, **changed).train(resume_from_checkpoint=True)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("resume: changed")]
    named = "beta is 0.7 and was 0.1; learning_rate is 0.5 and was 0.01; max_steps is 6 and was 4"
    assert notes == [f"resume: changed since that checkpoint: {named}"]
    build("f_dpo", tiny_model_dir, tmp_path, **changed).train(resume_from_checkpoint=True)
    assert "resume: changed" not in capsys.readouterr().err


def test_other_data_and_strange_checkpoints_are_refused(tiny_model_dir, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from tests.support.runs.f_dpo import make_trainer, preference_rows

    rows = preference_rows(12)
    build("f_dpo", tiny_model_dir, tmp_path / "ours", **SAVING).train()
    rows[5]["chosen"] = " Another answer."
    other = make_trainer(
        tiny_model_dir, Dataset.from_list(rows), tmp_path / "ours", divergence="jensen_shannon", **SAVING
    )
    with pytest.raises(CheckpointError, match="train dataset is '12 rows"):
        other.train(resume_from_checkpoint=True)
    # A checkpoint of TRL's own holds pickles that we did not write.
    make_trainer(
        str(tiny_model_dir), Dataset.from_list(rows), tmp_path / "trl", trainer=DPOTrainer, config=DPOConfig,
        model=str(tiny_model_dir), **SAVING,
    ).train()  # fmt: skip
    with pytest.raises(CheckpointError, match=r"cannot resume from .*checkpoint-2: it has no fdiv_checkpoint.json"):
        build("f_dpo", tiny_model_dir, tmp_path / "ours", **SAVING).train(
            resume_from_checkpoint=str(tmp_path / "trl" / "checkpoint-2")
        )
    with pytest.raises(CheckpointError, match="no such folder"):
        build("f_dpo", tiny_model_dir, tmp_path / "ours", **SAVING).train(resume_from_checkpoint="nowhere")
