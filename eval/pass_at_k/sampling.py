"""The sampling pass of Pass@k: n completions per task, by transformers or vLLM, each with its own random stream."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fdiv.errors import DataError
from fdiv.eval.pass_at_k.data import EvalTask
from fdiv.inference.cache import ItemCache
from fdiv.inference.processes import process_state
from fdiv.inference.prompting import PromptFormat

if TYPE_CHECKING:
    from fdiv.inference.greedy import VLLMSource
    from fdiv.inference.sampling import SamplingRequest

__all__ = [
    "SamplingSettings",
    "completion_record",
    "encode_task",
    "sample_with_vllm",
    "sampling_requests",
    "stream_of",
]


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are sampled.

    Args:
        temperature, top_p: of the distribution sampled from.
        max_new_tokens: longest completion.
        stop: texts that end a completion; they and what follows are cut off.
        seed: with task and sample number, determines a completion.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 1024
    stop: tuple[str, ...] = ()
    seed: int = 0


def stream_of(task_id: str, sample: int) -> tuple[int, int]:
    """The random stream of a sample: it depends on the task's name, not on its place in the set."""
    return int.from_bytes(hashlib.sha256(task_id.encode()).digest()[:8], "big"), sample


def encode_task(task: EvalTask, tokenizer: Any, prompt: PromptFormat) -> tuple[int, ...]:
    """Token ids of a task's prompt; a conversation goes through the tokenizer's chat template.

    Raises:
        DataError: a conversation and a tokenizer without a template, or an empty prompt.
    """
    if isinstance(task.prompt, str):
        ids = prompt.encode_prompt(tokenizer, task.prompt)
    elif not tokenizer.chat_template:
        raise DataError(f"task {task.task_id!r} is a conversation, but the tokenizer has no chat template")
    else:
        text = tokenizer.apply_chat_template(task.prompt, tokenize=False, add_generation_prompt=True)
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise DataError(f"task {task.task_id!r} has an empty prompt: a model continues at least one token")
    return ids


def sampling_requests(
    tasks: Sequence[EvalTask], tokenizer: Any, prompt: PromptFormat, settings: SamplingSettings, n: int
) -> list[SamplingRequest]:
    """n requests per task; the key is `TASK#SAMPLE`."""
    from fdiv.inference.sampling import SamplingRequest

    requests = []
    for task in tasks:
        ids = encode_task(task, tokenizer, prompt)
        requests += [
            SamplingRequest(
                f"{task.task_id}#{sample:06d}", ids, settings.max_new_tokens, stream=stream_of(task.task_id, sample)
            )
            for sample in range(n)
        ]
    return requests


def completion_record(ids: Sequence[int], tokenizer: Any, stop_ids: set[int], stop: Sequence[str]) -> dict[str, Any]:
    """`completion` (text without the end token, cut at the first stop text), `tokens` (with the end token) and
    `finish_reason` (`stop`: an end token, `stop_text`, or `length`)."""
    ended = bool(ids) and ids[-1] in stop_ids
    text = tokenizer.decode(list(ids[:-1] if ended else ids), skip_special_tokens=True)
    cuts = [position for position in (text.find(word) for word in stop) if position >= 0]
    reason = "stop_text" if cuts else "stop" if ended else "length"
    return {"completion": text[: min(cuts)] if cuts else text, "tokens": len(ids), "finish_reason": reason}


def sample_with_vllm(
    source: VLLMSource,
    requests: Sequence[SamplingRequest],
    settings: SamplingSettings,
    *,
    cache: ItemCache,
    chunk: int = 4096,
) -> dict[str, tuple[int, ...]]:
    """Completions by key from one vLLM engine, on one process; each finished chunk is stored.

    Every request has a seed of its own, from `settings.seed` and its stream. Unlike the transformers pass, vLLM's
    rounding depends on what it computes together, so a resumed run may differ in a few completions.

    Raises:
        DataError: vLLM is not installed, or several processes run.
    """
    if process_state().num_processes > 1:
        raise DataError(
            "--backend vllm runs in one process (vLLM uses the other GPUs by itself): start without accelerate"
        )
    pending = [request for request in requests if request.key not in cache.items]
    if pending:
        from rich.progress import Progress

        engine, sampling_params, lora_request = _vllm_engine(source)
        adapter = lora_request("adapter", 1, source.adapter) if source.adapter else None
        with Progress(transient=True) as bar:
            task = bar.add_task("sampling", total=len(requests), completed=len(requests) - len(pending))
            for start in range(0, len(pending), chunk):
                part = pending[start : start + chunk]
                outputs = engine.generate(
                    [{"prompt_token_ids": list(request.prompt_ids)} for request in part],
                    [_vllm_params(sampling_params, request, settings) for request in part],
                    lora_request=adapter,
                    use_tqdm=False,
                )
                cache.add(
                    {"key": request.key, "ids": list(output.outputs[0].token_ids)}
                    for request, output in zip(part, outputs, strict=True)
                )
                bar.advance(task, len(part))
    return {request.key: tuple(cache.items[request.key]["ids"]) for request in requests}


@functools.cache
def _vllm_engine(source: VLLMSource) -> tuple[Any, Any, Any]:
    """The engine and the two classes its calls need; one engine for all calls, as its start takes minutes."""
    try:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        raise DataError(
            f"--backend vllm: {error}; install it with `make setup-vllm`, or use --backend transformers"
        ) from None
    engine = LLM(
        model=source.model,
        dtype=source.dtype,
        enable_lora=source.adapter is not None,
        gpu_memory_utilization=source.memory,
    )
    return engine, SamplingParams, LoRARequest


def _vllm_params(params: Any, request: SamplingRequest, settings: SamplingSettings) -> Any:
    digest = hashlib.sha256(repr((settings.seed, request.stream)).encode()).digest()
    return params(
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_tokens=request.max_new_tokens,
        stop=list(settings.stop) or None,
        seed=int.from_bytes(digest[:4], "big") >> 1,
    )
