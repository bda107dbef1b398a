"""The numbers of a run that was cut and resumed are those of the run that was not: every log entry, sums and times."""

import itertools

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from fdiv.training.signals import StopOnSigterm
from tests.support.runs.all_trainers import ROLLOUT_TRAINERS, TRAINERS, build, flat_weights
from tests.support.runs.f_dpo import preference_rows

TIMES = ("runtime", "per_second", "step_time")


class Cut(Exception):
    """A kill, without the process of its own."""


class CutBefore(TrainerCallback):
    """Ends the training before a step; after the last step where there is none."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Cut

    def on_train_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Cut


def numbers(trainer):
    """Every log entry without what a clock says."""
    return [
        {name: value for name, value in entry.items() if not any(part in name for part in TIMES)}
        for entry in trainer.state.log_history
    ]


def cut_and_resumed(name, model_dir, output, settings, cuts):
    """A run that is cut before each of `cuts`, and resumed each time; the trainer that came to the end."""
    for step in cuts:
        trainer = build(name, model_dir, output, callbacks=[CutBefore(step)], **settings)
        with pytest.raises(Cut):
            trainer.train(resume_from_checkpoint=any(output.glob("checkpoint-*")))
    trainer = build(name, model_dir, output, **settings)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def same(whole, resumed):
    assert numbers(resumed) == numbers(whole)
    assert torch.equal(flat_weights(resumed), flat_weights(whole))
    assert resumed.state.global_step == whole.state.global_step
    assert resumed.state.epoch == whole.state.epoch
    assert resumed.state.total_flos == whole.state.total_flos
    for key in ("num_input_tokens_seen", "best_metric", "best_global_step"):
        assert getattr(resumed.state, key) == getattr(whole.state, key)


SAVING = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 3}


def compare(name, model_dir, tmp_path, settings, cuts):
    whole = build(name, model_dir, tmp_path / "whole", **settings)
    whole.train()
    same(whole, cut_and_resumed(name, model_dir, tmp_path / "cut", settings, cuts))


@pytest.mark.parametrize("cuts", [(2, 5), pytest.param(range(1, 6), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", TRAINERS)
def test_averages_go_on_where_they_were_cut(name, cuts, tiny_model_dir, tmp_path):
    """Of five steps the third is logged; the last two are in the line that ends the run."""
    compare(name, tiny_model_dir, tmp_path, {**SAVING, "max_steps": 5}, cuts)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_accumulated_steps_are_cut(name, tiny_model_dir, tmp_path):
    size = 4 if name in ROLLOUT_TRAINERS else 2
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": size}
    compare(name, tiny_model_dir, tmp_path, SAVING | settings, range(1, 4))


@pytest.mark.parametrize("name", ["f_dpg", "dph"])
def test_cut_between_two_generations(name, tiny_model_dir, tmp_path):
    """A log that comes before the next generation shows the completions of the last one."""
    settings = {**SAVING, "max_steps": 3, "steps_per_generation": 2, "num_iterations": 2, "logging_steps": 1}
    compare(name, tiny_model_dir, tmp_path, settings, (1, 3))


#: (saving, logging, evaluation, steps): what falls on the end of an epoch, and what into its middle.
RHYTHMS = list(itertools.product(["steps", "epoch"], ["steps", "epoch"], ["steps", "epoch"], [5, 6]))
QUICK = [("steps", "epoch", "epoch", 5), ("epoch", "steps", "epoch", 6)]


@pytest.mark.parametrize(
    ("save", "log", "evaluate", "steps"),
    [rhythm if rhythm in QUICK else pytest.param(*rhythm, marks=pytest.mark.slow) for rhythm in RHYTHMS],
)
def test_logs_evaluations_and_checkpoints_at_any_rhythm(save, log, evaluate, steps, tiny_model_dir, tmp_path):
    """Three steps an epoch; cut before every step from which there is a checkpoint, and after the last."""
    settings = {
        "save_strategy": save, "save_steps": 1, "logging_strategy": log, "logging_steps": 2, "eval_strategy": evaluate,
        "eval_steps": 2, "eval_on_start": True, "max_steps": steps, "eval_dataset": Dataset.from_list(preference_rows(4)),
    }  # fmt: skip
    compare("f_dpo", tiny_model_dir, tmp_path, settings, range(1 if save == "steps" else 3, steps + 1))


class TerminateAt(TrainerCallback):
    """SIGTERM in the middle of a step."""

    def __init__(self, sigterm, step):
        self.sigterm, self.step = sigterm, step

    def on_step_begin(self, args, state, control, **_):
        self.sigterm.requested = state.global_step == self.step - 1


@pytest.mark.parametrize("rhythm", ["steps", "epoch"])
@pytest.mark.parametrize("step", [2, 3, 5])
def test_sigterm_is_not_to_be_seen_in_the_log(step, rhythm, tiny_model_dir, tmp_path):
    """Step 3 ends an epoch, step 5 the run."""
    settings = {
        "logging_strategy": rhythm, "logging_steps": 4, "eval_strategy": rhythm, "eval_steps": 4, "max_steps": 5,
        "eval_dataset": Dataset.from_list(preference_rows(4)),
    }  # fmt: skip
    whole = build("f_dpo", tiny_model_dir, tmp_path / "whole", **settings)
    whole.train()
    sigterm = StopOnSigterm()
    trainer = build("f_dpo", tiny_model_dir, tmp_path / "cut", callbacks=[TerminateAt(sigterm, step)], **settings)
    trainer.add_callback(sigterm)
    trainer.train()
    assert sigterm.stopped_at == step and trainer.state.global_step == step
    resumed = build("f_dpo", tiny_model_dir, tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    same(whole, resumed)


def test_times_are_the_sum_of_the_parts(tiny_model_dir, tmp_path, monkeypatch):
    """Trainer reads a clock that goes forward by one second a step, and by 1000 seconds between the parts."""
    import time

    now = [1e6]
    monkeypatch.setattr(time, "time", lambda: now[0])

    class Tick(TrainerCallback):
        def on_step_end(self, *_, **__):
            now[0] += 1

    settings = {**SAVING, "max_steps": 5}
    for callbacks in ([Tick(), CutBefore(3)], [Tick(), CutBefore(4)], [Tick()]):
        trainer = build("flat", tiny_model_dir, tmp_path, callbacks=callbacks, **settings)
        resume = any(tmp_path.glob("checkpoint-*"))
        if len(callbacks) == 2:
            with pytest.raises(Cut):
                trainer.train(resume_from_checkpoint=resume)
        else:
            trainer.train(resume_from_checkpoint=resume)
        now[0] += 1000
    (last,) = [entry for entry in trainer.state.log_history if "train_loss" in entry]
    assert last["train_runtime"] == pytest.approx(5)
    assert last["train_steps_per_second"] == pytest.approx(1)
    assert last["train_samples_per_second"] == pytest.approx(4)
    entries = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 1  # step 3


def test_a_checkpoint_without_sums_says_from_where_the_numbers_count(tiny_model_dir, tmp_path, capsys, monkeypatch):
    """As release 0.2.0 wrote them."""
    settings = {**SAVING, "max_steps": 2, "logging_steps": 1}
    monkeypatch.setattr("fdiv.training.sums.RunSumsMixin._save_sums", lambda *_: None)
    build("flat", tiny_model_dir, tmp_path, **settings).train()
    trainer = build("flat", tiny_model_dir, tmp_path, **settings | {"max_steps": 4})
    trainer.train(resume_from_checkpoint=True)
    assert (
        "holds no run_sums.safetensors: train_loss, num_tokens and times count from step 2" in capsys.readouterr().err
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    last = trainer.state.log_history[-1]["train_loss"]
    assert last == pytest.approx(sum(losses[2:]) / 2)


@pytest.mark.smoke
def test_private_hooks_of_transformers_have_the_signatures_relied_on():
    import inspect

    from transformers import Trainer

    def parameters(name):
        return list(inspect.signature(getattr(Trainer, name)).parameters)

    assert parameters("_finalize_training") == ["self", "trial", "num_train_samples", "start_time"]
    assert parameters("_evaluate") == ["self", "trial", "ignore_keys_for_eval", "skip_scheduler"]
    assert "start_time" in parameters("_run_epoch")
    source = inspect.getsource(Trainer)
    assert "start_time=start_time,\n" in source  # passed to `_run_epoch` by its name
    for attribute in ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_num_input_tokens_seen"):
        assert f"self.{attribute} = " in source


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_distillation(share, tiny_model_dir, tmp_path):
    """On the rows' answers, and on a part of the student's own."""
    from tests.support.runs.f_distill import make_teacher, make_trainer, rows

    teacher = make_teacher(tmp_path / "teacher")
    settings = {**SAVING, "max_steps": 5, "on_policy_share": share}

    def made(folder, **options):
        return make_trainer(tiny_model_dir, teacher, rows(), tmp_path / folder, **settings, **options)

    whole = made("whole")
    whole.train()
    for step in (2, 5):
        trainer = made("cut", callbacks=[CutBefore(step)])
        with pytest.raises(Cut):
            trainer.train(resume_from_checkpoint=any((tmp_path / "cut").glob("checkpoint-*")))
    resumed = made("cut")
    resumed.train(resume_from_checkpoint=True)
    same(whole, resumed)
