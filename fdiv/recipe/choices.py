"""Keys of TRL and transformers with a fixed set of values that their own declarations leave free.

A wrong value of such a key is found by them at the first step, or never. `None` (null) is allowed where the type is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

__all__ = ["fixed_choices"]

_GRPO_LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")

_CHOICES: dict[str, tuple[Any, ...]] = {
    "bnb_4bit_quant_storage": ("uint8", "float16", "bfloat16", "float32"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "scale_rewards": ("group", "batch", "none", "True", "False", "true", "false", True, False),
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "vllm_mode": ("server", "colocate"),
    "vllm_model_impl": ("vllm", "transformers", "auto"),
}


@cache
def _from_libraries() -> dict[str, tuple[Any, ...]]:
    """What the installed libraries know: the trackers, the task types of PEFT, the kinds of caches."""
    from peft import TaskType
    from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    return {
        "report_to": ("none", "all", *sorted(INTEGRATION_TO_CALLBACK)),
        "lora_task_type": tuple(task.value for task in TaskType),
        "cache_implementation": tuple(sorted(ALL_CACHE_IMPLEMENTATIONS)),
    }


def fixed_choices(config: type, key: str) -> tuple[Any, ...] | None:
    """The values that `key` of a config of TRL or transformers may have, or each entry of its list; None: free."""
    if key == "loss_type" and any(base.__name__ == "GRPOConfig" for base in config.__mro__):
        return _GRPO_LOSSES
    if key in _CHOICES:
        return _CHOICES[key]
    return _from_libraries().get(key) if key in ("report_to", "lora_task_type", "cache_implementation") else None
