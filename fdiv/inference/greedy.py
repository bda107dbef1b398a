"""The generation pass: greedy continuations of many prompts, by transformers or by vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fdiv.errors import DataError
from fdiv.inference.batches import run_batches
from fdiv.inference.cache import ItemCache, fingerprint
from fdiv.inference.padding import safe_batch_size
from fdiv.inference.processes import process_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fdiv.inference.prompting import EncodedText

__all__ = [
    "BACKENDS",
    "GenerationRequest",
    "VLLMSource",
    "draft_from_scores",
    "generate_texts",
    "generate_with_vllm",
    "generates_plain_argmax",
    "stop_token_ids",
]

BACKENDS = ("transformers", "vllm")


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and the bound on its continuation.

    `expected_tokens`, the length of the true answer say, only sorts: a batch generates until its longest row ends.
    `draft` is a beginning of the greedy continuation that is known already, see `draft_from_scores`.
    """

    key: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    expected_tokens: int = 0
    rows: int = 1
    group: str = ""
    draft: tuple[int, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The key, as the batched pass wants it."""
        return (self.key,)

    @property
    def length(self) -> int:
        """What batches are sorted by."""
        return len(self.prompt_ids) + len(self.draft) + 2 * max(0, self.expected_tokens - len(self.draft))


# What a model's generation config may say without changing which token is the greedy one.
_HARMLESS = {
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("transformers_version", "_from_model_config", "max_length", "max_new_tokens", "use_cache", "repetition_penalty"),
    *("num_beams", "output_attentions", "output_hidden_states", "return_dict_in_generate"),
}


def generates_plain_argmax(model: PreTrainedModel) -> bool:
    """Whether the model's generation config leaves the greedy token alone (no suppressed tokens, no n-gram ban …)."""
    from accelerate.utils import extract_model_from_parallel

    return set(extract_model_from_parallel(model).generation_config.to_diff_dict()) <= _HARMLESS


def draft_from_scores(request: GenerationRequest, text: EncodedText, is_top1: Sequence[int]) -> GenerationRequest:
    """The request with what teacher forcing tells about its greedy continuation: the true answer up to its first
    token that is not the argmax.

    Args:
        request: from the prompt of `text`. text: prompt and true answer as scored. is_top1: its argmax hits.
    Returns:
        The request with its `draft`; unchanged where the scored prompt has other tokens than the request's.
    """
    labels = text.input_ids[text.prompt_length :]
    if text.input_ids[: text.prompt_length] != request.prompt_ids:
        return request
    known = next((i for i, hit in enumerate(is_top1) if not hit), len(labels))
    return replace(request, draft=labels[: min(known, request.max_new_tokens)])


@dataclass(frozen=True)
class VLLMSource:
    """What vLLM loads: a model path or hub name, a LoRA adapter on it, and the share of GPU memory it may take."""

    model: str
    adapter: str | None = None
    dtype: str = "auto"
    memory: float = 0.5


def _check_context(requests: Sequence[GenerationRequest], limit: int | None) -> None:
    for request in requests:
        prompt = len(request.prompt_ids)
        if limit is not None and prompt + request.max_new_tokens > limit:
            raise DataError(
                f"{request.key}: a prompt of {prompt} tokens and {request.max_new_tokens} new ones exceed the "
                f"model's context of {limit}"
            )


def _record(
    request: GenerationRequest, new_ids: Sequence[int], stop_ids: set[int], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    kept = list(new_ids)[: request.max_new_tokens]
    for position, token in enumerate(kept):
        if token in stop_ids:
            kept = kept[:position]
            break
    return {"key": request.key, "generation": tokenizer.decode(kept, skip_special_tokens=True), "tokens": len(kept)}


def stop_token_ids(model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """End tokens: the tokenizer's and every one the model's generation config names (chat models have several)."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(named if isinstance(named, list) else [] if named is None else [named])
    return ids | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[GenerationRequest],
    *,
    batch_size: int = 64,
    cache_dir: Path | None = None,
    model_digest: str = "",
    title: str = "generating",
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Greedy continuation of every prompt with transformers; call it on all processes.

    Prompts of a batch are padded on the left to the longest; batches hold prompts of like length, or one prompt for
    models whose scores depend on the batch (`fdiv.inference.padding`). A request whose
    `draft` reaches an end token or the bound is not generated at all.

    Returns:
        By key: `generation` (text up to the end token, special tokens removed) and `tokens` (their number).
    Raises:
        DataError: a prompt and its bound exceed the model's context.

    Args:
        model: on the device it runs on. tokenizer: decodes, and pads.
        requests: prompts with their bounds; keys differ. batch_size: prompts of a batch, at most.
        cache_dir: finished batches are kept there and looked up; None: nowhere.
        model_digest: what the answers depend on besides the prompts.
        title: of the progress bar, which is shown where `progress`.
    """
    from accelerate.utils import extract_model_from_parallel
    from transformers import GenerationConfig

    model = extract_model_from_parallel(model)
    _check_context(requests, getattr(model.config, "max_position_embeddings", None))
    stop_ids = stop_token_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(sorted(stop_ids)), 0)
    device = next(model.parameters()).device
    batch_size = safe_batch_size(model, batch_size)

    @torch.no_grad()
    def compute(batch: list[GenerationRequest]) -> list[dict[str, Any]]:
        contexts = [request.prompt_ids + request.draft for request in batch]
        width = max(map(len, contexts))
        bound = max(1, max(request.max_new_tokens - len(request.draft) for request in batch))
        ids = torch.full((len(batch), width), pad_id)
        mask = torch.zeros_like(ids)
        for row, context in enumerate(contexts):
            ids[row, width - len(context) :] = torch.tensor(context)
            mask[row, width - len(context) :] = 1
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=bound,
            use_cache=True,
            repetition_penalty=1.0,
            pad_token_id=pad_id,
            eos_token_id=sorted(stop_ids) or None,
        )
        output = model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=settings)
        new = output[:, width:].tolist()
        return [
            _record(request, [*request.draft, *row], stop_ids, tokenizer)
            for request, row in zip(batch, new, strict=True)
        ]

    texts = [[r.key, list(r.prompt_ids), r.max_new_tokens] for r in requests]
    digest = fingerprint(model_digest, texts, "transformers", str(next(model.parameters()).dtype), sorted(stop_ids))
    cache = ItemCache(cache_dir, "generations", digest, process_state().process_index)
    known = [r for r in requests if r.draft and (len(r.draft) >= r.max_new_tokens or stop_ids & {*r.draft})]
    records = {request.key: _record(request, request.draft, stop_ids, tokenizer) for request in known}
    pending = [request for request in requests if request.key not in records]
    return records | run_batches(pending, compute, batch_size=batch_size, cache=cache, title=title, progress=progress)


