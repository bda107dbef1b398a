"""Short runs of `FDistillTrainer`: a tiny student, and a teacher of another width and depth over the same tokens."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from fdiv.distillation import FDistillConfig, FDistillTrainer


def rows(count: int = 12) -> list[dict[str, str]]:
    """`count` prompts with completions of uneven lengths."""
    return [
        {
            "prompt": f"Question {i}: what comes after {i * 3}?",
            "completion": f" After {i * 3} comes {i * 3 + 1}." + " Of course." * (i % 3),
        }
        for i in range(count)
    ]


def messages(count: int = 6) -> list[dict[str, Any]]:
    """The same as messages."""
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in rows(count)
    ]


def make_teacher(folder: Path, **options: Any) -> Path:
    """A random teacher with the tokenizer of `tiny_model_dir`, wider and deeper."""
    from fdiv.models.tiny import build_tiny_model

    return build_tiny_model(folder, **{"hidden_size": 96, "layers": 3, "seed": 7, **options})


def make_distant_teacher(folder: Path) -> Path:
    """A teacher of the student's own size that is sure of itself: its logits are four times those of a fresh model, so
    that a student has some way to go."""
    from fdiv.models.tiny import build_tiny_model

    model = AutoModelForCausalLM.from_pretrained(build_tiny_model(folder, seed=1))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4.0)
    model.save_pretrained(folder)
    return folder


def make_trainer(model_dir: Path, teacher_model: Any, data: list[dict[str, Any]], output: Path, **options: Any) -> Any:
    """A trainer in float32 on the CPU; `options` go to it or to its config."""
    names = inspect.signature(FDistillTrainer.__init__).parameters
    passed = {key: options.pop(key) for key in list(options) if key in names}
    defaults = {
        **{"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-3, "on_policy_share": 0.0},
        **{"max_completion_length": 24, "gradient_checkpointing": False, "bf16": False, "use_cpu": True},
        **{"logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True},
    }
    return FDistillTrainer(
        passed.pop("model", None) or AutoModelForCausalLM.from_pretrained(model_dir),
        teacher_model=str(teacher_model) if isinstance(teacher_model, Path) else teacher_model,
        args=FDistillConfig(output_dir=str(output), **(defaults | options)),
        train_dataset=passed.pop("train_dataset", Dataset.from_list(data)),
        processing_class=passed.pop("processing_class", AutoTokenizer.from_pretrained(model_dir)),
        **passed,
    )
