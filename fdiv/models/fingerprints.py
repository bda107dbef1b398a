"""Fingerprints of a tokenizer and of a model's weights: what token ids and reference log-probabilities depend on."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fdiv.inference.cache import fingerprint

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

__all__ = ["data_fingerprint", "files_fingerprint", "tokenizer_fingerprint", "vocabulary_size", "weights_fingerprint"]

_SAMPLE = 65_536


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex digest of the vocabulary (every token with its id, added ones included) and of the special tokens.

    Equal digests: the same ids mean the same text. The pad token is left out, for no unpadded text holds it and
    recipes may set it; so are the chat template and the padding side.
    """
    special = {role: str(token) for role, token in tokenizer.special_tokens_map.items() if role != "pad_token"}
    text = json.dumps([sorted(tokenizer.get_vocab().items()), special], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def vocabulary_size(model: nn.Module) -> int | None:
    """The number of token ids a model takes, by its configuration; None where that does not say."""
    return getattr(model.config.get_text_config(), "vocab_size", None)


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """Hex digest of the parameters: names, shapes, and up to 65,536 evenly spaced values of each, as bfloat16.

    It follows from the weights and not from where they lie, so a checkpoint written over an older one is noticed; and
    rounding to bfloat16 lets the same checkpoint agree whether it was loaded in bfloat16 or in float32. Of a
    `PeftModel` the base weights are read, and its adapters where they change the output: a fresh LoRA (B = 0) leaves
    the digest at that of the base model, a trained one does not. Collective under DeepSpeed ZeRO-3: call it on all
    processes.
    """
    digest = hashlib.sha256()
    adapters: list[tuple[str, str, bool]] = []
    for name, parameter in sorted(_named_weights(model)):
        with _gathered(parameter):
            flat = parameter.detach().reshape(-1)
            step = max(1, -(-flat.numel() // _SAMPLE))
            values = flat[::step].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()
            line = f"{name} {tuple(parameter.shape)} {hashlib.sha256(values).hexdigest()}"
            if ".lora_" in name:
                adapters.append((line, name, bool(flat.any())))
            else:
                digest.update(line.encode())
    if any(nonzero for _, name, nonzero in adapters if ".lora_B" in name or ".lora_embedding_B" in name):
        for line, _, _ in adapters:
            digest.update(line.encode())
    return digest.hexdigest()[:24]


def _named_weights(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters in use, under the names they have without PEFT around them.

    A module that PEFT trains whole (`modules_to_save`) stands in for its original.
    """
    weights = []
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        weights.append((re.sub(r"\.modules_to_save\.[^.]+\.", ".", plain), parameter))
    return weights


def _gathered(parameter: nn.Parameter) -> AbstractContextManager:
    """Under ZeRO-3 a parameter is a shard until it is gathered."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed  # `deepspeed.zero` is an attribute of it, not a module

    return deepspeed.zero.GatheredParameters([parameter])


_SAMPLED_ROWS = 64


def data_fingerprint(dataset: Any, *, every_row: bool = False) -> str | None:
    """What tells one dataset or sequence of rows from another.

    Args:
        dataset: rows by number, with a length; `column_names` count where it has them.
        every_row: hash all rows, as what is kept of each row needs (pre-sampling). Otherwise the number of rows and up
            to 64 of them, spread over the whole: enough to tell that a resumed run reads other data, at once.

    Returns:
        Hex digest, after the number of rows unless `every_row`; None for a streamed dataset, an empty one, or none.
    """
    if dataset is None or not hasattr(dataset, "__len__") or not len(dataset):
        return None
    columns, count = getattr(dataset, "column_names", None), len(dataset)
    if every_row:
        return fingerprint(columns, [json.dumps(row, default=str, sort_keys=True) for row in dataset])
    digest = hashlib.sha256(json.dumps([count, columns]).encode())
    for number in sorted({round(place * (count - 1) / (_SAMPLED_ROWS - 1)) for place in range(_SAMPLED_ROWS)}):
        # values that are no JSON (images) count by their type: their text may hold an address
        digest.update(json.dumps(dataset[number], default=lambda value: type(value).__name__).encode())
    return f"{count} rows, {digest.hexdigest()[:16]}"


def files_fingerprint(model: str, adapter: str | None) -> list[str]:
    """What tells one checkpoint from another without loading it: names, sizes and times of its files; for a model of
    the hub its name."""
    parts = []
    for place in (model, adapter):
        folder = Path(place) if place else None
        if folder is not None and folder.is_dir():
            for file in sorted(folder.glob("*.safetensors")):
                stat = file.stat()
                parts.append(f"{file.name} {stat.st_size} {stat.st_mtime_ns}")
        else:
            parts.append(str(place))
    return parts


model_fingerprint = weights_fingerprint  # a function of its own in release 0.1, whose digest depended on the type