def generate_with_vllm(
    source: VLLMSource,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[GenerationRequest],
    *,
    cache_dir: Path | None = None,
    model_digest: str = "",
    chunk: int = 512,
) -> dict[str, dict[str, Any]]:
    """Greedy continuation of every prompt with vLLM, on one process; vLLM does the batching.

    Raises:
        DataError: vLLM is not installed, or several processes run.
    """
    if process_state().num_processes > 1:
        raise DataError(
            "--backend vllm runs in one process (vLLM uses the other GPUs by itself): start without accelerate"
        )
    try:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        raise DataError(
            f"--backend vllm: {error}; install it with `make setup-vllm`, or use --backend transformers"
        ) from None
    texts = [[r.key, list(r.prompt_ids), r.max_new_tokens] for r in requests]
    stop_ids = stop_token_ids(None, tokenizer)
    digest = fingerprint(model_digest, texts, "vllm", source.dtype, sorted(stop_ids))
    cache = ItemCache(cache_dir, "generations", digest)
    pending = [request for request in requests if request.key not in cache.items]
    if pending:
        engine = LLM(
            model=source.model,
            dtype=source.dtype,
            enable_lora=source.adapter is not None,
            gpu_memory_utilization=source.memory,
        )
        adapter = LoRARequest("adapter", 1, source.adapter) if source.adapter else None
        for start in range(0, len(pending), chunk):
            part = pending[start : start + chunk]
            outputs = engine.generate(
                [{"prompt_token_ids": list(request.prompt_ids)} for request in part],
                [SamplingParams(temperature=0.0, max_tokens=max(1, request.max_new_tokens)) for request in part],
                lora_request=adapter,
            )
            cache.add(
                _record(request, output.outputs[0].token_ids, stop_ids, tokenizer)
                for request, output in zip(part, outputs, strict=True)
            )
    return {request.key: cache.items[request.key] for request in requests}
