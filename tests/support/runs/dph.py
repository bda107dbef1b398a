"""Small DPH runs shared by the trainer tests and by the script that torchrun starts."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from fdiv.models.fingerprints import tokenizer_fingerprint, weights_fingerprint
from fdiv.models.logprobs import token_scores
from fdiv.rl import DPHConfig, DPHTrainer
from fdiv.rl.dph.rehearsal import RehearsalCache, RehearsalHeader, RehearsalRow
from tests.support.runs.f_dpg import PROMPTS, flat, recorded

__all__ = ["PROMPTS", "cache", "correct", "flat", "load", "recorded", "reward", "sgd", "trainer", "trl_trainer"]


def reward(completion_ids, **_) -> list[float]:
    """The share of even tokens: different within a group."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def correct(completion_ids, **_) -> list[float]:
    """1 where the first token is even."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def load(path: Any):
    """The model in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def settings_of(**settings: Any) -> dict[str, Any]:
    """Float32 on the CPU, 16 completions per step: 4 for each of 4 prompts."""
    defaults: dict[str, Any] = {
        "use_cpu": True, "bf16": False, "per_device_train_batch_size": 16, "num_generations": 4, "report_to": [],
        "max_completion_length": 5, "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "save_strategy": "no",
        "disable_tqdm": True, "gradient_checkpointing": False, "lr_scheduler_type": "constant", "max_grad_norm": 1e9,
        "shuffle_dataset": False,
    }  # fmt: skip
    return defaults | settings


def sgd(model, lr: float = 1.0):
    """SGD with a constant rate: at rate 1 the change of the weights is minus the gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


_OWN = ("peft_config", "rollout_func", "processing_class", "optimizers", "eval_dataset", "callbacks", "rehearsal")


def trainer(model: Any, output: Any, *, rewards: Any = reward, prompts: Any = PROMPTS, **settings: Any) -> DPHTrainer:
    """A `DPHTrainer`; keyword arguments of the trainer itself are told from those of the config by name."""
    own = {key: settings.pop(key) for key in list(settings) if key in _OWN}
    if "processing_class" not in own and not isinstance(model, str):
        own["processing_class"] = AutoTokenizer.from_pretrained(model.config._name_or_path)
    args = DPHConfig(str(output), **settings_of(**settings))
    return DPHTrainer(model, args, Dataset.from_dict({"prompt": list(prompts)}), reward_funcs=rewards, **own)


def trl_trainer(model: Any, output: Any, *, rewards: Any = reward, **settings: Any) -> GRPOTrainer:
    """TRL's own, on the same rows."""
    own = {key: settings.pop(key) for key in list(settings) if key in _OWN}
    if "processing_class" not in own and not isinstance(model, str):
        own["processing_class"] = AutoTokenizer.from_pretrained(model.config._name_or_path)
    args = GRPOConfig(str(output), **settings_of(**settings))
    return GRPOTrainer(model, rewards, args, Dataset.from_dict({"prompt": list(PROMPTS)}), **own)


def cache(
    model_dir: Any, rows: int = 6, *, model: Any = None, temperature: float = 1.0, shift: float = 0.0, **header: Any
):
    """A `RehearsalCache` of `rows` completions of several lengths, scored by the model itself (or by `model`).

    `shift` is added to the log-probability of every second token, so that the log-ratio does not start at 0.
    """
    model, tokenizer = (model or load(model_dir)).eval(), AutoTokenizer.from_pretrained(model_dir)
    texts = ("quick brown fox", "The capital of France", "I do not", "0 1 2", "dog", "Rome. Answer: four")
    made = []
    for number in range(rows):
        prompt = tokenizer(PROMPTS[number % len(PROMPTS)])["input_ids"]
        ids = [*tokenizer(texts[number % len(texts)])["input_ids"][: 2 + number], tokenizer.eos_token_id]
        full = torch.tensor([prompt + ids])
        mask = torch.ones_like(full)
        counted = mask.clone()
        counted[:, : len(prompt)] = 0
        with torch.no_grad():
            scores = token_scores(model, full, mask, counted, fused=False, temperature=temperature)
        values = scores.log_probs[0, len(prompt) - 1 :].tolist()
        values = [min(0.0, value - shift * (place % 2 == 0)) for place, value in enumerate(values)]
        made.append(RehearsalRow(PROMPTS[number % len(PROMPTS)], prompt, ids, values, number))
    fields = {"tokenizer": tokenizer_fingerprint(tokenizer), "model": weights_fingerprint(model)}
    return RehearsalCache(RehearsalHeader(**(fields | {"temperature": temperature} | header)), made)
