"""The scoring pass: one teacher-forced forward per text gives everything the likelihood metrics need.

For every label token: log p(label), whether the label is the argmax, and mean and variance of log p under the
model's own next-token distribution (what Min-K%++ normalises by). The fused LM head of `fdiv.models.logprobs` cannot
give the variance, so the logits of the label positions, and of those only, are reduced here in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fdiv.errors import DataError
from fdiv.inference.batches import collective_forward, run_batches
from fdiv.inference.cache import ItemCache, fingerprint
from fdiv.inference.label_logits import LabelLogits, SharedPrompts, plain_label_logits, shares_prompts
from fdiv.inference.padding import depends_on_padding, safe_batch_size
from fdiv.inference.processes import process_state
from fdiv.inference.prompting import EncodedText

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ScoringRequest", "TokenStatistics", "label_statistics", "score_texts", "scoring_digest"]

_CHUNK_LOGITS = 2**24
_CPU_CHUNK_LOGITS = 2**21  # 8 MiB stay in the cache of a core, and in the allocator's hands
_CPU_TOKENS = 512  # of a forward on a CPU: matrices this high multiply as fast as higher ones, and stay in the cache
_FORWARDS = 8  # forwards of one unit of work: enough answers to sort by length, few enough to save often
_SHORTEST = 0.75  # the shortest row of a forward as a share of the longest: what is padded is computed too
_CPU_SHORTEST = 0.9


@dataclass(frozen=True)
class ScoringRequest:
    """One text to score.

    `token_level` keeps per-token values, which extraction strength and Min-K need; `hits` keeps the argmax hits alone,
    from which a generation can start. Texts of different `group`s never share a forward, so that scoring one group
    alone gives the same bits as scoring everything.
    """

    key: str
    text: EncodedText
    token_level: bool = False
    group: str = ""
    hits: bool = False


@dataclass(frozen=True)
class _Bundle:
    """Requests with the same prompt: a unit of the pass, so that the prompt is run once."""

    requests: tuple[ScoringRequest, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(request.key for request in self.requests)

    @property
    def group(self) -> str:
        return self.requests[0].group

    @property
    def length(self) -> int:
        return max(len(request.text.input_ids) for request in self.requests)

    @property
    def rows(self) -> int:
        return len(self.requests)


class TokenStatistics(NamedTuple):
    """Per label token: log p, argmax hit, and, where asked for, mean and variance of the next-token log-prob; each
    [N]."""

    log_prob: Tensor
    is_top1: Tensor
    mean: Tensor
    variance: Tensor


def label_statistics(logits: Tensor, labels: Tensor, *, moments: bool = True, hits: bool = True) -> TokenStatistics:
    """Reduce logits [N, V] at labels [N] in float32, chunk by chunk.

    mean = sum_v p_v log p_v (minus the entropy), variance = sum_v p_v (log p_v - mean)^2; both 0 unless `moments`.
    `is_top1` is False unless `hits`.
    """
    parts = []
    rows = max(1, (_CPU_CHUNK_LOGITS if logits.device.type == "cpu" else _CHUNK_LOGITS) // logits.shape[-1])
    for chunk, target in zip(logits.split(rows), labels.split(rows), strict=True):
        log_p = torch.log_softmax(chunk.float(), dim=-1)
        mean = variance = torch.zeros(len(target), device=log_p.device)
        if moments:
            p, finite = log_p.exp(), log_p.clamp(min=-1e4)  # exp(-1e4) is 0, and 0 * -inf would be NaN
            mean = (p * finite).sum(-1)
            variance = (p * (finite - mean[:, None]).square()).sum(-1)
        picked = log_p.gather(-1, target[:, None]).squeeze(-1)
        top = chunk.argmax(-1) == target if hits else torch.zeros_like(target, dtype=torch.bool)
        parts.append(TokenStatistics(*(value.cpu() for value in (picked, top, mean, variance))))
    return TokenStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def _score_batch(
    model: PreTrainedModel, batch: Sequence[_Bundle], pad_id: int, side: str, batch_size: int, share: bool, cut: bool
) -> list[dict[str, Any]]:
    """Score a few hundred texts: their prompts at once, then their answers, longest first, in forwards of at most
    `batch_size`; one forward for all unless `cut`."""
    requests = [request for bundle in batch for request in bundle.requests]
    share = share and len(requests) > len(batch) and all(request.text.prompt_length >= 2 for request in requests)
    prompts = SharedPrompts(model, [request.text for request in requests], pad_id) if share else None
    lengths = {r.key: r.text.label_count if share else len(r.text.input_ids) for r in requests}
    requests.sort(key=lambda request: (-lengths[request.key], request.key))
    records = []
    on_cpu = next(model.parameters()).device.type == "cpu"
    for part in _forwards(requests, lengths, batch_size, on_cpu) if cut else [requests]:
        texts = [request.text for request in part]
        if prompts is not None:
            found = prompts.logits(texts)
        else:
            found = plain_label_logits(model, texts, pad_id=pad_id, padding_side=side)
        records += _records(part, found)
    return records


def _forwards(
    requests: Sequence[ScoringRequest], lengths: dict[str, int], batch_size: int, on_cpu: bool
) -> list[list[ScoringRequest]]:
    """Consecutive parts of a list sorted by length: at most `batch_size` rows of like length; few tokens on a CPU."""
    tokens, shortest = (_CPU_TOKENS, _CPU_SHORTEST) if on_cpu else (math.inf, _SHORTEST)
    parts: list[list[ScoringRequest]] = []
    for request in requests:
        longest = lengths[parts[-1][0].key] if parts else 0
        full = not parts or len(parts[-1]) == batch_size or (len(parts[-1]) + 1) * longest > tokens
        if full or lengths[request.key] < shortest * longest:
            parts.append([])
        parts[-1].append(request)
    return parts


def _records(requests: Sequence[ScoringRequest], found: LabelLogits) -> list[dict[str, Any]]:
    if not any(request.token_level for request in requests):
        # One reduction for all: the common case, and the fast one.
        wanted = any(request.hits for request in requests)
        statistics = label_statistics(found.logits, found.labels, moments=False, hits=wanted)
        columns = zip(statistics.log_prob.split(found.counts), statistics.is_top1.split(found.counts), strict=True)
        return [
            _record(request, values) | ({"is_top1": hits.int().tolist()} if request.hits else {})
            for request, (values, hits) in zip(requests, columns, strict=True)
        ]
    records = []
    pairs = zip(found.logits.split(found.counts), found.labels.split(found.counts), strict=True)
    for request, (logits, labels) in zip(requests, pairs, strict=True):
        wanted = request.token_level or request.hits
        statistics = label_statistics(logits, labels, moments=request.token_level, hits=wanted)
        record = _record(request, statistics.log_prob)
        if request.token_level:
            log_prob, hits, mean, variance = (value.tolist() for value in statistics)
            record |= {"log_probs": log_prob, "is_top1": [int(h) for h in hits], "mean": mean, "variance": variance}
        elif request.hits:
            record["is_top1"] = statistics.is_top1.int().tolist()
        records.append(record)
    return records


def _record(request: ScoringRequest, log_probs: Tensor) -> dict[str, Any]:
    loss = -float(log_probs.double().sum()) / len(log_probs)
    if math.isnan(loss):
        raise DataError(f"the model gives NaN log-probabilities on {request.key}: it cannot be evaluated")
    return {"key": request.key, "avg_loss": loss, "labels": len(log_probs)}


def _without_labels(request: ScoringRequest) -> dict[str, Any]:
    lists: dict[str, Any] = {"log_probs": [], "is_top1": [], "mean": [], "variance": []}
    kept = lists if request.token_level else {"is_top1": []} if request.hits else {}
    return {"key": request.key, "avg_loss": None, "labels": 0} | kept


def scoring_digest(model_digest: str, requests: Sequence[ScoringRequest], *settings: Any) -> str:
    """Fingerprint of a scoring pass: the weights, the texts and the settings."""
    texts = [[r.key, list(r.text.input_ids), r.text.prompt_length, r.token_level, r.group, r.hits] for r in requests]
    return fingerprint(model_digest, texts, *settings)


def _bundles(requests: Sequence[ScoringRequest], batch_size: int) -> list[_Bundle]:
    groups: dict[tuple[Any, ...], list[ScoringRequest]] = {}
    for request in sorted(requests, key=lambda request: request.key):
        groups.setdefault((request.group, request.text.input_ids[: request.text.prompt_length]), []).append(request)
    return [
        _Bundle(tuple(group[start : start + batch_size]))
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]


def score_texts(
    model: PreTrainedModel,
    requests: Sequence[ScoringRequest],
    *,
    pad_id: int,
    batch_size: int = 32,
    padding_side: str = "right",
    share_prompts: bool = True,
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
        batch_size: texts of a forward; 1 for models whose scores depend on it (`fdiv.inference.padding`).
        padding_side: `right` or `left`, where a forward without shared prompts pads.
        share_prompts: run the prompt of several answers once, where the model's cache allows it.
        cache_dir: where finished texts are kept so that a killed run continues; None keeps nothing.
        model_digest: fingerprint of the weights, needed with `cache_dir`.
        title, progress: the progress bar.
    Returns:
        By key: `avg_loss` (nats per label token; None without labels), `labels` (their number), and for `token_level`
        requests the lists `log_probs`, `is_top1`, `mean`, `variance`; for `hits` requests `is_top1`.
    Raises:
        DataError: a text longer than the model's context, or NaN log-probabilities.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    for request in requests:
        length = len(request.text.input_ids)
        if limit is not None and length > limit:
            raise DataError(f"{request.key} has {length} tokens, the model's context is {limit}: shorten the text")
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size}: must be at least 1")
    if depends_on_padding(model) is not None:
        batch_size, share_prompts = safe_batch_size(model, batch_size), False
    # With sharded parameters every process must run as many forwards as the others: one per unit of work.
    forwards = 1 if collective_forward() else _FORWARDS
    share = share_prompts and forwards > 1 and shares_prompts(model)
    digest = scoring_digest(model_digest, requests, "scores", str(next(model.parameters()).dtype))
    scored = [request for request in requests if request.text.label_count]
    records = run_batches(
        _bundles(scored, forwards * batch_size),
        lambda batch: _score_batch(model, batch, pad_id, padding_side, batch_size, share, forwards > 1),
        batch_size=forwards * batch_size,
        cache=ItemCache(cache_dir, "scores", digest, process_state().process_index),
        title=title,
        progress=progress,
    )
    return records | {r.key: _without_labels(r) for r in requests if not r.text.label_count}
