"""Helpers of the D²O tests: rows, a trainer on a tiny model, and log-probabilities computed another way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from fdiv.alignment import D2OConfig, D2OTrainer

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2,
    "num_generations": 3, "max_completion_length": 5, "lr_scheduler_type": "constant", "logging_steps": 1,
    "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "report_to": [], "save_strategy": "no",
    "disable_tqdm": True, "seed": 3,
}  # fmt: skip


def negative_rows(count: int = 8, anchors: int = 0) -> Dataset:
    """Prompts with a rejected answer and, with `anchors`, as many given answers, all of different lengths."""
    rows = [{"prompt": f"Question: what is {i}?", "rejected": " no" * (1 + i % 3) + "."} for i in range(count)]
    if anchors:
        rows = [
            {**row, "anchors": [f" It is {i + k}" + " really" * k for k in range(anchors)]}
            for i, row in enumerate(rows)
        ]
    return Dataset.from_list(rows)


def make_trainer(
    model: Any, rows: Dataset, output_dir: Path, *, eval_dataset: Any = None, **options: Any
) -> D2OTrainer:
    """A `D2OTrainer` with `SETTINGS`; trainer arguments and config keys mixed in `options`."""
    arguments = ("harmfulness_func", "ref_model_pos", "ref_model_neg", "rollout_func", "peft_config", "callbacks")
    arguments += ("processing_class",)
    given = {name: options.pop(name) for name in arguments if name in options}
    config = D2OConfig(output_dir=str(output_dir), **{**SETTINGS, **options})
    model = str(model) if isinstance(model, Path) else model
    return D2OTrainer(model, args=config, train_dataset=rows, eval_dataset=eval_dataset, **given)


def history(trainer: Any, key: str) -> torch.Tensor:
    return torch.tensor([entry[key] for entry in trainer.state.log_history if key in entry])


def text_log_prob(model: torch.nn.Module, model_dir: Path, prompt: str, completion: str) -> float:
    """log π(completion + eos | prompt), one text at a time, from the model's own logits."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompt_ids = tokenizer(prompt)["input_ids"]
    return ids_log_prob(model, prompt_ids, tokenizer(completion)["input_ids"] + [tokenizer.eos_token_id])


@torch.no_grad()
def ids_log_prob(model: torch.nn.Module, prompt_ids: list[int], ids: list[int], temperature: float = 1.0) -> float:
    """log π(ids | prompt_ids) at `temperature`."""
    logits = model(torch.tensor([[*prompt_ids, *ids]])).logits[0].double() / temperature
    log_probs = logits.log_softmax(-1)
    return sum(log_probs[len(prompt_ids) - 1 + i, token].item() for i, token in enumerate(ids))


def start_model(model_dir: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_dir).eval()
