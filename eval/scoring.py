"""The scoring pass: one teacher-forced forward per text gives everything the likelihood metrics need.

For every label token: log p(label), whether the label is the argmax, and mean and variance of log p under the
model's own next-token distribution (what Min-K%++ normalises by). The fused LM head of `fdiv.logprobs` cannot give
the variance, so the logits of the label positions, and of those only, are reduced here in float32.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fdiv.errors import DataError
from fdiv.eval.batched_pass import run_batches
from fdiv.eval.item_cache import ItemCache, fingerprint
from fdiv.eval.prompting import EncodedText

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ScoringRequest", "TokenStatistics", "gradient_norms", "label_statistics", "score_texts"]

_CHUNK_LOGITS = 2**24


@dataclass(frozen=True)
class ScoringRequest:
    """One text to score. `token_level` keeps per-token values, which extraction strength and Min-K need."""

    key: str
    text: EncodedText
    token_level: bool = False

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.text.input_ids)


@dataclass
class TokenStatistics:
    """Per label token, flattened over a batch: log p, argmax hit, mean and variance of the next-token log-prob."""

    log_prob: Tensor
    is_top1: Tensor
    mean: Tensor | None
    variance: Tensor | None


def _forward_parameters(model: Any) -> set[str]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(base.forward).parameters)


def label_statistics(logits: Tensor, labels: Tensor, *, moments: bool) -> TokenStatistics:
    """Reduce logits [N, V] at labels [N] in float32, chunk by chunk.

    mean = sum_v p_v log p_v (minus the entropy), variance = sum_v p_v (log p_v)^2 - mean^2; both None unless
    `moments`.
    """
    parts = []
    rows = max(1, _CHUNK_LOGITS // logits.shape[-1])
    for chunk, target in zip(logits.split(rows), labels.split(rows), strict=True):
        log_p = torch.log_softmax(chunk.float(), dim=-1)
        row = [log_p.gather(-1, target[:, None]).squeeze(-1), chunk.argmax(-1) == target]
        if moments:
            p, finite = log_p.exp(), log_p.clamp(min=-1e4)  # exp(-1e4) is 0, and 0 * -inf would be NaN
            mean = (p * finite).sum(-1)
            row += [mean, (p * (finite - mean[:, None]).square()).sum(-1)]
        parts.append(row)
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return TokenStatistics(*columns, *([] if moments else [None, None]))


@torch.no_grad()
def _score_batch(
    model: PreTrainedModel, batch: Sequence[ScoringRequest], pad_id: int, device: torch.device, padding_side: str
) -> list[dict[str, Any]]:
    width = max(request.length for request in batch)
    ids = torch.full((len(batch), width), pad_id)
    mask = torch.zeros_like(ids)
    rows, columns, counts = [], [], []
    for row, request in enumerate(batch):
        start = width - request.length if padding_side == "left" else 0
        ids[row, start : start + request.length] = torch.tensor(request.text.input_ids)
        mask[row, start : start + request.length] = 1
        labels = range(start + request.text.prompt_length, start + request.length)
        rows += [row] * len(labels)
        columns += labels
        counts.append(len(labels))
    if not rows:
        return [{"key": request.key, "avg_loss": None, "labels": 0} for request in batch]
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    accepted = _forward_parameters(model)
    inputs = {name: value.to(device) for name, value in inputs.items() if name in accepted}
    first, last = min(columns) - 1, max(columns)
    window = {"logits_to_keep": torch.arange(first, last, device=device)} if "logits_to_keep" in accepted else {}
    logits = model(**inputs, **window, **({"use_cache": False} if "use_cache" in accepted else {})).logits
    if not window:
        logits = logits[:, first:last]
    row_index, column_index = torch.tensor(rows, device=device), torch.tensor(columns, device=device)
    picked = logits[row_index, column_index - 1 - first]
    statistics = label_statistics(
        picked, ids.to(device)[row_index, column_index], moments=any(request.token_level for request in batch)
    )
    return _records(batch, statistics, counts)


def _records(batch: Sequence[ScoringRequest], statistics: TokenStatistics, counts: list[int]) -> list[dict[str, Any]]:
    log_probs = statistics.log_prob.cpu().split(counts)
    hits = statistics.is_top1.cpu().split(counts)
    records = []
    for row, (request, count) in enumerate(zip(batch, counts, strict=True)):
        record: dict[str, Any] = {"key": request.key, "avg_loss": None, "labels": count}
        if count:
            record["avg_loss"] = -float(log_probs[row].double().sum()) / count
            if record["avg_loss"] != record["avg_loss"]:
                raise DataError(f"the model gives NaN log-probabilities on {request.key}: it cannot be evaluated")
        if request.token_level:
            means, variances = statistics.mean.cpu().split(counts), statistics.variance.cpu().split(counts)
            record |= {
                "log_probs": log_probs[row].tolist(),
                "is_top1": hits[row].int().tolist(),
                "mean": means[row].tolist(),
                "variance": variances[row].tolist(),
            }
        records.append(record)
    return records


def _digest(model_digest: str, requests: Sequence[ScoringRequest], *settings: Any) -> str:
    texts = [[r.key, list(r.text.input_ids), r.text.prompt_length, r.token_level] for r in requests]
    return fingerprint(model_digest, texts, *settings)


def score_texts(
    model: PreTrainedModel,
    requests: Sequence[ScoringRequest],
    *,
    pad_id: int,
    batch_size: int = 32,
    padding_side: str = "right",
    cache_dir: Path | None = None,
    model_digest: str = "",
    title: str = "scoring",
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Score every text once; call it on all processes.

    Args:
        model: a causal LM in eval mode, on its device.
        requests: the texts.
        pad_id: any token id: padding is masked, and position ids are passed, so either side gives the same numbers.
        batch_size: rows of a forward.
        padding_side: `right` or `left`.
        cache_dir: where finished texts are kept so that a killed run continues; None keeps nothing.
        model_digest: fingerprint of the weights, needed with `cache_dir`.
        title, progress: the progress bar.
    Returns:
        By key: `avg_loss` (nats per label token; None without labels), `labels` (their number), and for `token_level`
        requests the lists `log_probs`, `is_top1`, `mean`, `variance`.
    Raises:
        ValueError: a text longer than the model's context, or NaN log-probabilities.
    """
    from accelerate import PartialState

    limit = getattr(model.config, "max_position_embeddings", None)
    for request in requests:
        if limit is not None and request.length > limit:
            raise DataError(
                f"{request.key} has {request.length} tokens, the model's context is {limit}: shorten the text "
                "(max_length)"
            )
    device = next(model.parameters()).device
    digest = _digest(model_digest, requests, "scores", str(next(model.parameters()).dtype))
    cache = ItemCache(cache_dir, "scores", digest, PartialState().process_index)
    return run_batches(
        requests,
        lambda batch: _score_batch(model, batch, pad_id, device, padding_side),
        batch_size=batch_size,
        cache=cache,
        group=lambda request: request.token_level,
        title=title,
        progress=progress,
    )


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

    One backward per text. The model's own gradients must be None or unneeded: they are cleared. Frozen parameters
    count nothing, so a PEFT model is measured on its adapter.

    Returns:
        By key: `score`, or None for a text without labels.
    """
    from accelerate import PartialState

    from fdiv.eval.membership import gradnorm_score
    from fdiv.logprobs import token_scores

    device = next(model.parameters()).device

    def compute(batch: list[ScoringRequest]) -> list[dict[str, Any]]:
        (request,) = batch
        ids = torch.tensor([request.text.input_ids], device=device)
        labels = torch.ones_like(ids)
        labels[:, : request.text.prompt_length] = 0
        if drop_last_label:
            labels[:, -1] = 0
        if not labels.any():
            return [{"key": request.key, "score": None}]
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            scores = token_scores(model, ids, torch.ones_like(ids), labels, fused=False)
            (-scores.log_probs.sum() / scores.mask.sum()).backward()
        norms = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return [{"key": request.key, "score": gradnorm_score(norms)}]

    digest = _digest(model_digest, requests, "gradnorm", drop_last_label, str(next(model.parameters()).dtype))
    cache = ItemCache(cache_dir, "gradnorm", digest, PartialState().process_index)
    return run_batches(requests, compute, batch_size=1, cache=cache, title=title, progress=progress)
