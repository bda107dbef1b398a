"""Where pre-sampling draws completions: transformers, vLLM in this process, or a vLLM server over HTTP.

A draw depends on (seed, prompt index, sample index) alone, so a run that was cut off goes on with the same samples;
exactly so with transformers, up to vLLM's own floating-point batching elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fdiv.errors import DataError, RolloutError
from fdiv.inference.batches import run_batches
from fdiv.inference.cache import ItemCache
from fdiv.inference.greedy import VLLMSource
from fdiv.inference.processes import process_state
from fdiv.inference.sampling import SamplingRequest, sample_completions
from fdiv.inference.vllm_server import VLLMServer, asked_again, choices_of, token_ids_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["SAMPLING_BACKENDS", "EngineSource", "ServerSource", "TransformersSource", "vllm_engine"]

SAMPLING_BACKENDS = ("transformers", "vllm", "server")
_RETRIES = 4  # of a request to a server that does not answer

Drawn = dict[str, tuple[int, ...]]


def request_seed(seed: int, stream: Sequence[int]) -> int:
    """A 63-bit seed for vLLM from the numbers that pick the random stream of a request."""
    return int(np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class TransformersSource:
    """The model itself; several processes share the batches."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    temperature: float
    top_p: float
    seed: int
    batch_size: int

    def draw(self, requests: Sequence[SamplingRequest], cache: ItemCache, title: str) -> Drawn:
        """Token ids of one completion per request, by key; call it on all processes."""
        return sample_completions(
            self.model,
            self.tokenizer,
            requests,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            batch_size=self.batch_size,
            cache=cache,
            title=title,
        )


class ServerSource:
    """A vLLM server; `batch_size` requests are under way at once from each process. One without an answer (429, 5xx, a
    broken connection) is made again, four times at most; what was answered is kept.

    Args:
        url: http(s)://host:port.
        model: the reference; the server must have been started with it.
        served_model: the name the server gives it, where that is another; None: it must serve `model`.
        stop_token_ids: end tokens beside those of the model's generation config.
        temperature, top_p, seed, batch_size: of the draws.
        vocabulary: token ids of the reference; None: not known. first_wait: seconds before the first retry.

    Raises:
        RolloutError: no answer, or it serves another model.
    """

    def __init__(
        self,
        url: str,
        model: str,
        served_model: str | None,
        *,
        stop_token_ids: Sequence[int],
        temperature: float,
        top_p: float,
        seed: int,
        batch_size: int,
        vocabulary: int | None = None,
        first_wait: float = 1.0,
    ) -> None:
        self.server = VLLMServer(url, setting="server_url")
        self.stop_token_ids, self.temperature, self.top_p = list(stop_token_ids), temperature, top_p
        self.seed, self.batch_size = seed, batch_size
        self.vocabulary, self.first_wait = vocabulary, first_wait
        self.served = self._served(model, served_model)

    def _served(self, model: str, name: str | None) -> str:
        remedy = "start the server with the reference, or say with server_model which of them is the reference"
        return self.server.find(name or model, remedy)["id"]

    def draw(self, requests: Sequence[SamplingRequest], cache: ItemCache, title: str) -> Drawn:
        """Token ids of one completion per request, by key; call it on all processes."""

        def compute(batch: list[SamplingRequest]) -> list[dict[str, Any]]:
            left = [request for request in batch if request.key not in cache.items]
            if not left:
                return []
            with ThreadPoolExecutor(len(left)) as pool:
                asked = [pool.submit(self._one, request) for request in left]
            failures = [error for one in asked if (error := one.exception()) is not None]
            answers = [one.result() for one in asked if one.exception() is None]
            if failures:  # the others' answers stay
                cache.add(answers)
                raise failures[0]
            return answers

        records = run_batches(requests, compute, batch_size=self.batch_size, cache=cache, title=title)
        return {key: tuple(record["ids"]) for key, record in records.items()}

    def _one(self, request: SamplingRequest) -> dict[str, Any]:
        # Everything a server would fill in from the model's generation config is said outright.
        body = {
            "model": self.served,
            "prompt": list(request.prompt_ids),
            "max_tokens": request.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": request_seed(self.seed, request.stream),
            "stop_token_ids": self.stop_token_ids,
            "return_token_ids": True,
        }
        answer = asked_again(lambda: self.server.post("/v1/completions", body), _RETRIES, self.first_wait)
        choices = choices_of(answer, 1)
        ids = None if choices is None else choices[0].get("token_ids")
        return {"key": request.key, "ids": _checked_ids(ids, request, self.server.base_url, self.vocabulary)}


