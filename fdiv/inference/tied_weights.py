"""Adapters that part input embeddings and head of a model whose weights they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["adapter_on_tied_weights"]


def adapter_on_tied_weights(model: nn.Module) -> str | None:
    """The module of a `PeftModel` whose adapter parts input embeddings and head that the base model shares.

    Such an adapter (LoRA on `embed_tokens`, a head in `modules_to_save`) cannot be written as weights of the base: one
    matrix would have to hold two values. None where there is no such module; trainable tokens change both alike.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    if None in ends or not getattr(base.config.get_text_config(), "tie_word_embeddings", False):
        return None
    for name, module in base.named_modules():
        if any(module is end for end in ends) and isinstance(module, (LoraLayer, ModulesToSaveWrapper)):
            return name
    return None
