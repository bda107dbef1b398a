"""Copies of a model that attacks may change, with the weights shared that they leave alone."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import TYPE_CHECKING

from fdiv.eval.unlearning.attacks.attacked import NotApplicable
from fdiv.inference.batches import collective_forward

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["adapter_parameters", "copied", "has_adapter", "merged_copy"]


def has_adapter(model: nn.Module) -> bool:
    """Whether it is a PEFT model."""
    return hasattr(model, "peft_config")


def adapter_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of the active adapters of a PEFT model."""
    active = model.active_adapter
    active = {active} if isinstance(active, str) else set(active)
    # The adapter's name is a part of the key, and its last part for embeddings, IA3 and trainable tokens.
    return {name for name, _ in model.named_parameters() if active & set(name.split("."))}


def copied(model: PreTrainedModel, changed: Callable[[str], bool] = lambda name: True) -> PreTrainedModel:
    """A copy of `model` in evaluation mode, frozen in nothing: what `changed(name)` says of a parameter is copied, the
    others are shared with the original, and so are weights tied to them.

    Raises:
        NotApplicable: weights sharded over processes (ZeRO-3, FSDP) or spread over devices.
    """
    spread = getattr(model, "hf_device_map", None) or {}
    if collective_forward() or len(set(map(str, spread.values()))) > 1:
        raise NotApplicable("the weights are sharded or spread over devices: attack the saved model on one device")
    shared = {id(parameter): parameter for name, parameter in model.named_parameters() if not changed(name)}
    twin = copy.deepcopy(model, shared)
    for module in twin.modules():
        # A patched forward (the fused head, autocast) is a method whose closure still calls the original's.
        if isinstance(vars(module).get("forward"), types.MethodType):
            del module.forward
    return twin.eval()


def merged_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A plain copy; an adapter is added to the weights.

    Raises:
        NotApplicable: see `copied`; an adapter that cannot be added to the weights.
    """
    if not has_adapter(model):
        return copied(model)
    from fdiv.inference.tied_weights import adapter_on_tied_weights

    tied = adapter_on_tied_weights(model)
    if tied is not None:
        raise NotApplicable(f"the adapter changes {tied} of a model with tied embeddings: it cannot be merged")
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        raise NotApplicable("the base is loaded in 4 or 8 bits: merge the adapter with `fdiv merge`, and attack that")
    if not hasattr(model, "merge_and_unload") or model.active_peft_config.is_prompt_learning:
        raise NotApplicable("the adapter adds no weights that could be merged")
    return copied(model).merge_and_unload()
