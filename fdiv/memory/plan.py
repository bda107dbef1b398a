"""How much memory a run needs on each device, before anything is loaded.

`fdiv.memory.count` counts weights and activations on tensors without memory; what sharding makes of these counts is
arithmetic (`device_bytes`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fdiv.errors import FdivError
from fdiv.memory.count import ModelCount, Weight, count_model
from fdiv.models.fetch import find_model

if TYPE_CHECKING:
    from fdiv.memory.placement import Placement
    from fdiv.memory.step_shape import StepShape

__all__ = ["MemoryPlan", "device_bytes", "optimizer_bytes", "plan_memory"]


@dataclass
class MemoryPlan:
    """Bytes on one device and in host memory for one process; `apart` is in neither sum.

    Attributes:
        device: part → bytes; None: not modelled.
        host: the same for parts that are offloaded.
        apart: what is not a tensor of the run's state, or is only held at another moment: a line → bytes or None.
        assumptions: the numbers the plan rests on, for the reader.
    """

    device: dict[str, int | None]
    host: dict[str, int]
    apart: dict[str, int | None] = field(default_factory=dict)
    assumptions: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Sum of the modelled parts on the device."""
        return sum(value or 0 for value in self.device.values())


# ---------------------------------------------------------------- optimizer state
def _states(number: int) -> Callable[[Weight, int], int]:
    return lambda weight, itemsize: number * weight.size * itemsize


def _eight_bit(number: int) -> Callable[[Weight, int], int]:
    """bitsandbytes: a byte and 1/256 of a float32 scale each; float32 for embeddings and below 4,096 elements."""

    def state(weight: Weight, _: int) -> int:
        if weight.embedding or weight.size < 4096:
            return number * weight.size * 4
        return number * (weight.size + math.ceil(weight.size / 256) * 4)

    return state


def _factored(weight: Weight, _: int) -> int:
    """Adafactor without momentum: a float32 row and column for the last two axes, a full tensor below two axes."""
    if len(weight.shape) < 2:
        return 4 * weight.size
    *outer, rows, columns = weight.shape
    return 4 * math.prod(outer) * (rows + columns)


def _optimizers() -> Iterator[tuple[str, Callable[[Weight, int], int]]]:
    for name in ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused"):
        yield name, _states(2)
    yield from (("sgd", _states(0)), ("rmsprop", _states(1)), ("adagrad", _states(1)), ("adafactor", _factored))
    for prefix in ("", "paged_"):
        yield f"{prefix}adamw_8bit", _eight_bit(2)
        yield f"{prefix}lion_8bit", _eight_bit(1)
        yield f"{prefix}lion_32bit", lambda weight, _: 4 * weight.size
    yield "adamw_bnb_8bit", _eight_bit(2)
    yield "paged_adamw_32bit", lambda weight, _: 8 * weight.size


_OPTIMIZERS = dict(_optimizers())


def optimizer_bytes(optim: str, weights: Sequence[Weight], *, master: bool = False) -> int | None:
    """Bytes of the optimizer's state for `weights`; None for an optimizer that is not modelled.

    Args:
        optim: `optim` of TrainingArguments.
        weights: the trained parameters.
        master: the optimizer works on float32 copies (DeepSpeed, FSDP under mixed precision); the copies not counted.
    """
    state = _OPTIMIZERS.get(optim)
    return None if state is None else sum(state(weight, 4 if master else weight.itemsize) for weight in weights)


# ---------------------------------------------------------------- one device
def device_bytes(count: ModelCount, placement: Placement, optim: str, references: int) -> MemoryPlan:
    """What one of `placement.processes` processes holds.

    DDP: everything. ZeRO-1 shares out the optimizer, ZeRO-2 the gradients as well, ZeRO-3 and FSDP also the weights.
    DeepSpeed trains 16-bit weights where precision is mixed, and its optimizer keeps float32 copies of the trained
    ones in any case. FSDP keeps the trained weights themselves in float32. Offloaded parts are in host memory.

    Args:
        count: of the model, unsharded. placement: where it runs. optim: `optim` of TrainingArguments.
        references: frozen models of the same size, sharded under ZeRO-3 and FSDP only.
    """
    trained = count.trained
    elements = sum(weight.size for weight in trained)
    own = sum(weight.size * weight.itemsize for weight in trained)
    stored, gradients, frozen = count.stored, own, count.stored
    if placement.deepspeed and placement.mixed is not None:
        narrow = sum(weight.size * max(0, weight.itemsize - 2) for weight in count.weights)
        stored, gradients = count.stored - narrow, 2 * elements
        frozen = stored
    elif placement.fsdp and placement.mixed is not None:
        stored, gradients = count.stored - own + 4 * elements, 4 * elements
    wide = placement.deepspeed or (placement.fsdp and placement.mixed is not None)
    optimizer = optimizer_bytes(optim, trained, master=wide)
    parts: dict[str, int | None] = {
        "weights": placement.share(stored, "weights"),
        "gradients": placement.share(gradients, "gradients"),
        "optimizer": None if optimizer is None else placement.share(optimizer, "optimizer"),
    }
    if placement.deepspeed:
        parts["float32 copies"] = placement.share(4 * elements, "optimizer")
    parts["reference"] = placement.share(references * frozen, "weights")
    host = {name: parts.pop(name) or 0 for name in placement.offloaded & parts.keys()}
    parts["activations"] = count.activations
    if count.recomputed:
        parts["recomputed layer"] = count.recomputed
    plan = MemoryPlan(parts, host)
    if placement.processes > 1:
        title, size = placement.buffers(elements, gradients, stored, count.layers)
        plan.apart[title] = size
    if count.cache:
        plan.apart["keys and values of the completions sampled at once, while no activations are held"] = count.cache
    return plan


