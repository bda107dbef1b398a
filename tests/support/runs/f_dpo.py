"""Short f-DPO and DPO runs that the f-DPO tests compare."""

from __future__ import annotations

import inspect

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOTrainer

from fdiv.alignment import FDPOConfig, FDPOTrainer
from tests.support.same_run import PLAIN_STEPS, assert_same_weights

COMPARABLE = {**PLAIN_STEPS, "learning_rate": 0.05}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0}


def preference_rows(count: int = 24) -> list[dict[str, str]]:
    """`count` preference pairs of uneven lengths."""
    return [
        {
            "prompt": f"Question {i}: what comes after {i * 3}?",
            "chosen": f" After {i * 3} comes {i * 3 + 1}." + " Of course." * (i % 3),
            "rejected": f" No idea{', sorry' * (i % 4)}.",
        }
        for i in range(count)
    ]


def _args(config, tmp_path, **options):
    options = {
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    } | options
    return config(output_dir=str(tmp_path), **options)


def make_trainer(model_dir, rows, tmp_path, *, trainer=FDPOTrainer, config=FDPOConfig, model=None, **kwargs):
    """A trainer on the tiny model of `model_dir`; other arguments go to the trainer or to its config."""
    names = inspect.signature(DPOTrainer.__init__).parameters
    passed = {key: kwargs.pop(key) for key in list(kwargs) if key in names}
    return trainer(
        model if model is not None else AutoModelForCausalLM.from_pretrained(model_dir),
        args=_args(config, tmp_path, **kwargs),
        train_dataset=rows,
        processing_class=passed.pop("processing_class", AutoTokenizer.from_pretrained(model_dir)),
        **passed,
    )


def run(*args, **kwargs):
    """`make_trainer`, trained."""
    trainer = make_trainer(*args, **kwargs)
    trainer.train()
    return trainer


def history(trainer, key: str) -> torch.Tensor:
    """The logged values of `key`, in order."""
    return torch.tensor([entry[key] for entry in trainer.state.log_history if key in entry], dtype=torch.float64)


def assert_same_run(ours, theirs, tolerance: float = 1e-5) -> None:
    """Losses, gradient norms and final weights after SGD agree within `tolerance`, and training did something.

    The default is the rounding of a sum of log-probabilities near -100, and of gradients of norm 4.
    """
    for key in ("loss", "grad_norm"):
        assert len(history(ours, key)) >= 10
        torch.testing.assert_close(history(ours, key), history(theirs, key), atol=tolerance, rtol=tolerance)
    assert_same_weights(ours, theirs, tolerance)
    assert history(ours, "loss")[-1] < 0.65  # something was trained
