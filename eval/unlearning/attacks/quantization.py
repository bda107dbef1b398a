"""Quantisation: rounding the weights can undo an unlearning that moved them by less than a step.

Zhang et al. 2024 (arXiv:2410.16454): models unlearned with small learning rates answer again after rounding to 4 bits.
The rounded weights are written back in the model's own number type, so everything else runs as before, on any device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fdiv.errors import DataError
from fdiv.eval.unlearning.attacks.attacked import Attacked, NotApplicable, Row
from fdiv.eval.unlearning.attacks.copies import merged_copy

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Quantization", "int4", "int8", "nf4", "rounded"]


def rounded(weight: Tensor, bits: int, group_size: int | None = None, symmetric: bool = True) -> Tensor:
    r"""Round-to-nearest of a matrix: each group of a row of `weight` has its own scale.

    Symmetric: s = max|w| / (2^{b−1}−1), w' = s·round(w/s). Asymmetric: s = (max(w,0) − min(w,0)) / (2^b−1),
    z = round(−min(w,0)/s), w' = s·(clip(round(w/s) + z, 0, 2^b−1) − z). A group of zeros stays so.

    Args:
        weight: `[..., in]`, of any float type; computed in float32.
        bits: b, 2 to 8.
        group_size: weights of a row that share a scale; None: the whole row (per-channel).
        symmetric: see above.

    Returns:
        A new tensor of the shape and type of `weight`.
    """
    width = weight.shape[-1]
    size = width if group_size is None else min(group_size, width)
    groups = torch.nn.functional.pad(weight.detach().float(), (0, -width % size)).unflatten(-1, (-1, size))
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = groups.abs().amax(-1, keepdim=True) / top
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        result = (groups / scale).round().clamp(-top, top) * scale
    else:
        top = 2**bits - 1
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / top
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = (-low / scale).round()
        result = (((groups / scale).round() + zero).clamp(0, top) - zero) * scale
    return result.flatten(-2)[..., :width].to(weight.dtype)


def _nf4(weight: Tensor, group_size: int) -> Tensor:
    """bitsandbytes' NF4 and back."""
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError as error:
        raise NotApplicable(f"nf4 needs bitsandbytes ({error}): install fdiv[qlora], or take int4") from error
    packed, state = quantize_4bit(weight.detach().contiguous(), blocksize=group_size, quant_type="nf4")
    return dequantize_4bit(packed, state).to(weight.dtype)


@dataclass(frozen=True)
class Quantization:
    """Rounds every matrix of a copy of the model; an adapter is added to the weights first.

    Args:
        bits: 2 to 8; of `kind: integer`.
        group_size: weights of a row that share a scale; None: the whole row.
        symmetric: whether the levels lie evenly around 0.
        kind: `integer`: round to nearest (`rounded`); `nf4`: the 4-bit code of bitsandbytes.
        head: round the output head too (and the embedding where the two are tied); by default neither, as
            bitsandbytes, GPTQ and AWQ leave them.
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = True
    kind: Literal["integer", "nf4"] = "integer"
    head: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("integer", "nf4"):
            raise DataError(f"kind={self.kind!r}: choose integer or nf4")
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise DataError(f"bits={self.bits!r}: must be a number from 2 to 8")
        if self.group_size is not None and (not isinstance(self.group_size, int) or self.group_size < 1):
            raise DataError(f"group_size={self.group_size!r}: must be at least 1, or null for whole rows")

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, seed: int
    ) -> Attacked:
        """The rounded model. `seed` has no influence."""
        twin = merged_copy(model)
        count = 0
        with torch.no_grad():
            for weight, transposed in _matrices(twin, self.head):
                source = weight.T if transposed else weight
                result = self._rounded(source)
                weight.copy_(result.T if transposed else result)
                count += weight.numel()
        total = sum(parameter.numel() for parameter in twin.parameters())
        if not count:
            raise NotApplicable("the model has no matrix of floating-point numbers: it is quantised already")
        bits = "nf4" if self.kind == "nf4" else f"{self.bits} bits"
        return Attacked(twin, rows, notes=(f"{count / total:.0%} of the parameters rounded to {bits}",))

    def _rounded(self, weight: Tensor) -> Tensor:
        if self.kind == "nf4":
            return _nf4(weight, self.group_size or 64)
        return rounded(weight, self.bits, self.group_size, self.symmetric)


def _matrices(model: nn.Module, head: bool) -> Iterator[tuple[Tensor, bool]]:
    """(weight, whether it is stored [in, out]) of every linear layer, once each; experts in one tensor
    [experts, ..., ...] are rounded along its last axis."""
    from transformers.pytorch_utils import Conv1D

    ends = [part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    seen = set() if head else {id(weight) for weight in ends}
    output = model.get_output_embeddings()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            linear = name == "weight" and (isinstance(module, torch.nn.Linear | Conv1D) or module is output)
            if not (linear or weight.ndim == 3) or id(weight) in seen or not weight.is_floating_point():
                continue
            seen.add(id(weight))
            yield weight, isinstance(module, Conv1D)


def int8(group_size: int | None = None, symmetric: bool = True, head: bool = False) -> Quantization:
    """8-bit round-to-nearest, by default with a scale per output channel."""
    return Quantization(8, group_size, symmetric, head=head)


def int4(group_size: int | None = 128, symmetric: bool = True, head: bool = False) -> Quantization:
    """4-bit round-to-nearest, by default with a scale per 128 weights of an output channel, as GPTQ and AWQ store."""
    return Quantization(4, group_size, symmetric, head=head)


def nf4(group_size: int = 64, head: bool = False) -> Quantization:
    """bitsandbytes' NF4 (Dettmers et al. 2023, arXiv:2305.14314), a scale per `group_size` (64) weights."""
    return Quantization(4, group_size, kind="nf4", head=head)