@functools.cache
def vllm_engine(source: VLLMSource) -> Any:
    """The engine of this process for `source`, one for all calls, as its start takes minutes.

    Raises:
        DataError: vLLM is not installed, or several processes run.
    """
    if process_state().num_processes > 1:
        raise DataError(
            "backend vllm runs in one process (vLLM uses the other GPUs by itself): start without accelerate"
        )
    try:
        from vllm import LLM
    except ImportError as error:
        raise DataError(
            f"backend vllm: {error}; install it with `make setup-vllm`, or use backend transformers or server"
        ) from None
    return LLM(
        model=source.model,
        dtype=source.dtype,
        enable_lora=source.adapter is not None,
        gpu_memory_utilization=source.memory,
        generation_config="vllm",  # no penalties or truncation from the model's own file
    )


class EngineSource:
    """vLLM inside this process, which then must be the only one (vLLM spreads over GPUs by itself)."""

    def __init__(
        self,
        source: VLLMSource,
        *,
        stop_token_ids: Sequence[int],
        temperature: float,
        top_p: float,
        seed: int,
        batch_size: int,
        stop: Sequence[str] = (),
    ) -> None:
        self.source, self.stop_token_ids, self.stop = source, list(stop_token_ids), list(stop)
        self.temperature, self.top_p, self.seed, self.batch_size = temperature, top_p, seed, batch_size

    def draw(self, requests: Sequence[SamplingRequest], cache: ItemCache, title: str) -> Drawn:
        """Token ids of one completion per request, by key."""
        pending = [request for request in requests if request.key not in cache.items]
        if pending:
            from rich.progress import Progress

            with Progress(transient=True) as bar:
                task = bar.add_task(title, total=len(requests), completed=len(requests) - len(pending))
                for start in range(0, len(pending), self.batch_size):
                    part = pending[start : start + self.batch_size]
                    cache.add(self._answers(part))
                    bar.advance(task, len(part))
        return {request.key: tuple(cache.items[request.key]["ids"]) for request in requests}

    def _answers(self, part: Sequence[SamplingRequest]) -> list[dict[str, Any]]:
        engine = vllm_engine(self.source)

        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        settings = [
            SamplingParams(
                temperature=self.temperature,
                top_p=self.top_p,
                max_tokens=request.max_new_tokens,
                seed=request_seed(self.seed, request.stream),
                stop_token_ids=self.stop_token_ids,
                stop=self.stop or None,
            )
            for request in part
        ]
        outputs = engine.generate(
            [{"prompt_token_ids": list(request.prompt_ids)} for request in part],
            settings,
            lora_request=LoRARequest("adapter", 1, self.source.adapter) if self.source.adapter else None,
            use_tqdm=False,
        )
        return [
            {"key": request.key, "ids": _checked_ids(list(output.outputs[0].token_ids), request, "vLLM")}
            for request, output in zip(part, outputs, strict=True)
        ]


def _checked_ids(ids: Any, request: SamplingRequest, source: str, vocabulary: int | None = None) -> list[int]:
    """The token ids of one answer.

    Raises:
        RolloutError: none, which no model can draw: a completion holds at least its end token; or ids that are none.
    """
    if not ids:
        raise RolloutError(
            f"{source} returned no tokens for sample {request.key}: the server must be vLLM and return token ids "
            "(0.10 or newer); check its context length"
        )
    return token_ids_of(ids, f"{source}, sample {request.key}", most=request.max_new_tokens, vocabulary=vocabulary)
