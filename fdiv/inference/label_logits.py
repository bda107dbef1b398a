"""Logits at the label positions of a batch of texts, with as little computation as the model allows.

Answers to one question share its prompt: the prompt is run once, and its keys and values are repeated for the
answers. Models whose cache does not allow that get the plain forward. Either way the LM head multiplies the positions
that predict a label, and no prompt or padding.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdiv.inference.prompting import EncodedText

__all__ = ["LabelLogits", "SharedPrompts", "plain_label_logits", "shares_prompts"]


class LabelLogits(NamedTuple):
    """Logits [N, V] and labels [N] of all texts in order, and how many belong to each text."""

    logits: Tensor
    labels: Tensor
    counts: list[int]


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _accepted(model: Any) -> set[str]:
    return set(inspect.signature(_base(model).forward).parameters)


def shares_prompts(model: Any) -> bool:
    """Whether the model's cache can be filled with a prompt once and repeated for several answers.

    False for models without `past_key_values` or `position_ids`, with sliding-window or recurrent layers, and for
    adapters that put virtual tokens in front.
    """
    if not {"past_key_values", "position_ids"} <= _accepted(model):
        return False
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return False
    config = _base(model).config
    layers = getattr(config, "layer_types", None)
    if layers is not None:
        return all(layer == "full_attention" for layer in layers)
    return getattr(config, "sliding_window", None) is None


def _padded(rows: Sequence[Sequence[int]], pad_id: int, side: str) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, T] of rows padded on one side."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place] = torch.tensor(list(row), dtype=torch.long)
        mask[index, place] = 1
    return ids, mask


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def plain_label_logits(
    model: Any, texts: Sequence[EncodedText], *, pad_id: int, padding_side: str = "right"
) -> LabelLogits:
    """Logits that predict every label of every text, by exactly one padded forward; every text has a label."""
    counts, device = [text.label_count for text in texts], next(model.parameters()).device
    ids, mask = _padded([text.input_ids for text in texts], pad_id, padding_side)
    width, rows, columns = ids.shape[1], [], []
    for row, text in enumerate(texts):
        start = width - len(text.input_ids) if padding_side == "left" else 0
        columns += range(start + text.prompt_length, start + len(text.input_ids))
        rows += [row] * counts[row]
    accepted = _accepted(model)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": _positions(mask)}
    inputs = {name: value.to(device) for name, value in inputs.items() if name in accepted}
    first, last = min(columns) - 1, max(columns)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = torch.arange(first, last, device=device)
    else:
        first, last = 0, width
    wanted = torch.zeros(len(texts), last - first, dtype=torch.bool)
    row_index, column_index = torch.tensor(rows), torch.tensor(columns)
    wanted[row_index, column_index - 1 - first] = True
    return LabelLogits(_logits_at(model, inputs, wanted), ids[row_index, column_index].to(device), counts)


def _logits_at(model: Any, inputs: dict[str, Any], wanted: Tensor) -> Tensor:
    """Logits [N, V] of a forward at the N positions that are True in `wanted` [B, T], row by row."""
    index = wanted.flatten().nonzero().squeeze(-1).to(next(model.parameters()).device)
    with _head_at(model, wanted.shape, index):
        logits = model(**inputs).logits
    if logits.shape[:2] == (1, len(index)):
        return logits[0]
    return logits.flatten(0, 1).index_select(0, index)


@contextmanager
def _head_at(model: Any, shape: torch.Size, index: Tensor) -> Iterator[None]:
    """Inside, the LM head of `model` gets the hidden states [1, N, D] at `index` of the positions [B, T] = `shape`.

    A head that is called otherwise, or not at all, is left unchanged: the logits are then those of all positions.
    """
    head = getattr(_base(model), "get_output_embeddings", lambda: None)()
    if head is None or not hasattr(head, "register_forward_pre_hook"):
        yield
        return

    def select(_module: Any, inputs: tuple[Any, ...]) -> Any:
        hidden = inputs[0] if len(inputs) == 1 else None
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2] != shape:
            return None
        return (hidden.flatten(0, 1).index_select(0, index.to(hidden.device))[None],)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


class SharedPrompts:
    """Keys and values of the distinct prompts of some texts, from one forward.

    Args:
        model: causal LM in eval mode for which `shares_prompts(model)`.
        texts: texts with prompts of at least two tokens; `logits` takes subsets of them.
        pad_id: any token id.
    """

    def __init__(self, model: Any, texts: Sequence[EncodedText], pad_id: int):
        self._model, self._pad_id = model, pad_id
        self._device = next(model.parameters()).device
        contexts = list(dict.fromkeys(text.input_ids[: text.prompt_length - 1] for text in texts))
        self._row = {context: row for row, context in enumerate(contexts)}
        ids, self._mask = _padded(contexts, pad_id, "left")
        keep = {"logits_to_keep": 1} if "logits_to_keep" in _accepted(model) else {}
        self._cache = model(
            input_ids=ids.to(self._device),
            attention_mask=self._mask.to(self._device),
            position_ids=_positions(self._mask).to(self._device),
            use_cache=True,
            **keep,
        ).past_key_values

    def logits(self, texts: Sequence[EncodedText]) -> LabelLogits:
        """Logits that predict every label of every text; every text has a label."""
        counts = [text.label_count for text in texts]
        owner = [self._row[text.input_ids[: text.prompt_length - 1]] for text in texts]
        # Selecting makes new tensors, so the layers are copied without theirs.
        cache = copy.copy(self._cache)
        cache.layers = [copy.copy(layer) for layer in self._cache.layers]
        cache.batch_select_indices(torch.tensor(owner, device=self._device))
        # The prompt's last token is fed again with the answer, because its logits predict the first label.
        rows = [text.input_ids[text.prompt_length - 1 : -1] for text in texts]
        ids, mask = _padded(rows, self._pad_id, "right")
        positions = torch.tensor([text.prompt_length - 1 for text in texts])[:, None] + torch.arange(ids.shape[1])
        limit = getattr(_base(self._model).config, "max_position_embeddings", None)
        if limit is not None:
            positions = positions.clamp(max=limit - 1)  # padding may run past the table of learned positions
        inputs = {
            "input_ids": ids.to(self._device),
            "attention_mask": torch.cat([self._mask[owner], mask], dim=1).to(self._device),
            "position_ids": positions.to(self._device),
        }
        wanted = torch.arange(ids.shape[1]) < torch.tensor(counts)[:, None]
        labels = torch.tensor([token for text in texts for token in text.input_ids[text.prompt_length :]])
        logits = _logits_at(self._model, {**inputs, "past_key_values": cache, "use_cache": True}, wanted)
        return LabelLogits(logits, labels.to(self._device), counts)
