"""Floating-point operations of a training step, and model FLOPs utilisation (MFU)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

# Dense bfloat16 peaks in TFLOP/s, without sparsity, from NVIDIA's data sheets, by a part of the name that torch
# reports. The first match counts, so a longer name stands before a shorter one.
PEAK_TFLOPS = (
    ("H100 80GB HBM3", 989.4),  # SXM
    ("H100 SXM", 989.4),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.5),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("GH200", 989.4),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("L40S", 362.05),
    ("L4", 121.0),
    ("RTX 4090", 165.2),  # accumulating in float32
)


def peak_tflops(device_name: str) -> float | None:
    """The dense bfloat16 peak of a device in TFLOP/s; None where it is not in the table, or is a slice of a device."""
    if "MIG" in device_name:
        return None
    words = f"{device_name} "
    return next((value for name, value in PEAK_TFLOPS if f"{name} " in words or f"{name}-" in words), None)


class Architecture(NamedTuple):
    """What the count needs of a decoder-only model.

    Attributes:
        body: parameters but for the input embedding and the LM head (a tied matrix is the head).
        head: parameters of the LM head, V·D.
        layers: L.
        width: d, query heads times head width.
    """

    body: int
    head: int
    layers: int
    width: int

    @classmethod
    def of(cls, model: Any) -> Architecture:
        """Read off a transformers model."""
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        everything = sum(parameter.numel() for parameter in model.parameters())
        outside = head.numel() + (0 if embedding is head else embedding.numel())
        config = model.config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(everything - outside, head.numel(), config.num_hidden_layers, config.num_attention_heads * head_dim)


@dataclass
class Passes:
    """Forward passes of one step, summed over them.

    Attributes:
        tokens: without padding. scored: of those, positions that the LM head is needed for.
        pairs: Σ S² over the rows, S their lengths.
    """

    tokens: int = 0
    scored: int = 0
    pairs: int = 0

    def flops(self, model: Architecture) -> int:
        """2·body·tokens + 2·head·scored + 4·L·d·Σ S²: one multiply-add per weight and token, and q·k and p·v in full
        (causal masking is not taken off, as in Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""
        attention = 4 * model.layers * model.width * self.pairs
        return 2 * model.body * self.tokens + 2 * model.head * self.scored + attention


def step_flops(model: Architecture, trained: Passes, without_gradient: Passes) -> int:
    """FLOPs of a step: three times a forward for those with gradient, once for the others (references).

    With N = body + head, all tokens scored, rows of length S and no reference it is the usual
    6·N·tokens + 12·L·d·S·tokens. Recomputation, the optimizer, norms and softmax are not counted. The head counts
    where it is needed: at scored positions.
    """
    return 3 * trained.flops(model) + without_gradient.flops(model)


def utilisation(flops: float, seconds: float, peak: float | None) -> float | None:
    """MFU = flops / (seconds · peak), `peak` in TFLOP/s; None without one."""
    return None if peak is None else flops / (seconds * peak * 1e12)


@contextmanager
def counted(*models: torch.nn.Module) -> Iterator[dict[str, Passes]]:
    """Counts the forward passes of `models` in the block: `trained` (with gradient) and `without_gradient`."""
    found = {"trained": Passes(), "without_gradient": Passes()}

    def observe(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        lengths = inputs["attention_mask"].sum(-1)
        labels = inputs.get("shift_labels", inputs.get("labels"))
        passes = found["trained" if torch.is_grad_enabled() else "without_gradient"]
        passes.tokens += int(lengths.sum())
        passes.scored += int(lengths.sum() if labels is None else (labels != -100).sum())
        passes.pairs += int((lengths**2).sum())

    handles = [model.register_forward_pre_hook(observe, with_kwargs=True) for model in models]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
