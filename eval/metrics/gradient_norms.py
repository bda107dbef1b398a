"""The GradNorm membership attack's pass: one backward per text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from fdiv.eval.metrics.membership import gradnorm_score
from fdiv.inference.batches import run_batches
from fdiv.inference.cache import ItemCache
from fdiv.inference.label_logits import plain_label_logits
from fdiv.inference.processes import process_state
from fdiv.inference.scoring import ScoringRequest, scoring_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["gradient_norms"]


@dataclass(frozen=True)
class _One:
    request: ScoringRequest
    rows: int = 1
    group: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.request.key,)

    @property
    def length(self) -> int:
        return len(self.request.text.input_ids)


def gradient_norms(
    model: PreTrainedModel,
    requests: Sequence[ScoringRequest],
    *,
    drop_last_label: bool = True,
    cache_dir: Path | None = None,
    model_digest: str = "",
    title: str = "gradient norms",
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """GradNorm of every text: mean over parameters of the 2-norm of the gradient of its mean label loss.

    The model's own gradients must be None or unneeded: they are cleared. Frozen parameters count nothing, so a PEFT
    model is measured on its adapter.

    Returns:
        By key: `score`, or None for a text without labels.
    """
    parameters = list(model.parameters())  # listed once, not for every text

    def clear() -> None:
        for parameter in parameters:
            parameter.grad = None

    def compute(batch: list[_One]) -> list[dict[str, Any]]:
        request = batch[0].request
        count = request.text.label_count - int(drop_last_label)
        if count < 1:
            return [{"key": request.key, "score": None}]
        clear()
        with torch.enable_grad():
            found = plain_label_logits(model, [request.text], pad_id=0)  # no padding in a batch of one
            cross_entropy(found.logits[:count].float(), found.labels[:count]).backward()
        norms = [float(p.grad.norm()) for p in parameters if p.grad is not None]
        clear()
        return [{"key": request.key, "score": gradnorm_score(norms)}]

    settings = ("gradnorm", drop_last_label, str(next(model.parameters()).dtype))
    digest = scoring_digest(model_digest, requests, *settings)
    cache = ItemCache(cache_dir, "gradnorm", digest, process_state().process_index)
    units = [_One(request) for request in requests]
    return run_batches(units, compute, batch_size=1, cache=cache, title=title, progress=progress)