def plan_memory(recipe: Any, configs: Any, placement: Placement, prompt_tokens: int | None = None) -> MemoryPlan:
    """The plan of a recipe.

    Args:
        recipe, configs: a checked recipe and what `recipe.configs()` made of it.
        placement: where it shall run, from `fdiv.memory.placement.read_placement`.
        prompt_tokens: length of the prompts of rollouts, where it is known.

    Raises:
        FdivError: the model's config cannot be read, or a setting makes the plan impossible.
    """
    from trl import get_peft_config

    args, model = configs.training, configs.model
    name = model.model_name_or_path
    if recipe.prepare is not None and (not name or name.startswith("${prepare}")):
        raise FdivError(f"the model is built by the `prepare` block ({recipe.prepare.name}), which a dry run leaves")
    config = _read_config(model)
    trainer, peft_config = recipe.method, get_peft_config(model)
    shape = trainer.step_shape(
        args, peft=peft_config is not None, processes=placement.processes, prompt_tokens=prompt_tokens
    )
    shape, note = _within_context(shape, config)
    kwargs = args.model_init_kwargs or {}
    dtype = _dtype(kwargs.get("dtype", model.dtype), config)
    bits = 4 if model.load_in_4bit else 8 if model.load_in_8bit else None
    if (placement.deepspeed or placement.fsdp) and placement.mixed is not None:
        computed, mixed = placement.mixed, None  # the weights of the forward are 16 bits wide themselves
    else:
        computed, mixed = dtype, placement.mixed
    checkpointing_kwargs = args.gradient_checkpointing_kwargs or {}
    for key in ("offload", "selective"):
        if checkpointing_kwargs.get(key):
            raise FdivError(f"`{key}` of gradient_checkpointing_kwargs is not modelled")
    count = count_model(
        config,
        shape,
        dtype=computed,
        attention=kwargs.get("attn_implementation", model.attn_implementation),
        mixed=mixed,
        peft_config=peft_config,
        checkpointing=args.gradient_checkpointing,
        checkpointing_kwargs=checkpointing_kwargs,
        disable_dropout=getattr(args, "disable_dropout", False),
        bits=bits,
        freeze=lambda built: trainer.freeze_untrained(args, built),
    )
    if placement.fsdp and bits is None:
        count = count.held_in(dtype.itemsize)  # what is narrow is only what it gathers
    plan = device_bytes(count, placement, str(getattr(args.optim, "value", args.optim)), shape.references)
    plan.assumptions = [
        f"{shape.rows} rows of {shape.tokens} tokens in a micro-batch ({note})",
        f"{sum(w.size for w in count.trained):,} of {sum(w.size for w in count.weights):,} weights are trained; "
        f"loaded as {str(dtype).removeprefix('torch.')}, precision {placement.precision}",
    ]
    plan.apart["process overhead, host memory of this process with its libraries (measured)"] = resident_bytes()
    plan.apart["process overhead, the device's context and the allocator's unused blocks"] = None
    if count.reason:
        plan.assumptions.append(f"activations are not modelled for a {type(config).__name__}: {count.reason}")
    if plan.device.get("optimizer", 0) is None:
        plan.assumptions.append(f"the state of optim: {args.optim} is not modelled and not in the sum")
    return plan


def resident_bytes() -> int:
    """Host memory that this process holds at present."""
    import psutil

    return psutil.Process().memory_info().rss


def _read_config(model: Any) -> Any:
    """The model's config, from its directory or the hub."""
    from transformers import AutoConfig

    from fdiv.models.loading import check_causal

    name = model.model_name_or_path
    if not name:
        raise FdivError("no model: model_name_or_path is not set")
    try:
        config = AutoConfig.from_pretrained(find_model(name), revision=model.model_revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise FdivError(f"the config of {name!r} cannot be read: {reason[0] if reason else error!r}") from error
    check_causal(config)
    return config


def _within_context(shape: StepShape, config: Any) -> tuple[StepShape, str]:
    """The shape with its length bounded by the model's context, and where the length comes from."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    tokens, note = shape.tokens, shape.tokens_from
    if context is not None and (tokens is None or tokens > context):
        tokens, note = context, f"{note}; the model's context of {context}"
    if tokens is None:
        raise FdivError(f"{note}, and the model's config names no context length: set max_length")
    return shape._replace(tokens=tokens, sampled_tokens=min(shape.sampled_tokens, tokens)), note


def _dtype(stated: Any, config: Any) -> torch.dtype:
    """The number type that weights are loaded in; `auto` is the checkpoint's own."""
    if stated in ("auto", None):
        stated = getattr(config, "dtype", None) or "float32"
    return stated if isinstance(stated, torch.dtype) else getattr(torch, str(stated))
