"""The sampling pass: completions of a model, the same whatever the batch size and the number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fdiv.errors import DataError
from fdiv.inference.batches import run_batches
from fdiv.inference.cache import ItemCache
from fdiv.inference.contrastive import Contrast, ContrastProcessor
from fdiv.inference.greedy import GenerationRequest, stop_token_ids
from fdiv.inference.padding import depends_on_padding, safe_batch_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["SamplingRequest", "sample_completions"]


@dataclass(frozen=True)
class SamplingRequest(GenerationRequest):
    """One completion to draw: a prompt, the bound on the completion, and the numbers that pick its random stream.

    Equal streams draw equal uniforms. `stripped_ids` is the prompt that contrastive decoding compares with.
    """

    stream: tuple[int, ...] = ()
    stripped_ids: tuple[int, ...] = ()


class _InverseCDF:
    """A logits processor that leaves one token per row: where the row's cumulative probability passes its uniform.

    Sampling with uniforms fixed beforehand, instead of torch's generator, makes a draw depend on its own row only.
    """

    def __init__(self, uniforms: Tensor, prompt_width: int, temperature: float, top_p: float) -> None:
        self.uniforms, self.prompt_width = uniforms, prompt_width
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.size(1) - self.prompt_width
        probs = torch.softmax(scores.double() / self.temperature, dim=-1)
        cumulative = _nucleus(probs, self.top_p).cumsum(-1)
        target = self.uniforms[:, step : step + 1] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, target, right=True).clamp(max=scores.size(-1) - 1)
        return torch.full_like(scores, -float("inf")).scatter(1, token, 0.0)


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """`probs` `[B, V]` with everything outside the smallest set of tokens of mass ≥ `top_p` set to 0."""
    if top_p >= 1.0:
        return probs
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(before >= top_p, 0.0))


def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[SamplingRequest],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    contrast: Contrast | None = None,
    cache: ItemCache | None = None,
    title: str = "sampling",
    progress: bool = True,
) -> dict[str, tuple[int, ...]]:
    """Draw one completion per request from π(·|prompt) at `temperature`, cut to the `top_p` nucleus; call it on all
    processes.

    Args:
        model: a causal LM, plain or PEFT, on its device.
        tokenizer: gives the pad and end tokens.
        requests: prompts with their random streams; a completion ends with its end token, or after `max_new_tokens`.
        temperature: logits are divided by it; > 0.
        top_p: sample from the smallest set of tokens with at least this mass; 1: from all of them.
        seed: with `stream`, determines the random numbers of a request.
        batch_size: prompts per call; no influence on the draws but for floating-point rounding. 1 for models whose
            scores depend on it (`fdiv.inference.padding`).
        contrast: decode against the requests' `stripped_ids`, which doubles the rows; temperature and nucleus come
            after. None: standard decoding.
        cache: where finished completions are looked up and stored; None: nowhere.
        title, progress: the progress bar.

    Returns:
        By key: the token ids of the completion, end token included where it was sampled.

    Raises:
        DataError: `temperature` ≤ 0, `top_p` outside (0, 1], a prompt and its bound exceed the model's context, or
            `contrast` with a model whose scores depend on what stands beside a row.
    """
    from accelerate.utils import extract_model_from_parallel
    from transformers import GenerationConfig, LogitsProcessorList

    if not temperature > 0:
        raise DataError(f"temperature={temperature}: sampling needs a temperature above 0")
    if not 0 < top_p <= 1:
        raise DataError(f"top_p={top_p}: must lie in (0, 1]")
    model = extract_model_from_parallel(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    limit = getattr(base.config, "max_position_embeddings", None)
    if contrast is not None and (reason := depends_on_padding(model)) is not None:
        raise DataError(f"contrastive decoding computes two prompts side by side, and {reason}: decode as standard")
    for request in requests:
        prompt = max(len(request.prompt_ids), len(request.stripped_ids))
        if limit is not None and prompt + request.max_new_tokens > limit:
            raise DataError(
                f"{request.key}: a prompt of {prompt} tokens and max_new_tokens={request.max_new_tokens} exceed the "
                f"model's context of {limit}: lower max_new_tokens, or leave such prompts out"
            )
    stop_ids = stop_token_ids(base, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(sorted(stop_ids)), 0)
    device = next(model.parameters()).device

    @torch.no_grad()
    def compute(batch: list[SamplingRequest]) -> list[dict[str, Any]]:
        bound = max(request.max_new_tokens for request in batch)
        uniforms = np.stack([np.random.default_rng((seed, *r.stream)).random(bound) for r in batch])
        prompts = [request.prompt_ids for request in batch]
        processors: list[Any] = []
        if contrast is not None:  # the stripped prompts in a second half, which draws the same tokens
            prompts += [request.stripped_ids for request in batch]
            uniforms = np.concatenate([uniforms, uniforms])
            processors = [ContrastProcessor(contrast)]
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        processors.append(_InverseCDF(torch.from_numpy(uniforms).to(device), width, temperature, top_p))
        own_settings = base.generation_config
        # `generate` fills what is not set from the model's own generation config (penalties, forbidden tokens, …).
        base.generation_config = GenerationConfig(
            max_new_tokens=bound, do_sample=False, pad_token_id=pad_id, eos_token_id=sorted(stop_ids) or None
        )
        try:
            output = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                logits_processor=LogitsProcessorList(processors),
            )
        finally:
            base.generation_config = own_settings
        new = output[: len(batch), width:].tolist()
        return [
            {"key": request.key, "ids": _until_stop(row[: request.max_new_tokens], stop_ids)}
            for request, row in zip(batch, new, strict=True)
        ]

    batch_size = safe_batch_size(model, batch_size)
    cache = ItemCache(None, "samples", "") if cache is None else cache
    records = run_batches(requests, compute, batch_size=batch_size, cache=cache, title=title, progress=progress)
    return {key: tuple(record["ids"]) for key, record in records.items()}


def _until_stop(ids: list[int], stop_ids: set[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in stop_ids:
            return ids[: position + 1]
    return ids
