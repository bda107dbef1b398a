"""How long a request takes on this machine, before anything is loaded: counted tokens over measured speeds.

A forward takes 2 operations per weight and token, a step with LoRA four (forward, and back to the activations), and a
reference two more. How fast this machine multiplies matrices and reads memory is measured for a moment.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from fdiv.catalog import METHODS
from fdiv.eval.unlearning.evaluation import PROFILES
from fdiv.unlearning.config import TemplateConfig
from fdiv.unlearning.request.recipe import Looked, Request, samples_of

__all__ = ["Speed", "estimate", "measured_speed", "parameter_count"]

_EFFICIENCY = 0.6  # of the matrix product alone, for all else that a model does
_FORWARD, _LORA_STEP = 2, 4
_SAMPLED_AT_ONCE = 64


@dataclass(frozen=True)
class Speed:
    """Operations and bytes per second."""

    operations: float
    bytes: float


def measured_speed(seconds: float = 0.3) -> Speed:
    """Of this process's device, by a matrix product and a copy."""
    accelerated = torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator() if accelerated else torch.device("cpu")
    dtype = torch.bfloat16 if accelerated else torch.float32
    size = 4096 if accelerated else 768
    a = torch.ones(size, size, device=device, dtype=dtype)
    b = torch.ones(2**24, device=device, dtype=dtype)

    def rate(run: Any, amount: float) -> float:
        run()
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            run()
            count += 1
        if accelerated:
            torch.accelerator.synchronize()
        return amount * count / (time.perf_counter() - began)

    return Speed(rate(lambda: a @ a, 2.0 * size**3), rate(lambda: b + 1, 2.0 * b.numel() * b.element_size()))


def parameter_count(model: str) -> int:
    """Weights of a model, from its config alone."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from fdiv.models.fetch import find_model

    with init_empty_weights():
        built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(find_model(model)))
    return sum(parameter.numel() for parameter in built.parameters())


def estimate(request: Request, looked: Looked, speed: Speed, parameters: int, epochs: float) -> dict[str, float]:
    """Seconds by part, and their `sum`; the training may stop earlier."""
    per_token = _FORWARD * parameters / (_EFFICIENCY * speed.operations)
    forget = looked.tokens("forget")
    others = sum(looked.tokens(name) for name in ("neighbours", "holdout", "general")) + 600
    answers = sum(text.label_count for text in looked.texts["forget"])
    rows = len(looked.texts["forget"])
    profile = PROFILES[request.measures.get("profile", "quick")]
    scoring = (2 * forget + others) * per_token
    leaks = min(rows, request.measures.get("leak_rows") or rows) * samples_of(request)
    sampling = _sampling(leaks, 1.5 * answers / max(1, rows), speed, parameters, request.bits)
    trainer = METHODS.find(request.method)
    retain = forget if looked.retain_rows or request.sample_retain else 0
    template = forget if issubclass(trainer.config_class, TemplateConfig) else 0
    passes = (_LORA_STEP + _FORWARD * trainer.forget_needs_reference) / _FORWARD
    epoch = (forget + retain + template) * passes * per_token + scoring
    parts = {"before": scoring + forget * per_token + sampling}
    if request.sample_retain:
        asked = 3 * request.sample_retain
        parts = {"sampling retain rows": _sampling(asked, 100, speed, parameters, request.bits), **parts}
    parts[f"training, {epochs:g} epochs"] = epochs * epoch
    parts["after"] = scoring + sampling
    parts["attacks"] = sum(
        _attack(spec, forget, rows, answers, per_token, speed, parameters) for spec in profile.attacks
    )
    return {**parts, "sum": sum(parts.values())}


def _sampling(answers: float, length: float, speed: Speed, parameters: int, bits: int | None) -> float:
    """Each step of a batch reads all weights, or multiplies with them, whichever takes longer."""
    if not answers:
        return 0.0
    batch = min(_SAMPLED_AT_ONCE, answers)
    size = 4 if not torch.accelerator.is_available() else 2
    step = max(size * parameters / speed.bytes, batch * _FORWARD * parameters / (_EFFICIENCY * speed.operations))
    return answers / batch * length * step


def _attack(spec: Any, forget: int, rows: int, answers: int, per_token: float, speed: Speed, parameters: int) -> float:
    """One pass over the forget rows for each thing to measure, and the steps of a relearning."""
    keys = spec if isinstance(spec, dict) else {"name": spec}
    if keys["name"] == "sampling":
        return _sampling(rows * keys.get("samples", 8), 1.5 * answers / max(1, rows), speed, parameters, None)
    stages = keys.get("steps", [0])
    stages = stages if isinstance(stages, list) else [stages]
    batch = min(8, max(1, round(0.1 * rows))) * forget / max(1, rows)
    return (len(stages) * forget + max(stages) * batch * _LORA_STEP / _FORWARD) * per_token
