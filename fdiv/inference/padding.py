"""Models whose scores depend on what stands beside a row in its batch, and the batches they need."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from fdiv.inference.batches import collective_forward
from fdiv.terminal import info

if TYPE_CHECKING:
    from torch import nn

__all__ = ["depends_on_padding", "longrope_note", "safe_batch_size"]

_FOUND: dict[tuple[type, str], str | None] = {}
_TOKENS, _PADDING = 16, 8


def depends_on_padding(model: nn.Module) -> str | None:
    """Why a row of `model` has other scores alone than left-padded in a batch; None where it has not.

    Recurrent models without a mask (RWKV, RecurrentGemma, xLSTM) carry the padding in their state; found by a forward
    of a few tokens with and without padding, once per architecture. Rotary embeddings of kind `longrope` (Phi-3) take
    their factors from the longest row of a batch. Not checked, and None: sharded weights, and a model whose forward
    does not run where it lies.

    Args:
        model: plain or wrapped (PEFT, DDP).
    """
    base = _unwrapped(model)
    config = getattr(base, "config", None)
    if not hasattr(config, "to_json_string"):
        return None
    key = (type(base), config.to_json_string())
    if key not in _FOUND:
        if _rope_kind(config) == "longrope":
            _FOUND[key] = "longrope takes its factors from the longest row of a batch"
        elif collective_forward() or any(p.is_meta or hasattr(p, "ds_id") for p in base.parameters()):
            return None
        else:
            _FOUND[key] = _padding_fault(base)
    return _FOUND[key]


def safe_batch_size(model: nn.Module, batch_size: int) -> int:
    """`batch_size`, or 1, with a note, for a model whose scores depend on the batch."""
    reason = depends_on_padding(model)
    if reason is None or batch_size == 1:
        return batch_size
    info(f"{type(_unwrapped(model)).__name__}: batches of one row, because {reason}")
    return 1


def longrope_note(model: nn.Module, max_length: int | None) -> str | None:
    """What to say of a model whose rotary factors follow the longest row of a batch, where rows may pass the length
    at which they change; None where that cannot be."""
    config = getattr(_unwrapped(model), "config", None)
    if not hasattr(config, "get_text_config") or _rope_kind(config) != "longrope":
        return None
    text = config.get_text_config()
    own = getattr(text, "original_max_position_embeddings", None)
    limit = (text.rope_parameters or {}).get("original_max_position_embeddings") or own
    if max_length is not None and limit is not None and max_length <= limit:
        return None
    return (
        f"longrope takes its factors from the longest row of a batch: a row's score depends on the rows beside it "
        f"where one has more than {limit} tokens; set max_length: {limit} to rule that out"
    )


def _unwrapped(model: nn.Module) -> Any:
    from accelerate.utils import extract_model_from_parallel

    model = extract_model_from_parallel(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _rope_kind(config: Any) -> str | None:
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return rope.get("rope_type") if isinstance(rope, dict) else None


@torch.no_grad()
def _padding_fault(base: nn.Module) -> str | None:
    parameter = next(base.parameters())
    vocabulary = getattr(base.config.get_text_config(), "vocab_size", 1)
    ids = (torch.arange(_PADDING + _TOKENS) * 37 + 5).remainder(vocabulary).unsqueeze(0).to(parameter.device)
    mask = torch.ones_like(ids)
    mask[:, :_PADDING] = 0
    rows = [{"input_ids": ids[:, start:], "attention_mask": mask[:, start:]} for start in (0, _PADDING)]
    if "position_ids" in inspect.signature(base.forward).parameters:
        rows = [{**row, "position_ids": (row["attention_mask"].cumsum(-1) - 1).clamp(min=0)} for row in rows]
    modes = {module: module.training for module in base.modules()}
    base.eval()
    try:
        with torch.random.fork_rng(devices=[ids.device] if ids.device.type == "cuda" else []):
            padded, alone = (base(**row, use_cache=False).logits[:, -_TOKENS:].float() for row in rows)
    except Exception:  # not to be judged here: a model that does not run is reported by whoever runs it
        return None
    finally:
        for module, mode in modes.items():
            module.training = mode
    epsilon = torch.finfo(parameter.dtype if parameter.dtype.is_floating_point else torch.bfloat16).eps
    difference = (padded - alone).abs().mean().item()  # the mean: one expert chosen otherwise by rounding is no fault
    if difference > 2e-4 + 2 * epsilon * alone.abs().max().item():
        return f"its logits change by {difference:.2g} under left padding"
    return None
