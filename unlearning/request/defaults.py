"""What `fdiv unlearn` sets where the command line does not: the method, its keys, and how LoRA is trained."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fdiv.catalog import METHODS
from fdiv.errors import RecipeError
from fdiv.named import hint, is_path, shown
from fdiv.unlearning.config import UnlearningConfig

__all__ = [
    "DEFAULT_METHOD",
    "LORA",
    "REASON",
    "TRAINING",
    "length_keys",
    "method_keys",
    "retain_choices",
    "unlearning_methods",
]

DEFAULT_METHOD = "npo"
REASON = (
    "bounded below, so that it slows down instead of breaking the model, and with LoRA its reference costs no memory: "
    "it is the base with the adapter off"
)
"""Why `DEFAULT_METHOD`."""

# Keys beside those of `LORA` and `TRAINING`; rates are for LoRA of rank 16, ten to a hundred steps of four rows.
_KEYS: dict[str, dict[str, Any]] = {
    "grad_ascent": {"learning_rate": 2e-4},
    "grad_diff": {"learning_rate": 5e-4},
    "kl_retain": {"learning_rate": 5e-4},
    "simnpo": {"beta": 4.5, "forget_weight": 0.125},
    "flat": {"divergence": "jensen_shannon", "reduction": "log_mean"},
    "pdu": {"retain_epsilon": 0.3, "dual_warmup_epochs": 2},
    "sat_imp": {"retain_weight": 0.1},
}
_RATE = 1e-3
LORA: dict[str, Any] = {
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
}
"""The adapter."""

TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 2,
    "weight_decay": 0.0,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "report_to": "none",
    "eval_strategy": "epoch",
    "eval_on_start": True,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "metric_for_best_model": "selection",
    "load_best_model_at_end": True,
    "utility_floor": 0.9,
}
"""The run; how long it goes on follows from the number of rows (`length_keys`)."""

_STEPS, _EPOCHS = 50, 5


def length_keys(rows: int, batch_size: int) -> dict[str, int]:
    """At most 5 epochs, of few rows as many as make 50 steps. There is no patience: a method that has forgotten at the
    cost of the neighbours gets them back with the retain rows, where there are any."""
    return {"num_train_epochs": max(_EPOCHS, -(-_STEPS // -(-rows // batch_size)))}


def unlearning_methods() -> dict[str, type]:
    """Name → trainer of the methods that unlearn."""
    found = {name: METHODS.find(name) for name in METHODS if METHODS[name].startswith("fdiv.unlearning.")}
    return {name: trainer for name, trainer in found.items() if issubclass(trainer.config_class, UnlearningConfig)}


def retain_choices(trainer: type) -> tuple[str, ...]:
    """The retain terms of a method, its default first."""
    entry = next(entry for entry in fields(trainer.config_class) if entry.name == "retain_term")
    return tuple(dict.fromkeys((entry.default, *entry.metadata.get("choices", ()))))


# What a method has to leave out where there is nothing to keep.
_WITHOUT_RETAIN: dict[str, dict[str, Any]] = {"jensun_pp": {"balance_gradients": False}}


def method_keys(name: str, has_retain: bool, layers: int) -> dict[str, Any]:
    """The recipe keys of a method, with a retain term where there are retain rows.

    Args:
        name: of a method, or `module:attribute`. has_retain: whether there are retain rows. layers: of the model.

    Raises:
        RecipeError: no method that unlearns, or one that needs retain rows where there are none.
    """
    known = sorted(unlearning_methods())
    if name not in METHODS and not is_path(name):
        raise RecipeError(f"--method: unknown method {shown(name)}; {hint(name, known)}")
    trainer = METHODS.find(name, "--method", error=RecipeError)
    if not issubclass(trainer.config_class, UnlearningConfig):
        raise RecipeError(f"--method {name}: not a method that unlearns; those are {', '.join(known)}")
    choices = retain_choices(trainer)
    keys = {"learning_rate": _RATE, **_KEYS.get(name, {})}
    if has_retain:
        keys["retain_term"] = next((choice for choice in choices if choice != "none"), "none")
    elif "none" in choices:
        keys |= {"retain_term": "none", **_WITHOUT_RETAIN.get(name, {})}
    else:
        free = ", ".join(sorted(n for n, t in unlearning_methods().items() if "none" in retain_choices(t)))
        raise RecipeError(
            f"--method {name} needs rows to keep: give --retain FILE, let the model answer neighbouring questions "
            f"with --sample_retain N, or take a method that can do without: {free}"
        )
    if name == "rmu":
        keys |= {"layer": max(0, min(layers - 2, round(0.4 * layers))), "steering_coefficient": 6.5}
    return keys
