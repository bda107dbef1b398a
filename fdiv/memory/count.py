"""Weights and activations of a model and one micro-batch, counted on tensors that have shapes and no memory."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fdiv.errors import RecipeError
from fdiv.files import one_line

if TYPE_CHECKING:
    from fdiv.memory.step_shape import StepShape

__all__ = ["ModelCount", "Weight", "cache_bytes", "count_model", "count_saved"]


class Weight(NamedTuple):
    """One parameter: its shape, the bytes of an element, whether it is trained, whether it is an embedding."""

    shape: tuple[int, ...]
    itemsize: int
    trained: bool
    embedding: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass
class ModelCount:
    """What a model and one micro-batch hold, in bytes, on one process that shards nothing.

    Attributes:
        weights: the distinct parameters; tied ones stand once.
        stored: bytes of all parameters and buffers as they are held (fewer than by `weights` where quantised).
        activations: tensors saved for the backward pass; None: could not be traced, see `reason`.
        recomputed: what one layer saves while gradient checkpointing recomputes it; 0 without.
        cache: keys and values of the completions that transformers samples at once.
        layers: of the model.
        reason: why `activations` is None.
    """

    weights: list[Weight]
    stored: int
    activations: int | None
    recomputed: int = 0
    cache: int = 0
    layers: int = 1
    reason: str = ""

    def held_in(self, itemsize: int) -> ModelCount:
        """The same activations with the weights held in `itemsize` bytes each."""
        more = sum(weight.size * (itemsize - weight.itemsize) for weight in self.weights)
        weights = [weight._replace(itemsize=itemsize) for weight in self.weights]
        return replace(self, weights=weights, stored=self.stored + more)

    @property
    def trained(self) -> list[Weight]:
        """The parameters that get a gradient."""
        return [weight for weight in self.weights if weight.trained]


def count_saved(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes of the tensors that autograd saves while `forward` runs, without the model's parameters and buffers.

    Each storage counts once, however many views of it are saved.
    """
    held = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}  # holds them, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    count = sum(storage.nbytes() for storage in saved.values())
    del output
    return count


