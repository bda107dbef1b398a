"""Base models in 4 bits (QLoRA): what bitsandbytes does to their weights on a CPU, and must not do while training."""

from __future__ import annotations

from torch import nn

from fdiv.errors import DataError

__all__ = ["keep_trainable_layout"]


def keep_trainable_layout(model: nn.Module) -> None:
    """Keep the 4-bit weights of `model` in the layout that has a backward pass; nothing to do for other models.

    On a CPU with AVX512-BF16, bitsandbytes (0.50.2) rearranges a 4-bit weight at the first forward in evaluation mode
    for a faster product in bfloat16, which has no gradient with respect to its input: an evaluation in the middle of
    training would leave every later gradient wrong, without a word. Call it before the first forward.

    Raises:
        DataError: the weights were rearranged already. They cannot be put back: their scales were rounded.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise DataError(
                "this model in 4 bits has been used for inference on the CPU, and bitsandbytes rearranged its weights "
                f"({name}) into a layout that cannot be trained: load it again, and hand it over unused"
            )
        module.support_avx512bf16_for_cpu = False
