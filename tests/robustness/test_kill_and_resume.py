"""Killed with SIGKILL, at a step or in the middle of a save, and resumed: the run without interruption."""

import os
import random
import signal

import numpy as np
import pytest
import torch

from fdiv.training.checkpoints import STAGING, checkpoint_fault, checkpoint_folders
from tests.support.processes import run
from tests.support.runs.all_trainers import EVERY, build, flat_weights, losses

SETTINGS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
MIDDLE_OF_ROLLOUTS = {"num_iterations": 2, "save_steps": 1, "max_steps": 4}


def train_and_die(name, model_dir, output, death, at, settings):
    """Train until optimizer step `at` begins, or until the checkpoint of step `at` is being written, then SIGKILL."""
    from transformers import TrainerCallback

    import fdiv.training.resume

    class Die(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if death == "step" and state.global_step == at:
                os.kill(os.getpid(), signal.SIGKILL)

    trainer = build(name, model_dir, output, callbacks=[Die()], **settings)
    publish, save_rng = fdiv.training.resume.publish, trainer._save_rng_state

    def dying_publish(*arguments):
        if trainer.state.global_step == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return publish(*arguments)

    def dying_save(folder):
        if trainer.state.global_step == at:
            os.kill(os.getpid(), signal.SIGKILL)
        save_rng(folder)

    if death == "before the rename":
        fdiv.training.resume.publish = dying_publish
    elif death == "half written":
        trainer._save_rng_state = dying_save
    trainer.train()


def killed(*arguments):
    """Run `train_and_die` in a process of its own."""
    ended = run(train_and_die, *arguments)
    assert ended.codes == [-signal.SIGKILL], ended.stderr


def finish(trainer, resume=None):
    """Train; what came out, and what the three random streams give next."""
    trainer.train(resume_from_checkpoint=resume)
    draws = (random.random(), float(np.random.rand()), torch.rand(1).item())
    return losses(trainer), flat_weights(trainer), draws


def compare(name, model_dir, tmp_path, death, at, settings):
    whole = finish(build(name, model_dir, tmp_path / "whole", **settings))
    killed(name, model_dir, tmp_path / "killed", death, at, settings)
    steps = [int(folder.name.split("-")[1]) for folder in checkpoint_folders(tmp_path / "killed")]
    assert max(steps) < at + (death == "step")  # the checkpoint that was being written is not there
    assert all(checkpoint_fault(folder) is None for folder in checkpoint_folders(tmp_path / "killed"))
    resumed = finish(build(name, model_dir, tmp_path / "killed", **settings), resume=True)
    assert len(whole[0]) == settings["max_steps"]
    assert resumed[0] == whole[0]
    assert torch.equal(resumed[1], whole[1])
    assert resumed[2] == whole[2]
    assert not (tmp_path / "killed" / STAGING).exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_killed_at_a_random_step(name, tiny_model_dir, tmp_path):
    compare(name, tiny_model_dir, tmp_path, "step", random.Random(name).choice([2, 3, 4, 5]), SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("death", ["half written", "before the rename"])
@pytest.mark.parametrize("name", EVERY)
def test_killed_in_the_middle_of_a_save(name, death, tiny_model_dir, tmp_path):
    compare(name, tiny_model_dir, tmp_path, death, 4, SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [("dph", MIDDLE_OF_ROLLOUTS), ("dph", {"steps_per_generation": 2, "save_steps": 1, "max_steps": 4})],
    ids=["dph-iterations", "dph-steps"],
)
def test_killed_between_two_generations(name, settings, tiny_model_dir, tmp_path):
    """The checkpoint holds the rollouts that are still to be trained on."""
    settings = {**SETTINGS, **settings}
    compare(name, tiny_model_dir, tmp_path, "step", 3, settings)
    assert (tmp_path / "killed" / "checkpoint-3" / "rollouts_0.safetensors").is_file()
    assert not (tmp_path / "killed" / "checkpoint-2" / "rollouts_0.safetensors").is_file()