def count_model(
    config: Any,
    shape: StepShape,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    mixed: torch.dtype | None = None,
    peft_config: Any = None,
    checkpointing: bool = False,
    checkpointing_kwargs: Mapping[str, Any] | None = None,
    disable_dropout: bool = True,
    bits: int | None = None,
    freeze: Callable[[nn.Module], None] | None = None,
) -> ModelCount:
    """Count weights and activations of the model that `config` describes, without memory for either.

    Args:
        config: the model's config, from `transformers.AutoConfig`.
        shape: the micro-batch. It is counted padded, with a mask, as batches of uneven rows are.
        dtype: number type of the loaded weights. mixed: that of autocast, if there is any.
        attention: `attn_implementation`; None is `sdpa`. `eager` and `sdpa` are traced; others are taken for flash
            attention, which keeps no mask and does not repeat keys and values.
        peft_config: adapter to add. bits: 4 or 8 for weights quantised by bitsandbytes.
        checkpointing, checkpointing_kwargs: gradient checkpointing and its options.
        disable_dropout: whether the trainer switches dropout off.
        freeze: called on the model, to freeze what the method does not train.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = _built(config, dtype, attention, peft_config, disable_dropout)
    if freeze is not None:
        freeze(model)
    if bits is not None:  # TRL keeps the adapter of a quantised base in bfloat16
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    with FakeTensorMode():
        _place(model)
        weights, stored = _weights(model, bits)
        layers = config.get_text_config().num_hidden_layers
        count = ModelCount(
            weights,
            stored,
            None,
            cache=cache_bytes(config, shape.sampled_rows, shape.sampled_tokens, (mixed or dtype).itemsize),
            layers=layers,
        )
        log = logging.getLogger("torch._subclasses.fake_tensor")  # prints a traceback of what is reported here
        level = log.level
        log.setLevel(logging.CRITICAL)
        try:
            plain = count_saved(model, lambda: _forward(model, config, shape, mixed))
            count.activations = plain
            if checkpointing:
                _enable_checkpointing(model, checkpointing_kwargs)
                count.activations = count_saved(model, lambda: _forward(model, config, shape, mixed))
                count.recomputed = max(0, plain - count.activations) // layers
        except RuntimeError as error:  # an operation whose shape depends on the data, as in a mixture of experts
            count.activations, count.reason = None, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        finally:
            log.setLevel(level)
    return count


def _built(config: Any, dtype: torch.dtype, attention: str | None, peft_config: Any, disable_dropout: bool) -> Any:
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import disable_dropout_in_model

    attention = _traceable(attention or "sdpa")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        if peft_config is not None:
            from peft import get_peft_model

            try:
                model = get_peft_model(model, peft_config)
            except ValueError as error:
                raise RecipeError(f"the adapter does not fit the model: {one_line(error)}") from error
    if disable_dropout:
        disable_dropout_in_model(model)
    return model.train()


def _place(model: nn.Module) -> None:
    """Exchange the tensors of a model on the meta device for those of the active fake mode on the CPU, ties kept.

    Not `to_empty`, which refuses fake tensors that something else refers to, as PEFT's layers do.
    """
    placed: dict[int, Tensor] = {}

    def exchange(tensor: Tensor) -> Tensor:
        if id(tensor) not in placed:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            trained = isinstance(tensor, nn.Parameter)
            placed[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if trained else empty
        return placed[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: exchange(tensor) for name, tensor in tensors.items() if tensor is not None})


_UNMASKED = "fdiv_unmasked"  # transformers takes a name with "flash" in it for a kernel to fetch


def _traceable(attention: str) -> str:
    """`attention` where fake tensors run it, else the name of a stand-in that saves what flash attention saves."""
    from transformers import AttentionInterface

    if attention in ("eager", "sdpa"):
        return attention

    def flash(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register(_UNMASKED, flash)
    return _UNMASKED


def _enable_checkpointing(model: Any, options: Mapping[str, Any] | None) -> None:
    """As Trainer does it, before transformers 5.23 and since."""
    options = dict(options or {})
    every = {"every_n_layers": options.pop("every_n_layers")} if "every_n_layers" in options else {}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None, **every)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None, **every)


def _forward(model: Any, config: Any, shape: StepShape, mixed: torch.dtype | None) -> Any:
    """One micro-batch through the model and the head that its loss takes."""
    from fdiv.models.logprobs import enable_fused_head, takes_position_ids

    rows, tokens = shape.rows, shape.tokens
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    # Four-dimensional, as the models make it of a padded batch; they pass such a mask on unchanged.
    inputs = {"input_ids": ids, "attention_mask": torch.ones(rows, 1, tokens, tokens, dtype=torch.bool)}
    if takes_position_ids(model):
        inputs["position_ids"] = torch.zeros(rows, tokens, dtype=torch.long)
    autocast = contextlib.nullcontext() if mixed is None else torch.autocast("cpu", dtype=mixed)
    if shape.on_logits is None:
        enable_fused_head(model, outputs=("log_probs", "entropy"))
        with autocast:
            return model(**inputs, labels=ids, use_cache=False, fused_lm_head=True)
    with autocast:
        logits = model(**inputs, use_cache=False).logits[:, :-1]
    scores = logits.reshape(-1, logits.size(-1)).float()
    chosen = scores.gather(-1, ids[:, 1:].reshape(-1, 1)) - scores.logsumexp(-1, keepdim=True)
    return chosen, shape.on_logits(scores)


def _weights(model: nn.Module, bits: int | None) -> tuple[list[Weight], int]:
    """The distinct parameters, and the bytes of all parameters and buffers as they are held."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    quantised: set[int] = set()
    if bits is not None:
        head = model.get_output_embeddings()
        linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
        quantised = {id(module.weight) for module in linear if not module.weight.requires_grad}
    weights, stored = [], sum(buffer.nbytes for buffer in model.buffers())
    for parameter in model.parameters():
        weights.append(
            Weight(tuple(parameter.shape), parameter.itemsize, parameter.requires_grad, id(parameter) in embeddings)
        )
        # 4 bits: one float32 scale for 64 weights; 8 bits: one for each row.
        each = {4: 0.5 + 4 / 64, 8: 1.0 + 4 / parameter.size(-1)}[bits] if id(parameter) in quantised else None
        stored += parameter.nbytes if each is None else math.ceil(parameter.numel() * each)
    return weights, stored


def cache_bytes(config: Any, rows: int, tokens: int, itemsize: int) -> int:
    """Keys and values of `rows` completions of `tokens` tokens, in numbers of `itemsize` bytes."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return rows * tokens * text.num_hidden_layers * 2 * heads * width * itemsize
