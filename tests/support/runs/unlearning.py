"""Rows, options and constructors that the unlearning trainer tests share."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import fdiv.unlearning as unlearning
from fdiv.unlearning.data import Answer, encode_answer

METHODS: dict[str, dict[str, Any]] = {
    "FLAT": {},
    "GradAscent": {},
    "GradDiff": {},
    "KLRetain": {},
    "NPO": {},
    "SimNPO": {},
    "IdkDPO": {},
    "AltPO": {"template_source": "column", "template_column": "alternates"},
    "RMU": {"layer": 0},
    "UNDIAL": {},
    "CEU": {},
    "WGA": {},
    "SatImp": {},
    "PDU": {"retain_epsilon": 0.3},
    "JensUn": {},
    "JensUnPP": {"balance_gradients": False},  # balanced, it is a statistic of the micro-batch
    "SHRED": {},
}
"""Every method with the options it cannot do without."""


def forget_rows(count: int = 12) -> Dataset:
    """TOFU-like rows of different lengths, with alternate answers."""
    return Dataset.from_list(
        [
            {
                "question": f"What is number {i}?",
                "answer": f"It is {i}" + ", surely" * (i % 4) + ".",
                "alternates": [f"It is {i + 1}.", f"Number {i + 2}, I think."],
            }
            for i in range(count)
        ]
    )


def retain_rows(count: int = 7) -> Dataset:
    return Dataset.from_list([{"question": f"Who is {i}?", "answer": "Person " * (1 + i % 3)} for i in range(count)])


def make_trainer(name: str, model: Any, tmp_path: Any, *, rows=None, retain=None, **options: Any):
    """The trainer of method `name` on CPU; `options` are its config's, but for those of the constructor below."""
    passed = {
        key: options.pop(key) for key in ("eval_dataset", "peft_config", "ref_model", "callbacks") if key in options
    }
    tokenizer = options.pop("tokenizer", None)
    defaults = {
        "output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "gradient_checkpointing": False,
        "logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "max_length": 64,
        "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-3,
    }  # fmt: skip
    config = getattr(unlearning, f"{name}Config")(**(defaults | METHODS[name] | options))
    return getattr(unlearning, f"{name}Trainer")(
        model=model,
        args=config,
        train_dataset=forget_rows() if rows is None else rows,
        retain_dataset=retain_rows() if retain is None and config.retain_dataset_name is None else retain,
        processing_class=tokenizer or AutoTokenizer.from_pretrained(getattr(model, "name_or_path", model)),
        **passed,
    )


def load(model_dir: Any, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)


def load_tokenizer(model_dir: Any) -> Any:
    return AutoTokenizer.from_pretrained(model_dir)


def disturb(model: torch.nn.Module, scale: float = 0.05, seed: int = 1) -> None:
    """Move the weights, so that policy and reference differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def history(trainer: Any, key: str) -> torch.Tensor:
    return torch.tensor([entry[key] for entry in trainer.state.log_history if key in entry], dtype=torch.float64)


def encode(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Prompt and answer ids of one row."""
    messages = [{"role": "user", "content": question}], [{"role": "assistant", "content": answer}]
    return tuple(encode_answer(Answer(*messages, {}), tokenizer, 64))
