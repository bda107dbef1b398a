"""Small f-DPG runs shared by the trainer tests and by the script that torchrun starts."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fdiv.alignment import FDPGConfig, FDPGTrainer

PROMPTS = ("The quick brown", "Question: what is it", "0 1 2 3", "The")


def even(completion_ids, **_) -> list[float]:
    """1 where most tokens have an even id, else 0: about half of a random model's samples."""
    return [float(sum(token % 2 == 0 for token in ids) * 2 >= len(ids)) for ids in completion_ids]


def length_reward(completion_ids, **_) -> list[float]:
    """A smooth reward."""
    return [sum(token % 7 for token in ids) / (7 * len(ids)) for ids in completion_ids]


HARD = {"name": "pointwise", "scorers": [even]}
SOFT = {"name": "reward", "scorers": [length_reward], "beta": 0.2}


def config(output: Any, **settings: Any) -> FDPGConfig:
    """Float32 on the CPU, 8 completions per step of 4 for each of 2 prompts."""
    defaults: dict[str, Any] = {
        "use_cpu": True, "bf16": False, "per_device_train_batch_size": 8, "num_generations": 4, "report_to": [],
        "max_completion_length": 5, "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "save_strategy": "no",
        "disable_tqdm": True, "gradient_checkpointing": False, "lr_scheduler_type": "constant", "max_grad_norm": 1e9,
    }  # fmt: skip
    return FDPGConfig(str(output), **(defaults | settings))


def trainer(model: Any, output: Any, target: Any = None, *, prompts: Any = PROMPTS, **settings: Any) -> FDPGTrainer:
    """An `FDPGTrainer`; keyword arguments of the trainer itself are told from those of the config by name."""
    own = {k: settings.pop(k) for k in list(settings) if k in OWN}
    if "processing_class" not in own and not isinstance(model, str):
        own["processing_class"] = AutoTokenizer.from_pretrained(model.config._name_or_path or model.name_or_path)
    rows = None if prompts is None else Dataset.from_dict({"prompt": list(prompts)})
    return FDPGTrainer(model, config(output, **settings), rows, target=HARD if target is None else target, **own)


OWN = ("base_model", "peft_config", "rollout_func", "processing_class", "optimizers", "eval_dataset", "callbacks")


def load(path: Any):
    """The model in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def flat(model) -> Tensor:
    """All weights as one vector."""
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def recorded(model_dir: Any, samples: int, seed: int = 0, *, log_probs: bool = True) -> list[dict[str, Any]]:
    """`samples` rollouts of `PROMPTS` each from the model, as `RecordedRollouts` takes them."""
    from fdiv.training.rollouts import record_log_probs

    model, tokenizer = load(model_dir).eval(), AutoTokenizer.from_pretrained(model_dir)
    torch.manual_seed(seed)
    records = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        inputs = torch.tensor([ids] * samples)
        with record_log_probs(model, 1.0) as record:
            output = model.generate(
                inputs, attention_mask=torch.ones_like(inputs), do_sample=True, top_k=0, max_new_tokens=5
            )
        completions = output[:, len(ids) :].tolist()
        eos = tokenizer.eos_token_id
        completions = [c[: c.index(eos) + 1] if eos in c else c for c in completions]
        values = record.of(completions)
        for number, (completion, value) in enumerate(zip(completions, values, strict=True)):
            records.append(
                {"prompt": prompt, "sample": number, "prompt_ids": ids, "completion_ids": completion,
                 "logprobs": value if log_probs else None}
            )  # fmt: skip
    return records
