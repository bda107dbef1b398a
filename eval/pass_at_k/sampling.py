"""The sampling pass of Pass@k: n completions per task, by transformers or vLLM, each with its own random stream."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from fdiv.errors import DataError
from fdiv.eval.pass_at_k.data import EvalTask
from fdiv.eval.pass_at_k.decoding import stripped_tasks
from fdiv.inference.cache import ItemCache
from fdiv.inference.contrastive import Contrast
from fdiv.inference.encoding import Encoding
from fdiv.inference.prompting import PromptFormat
from fdiv.terminal import info

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


DEFAULT_ENCODING = Encoding()


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are sampled.

    Args:
        temperature, top_p: of the distribution sampled from.
        max_new_tokens: longest completion.
        stop: texts that end a completion; they and what follows are cut off.
        seed: with task and sample number, determines a completion.
        contrast: contrastive decoding; None: standard.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 1024
    stop: tuple[str, ...] = ()
    seed: int = 0
    contrast: Contrast | None = None

    def stamp(self) -> dict[str, Any]:
        """As plain values; `contrast`, where there is some, is for whoever knows the stripped prompts to add."""
        values = asdict(self)
        del values["contrast"]
        return values


def stream_of(task_id: str, sample: int) -> tuple[int, int]:
    """The random stream of a sample: it depends on the task's name, not on its place in the set."""
    return int.from_bytes(hashlib.sha256(task_id.encode()).digest()[:8], "big"), sample


def encode_task(
    task: EvalTask, tokenizer: Any, prompt: PromptFormat, encoding: Encoding = DEFAULT_ENCODING
) -> tuple[int, ...]:
    """Token ids of a task's prompt, as rollouts have it; a conversation goes through the tokenizer's chat template.

    Raises:
        DataError: a conversation and a tokenizer without a template, or an empty prompt.
    """
    if isinstance(task.prompt, str):
        asked, _ = prompt.row(tokenizer, task.prompt, "")
    elif not tokenizer.chat_template:
        raise DataError(f"task {task.task_id!r} is a conversation, but the tokenizer has no chat template")
    else:
        asked = task.prompt
    if isinstance(asked, str):  # continued as it stands: it has no turns
        encoding = replace(encoding, system_prompt=None)
    ids = tuple(encoding.encode_prompt(tokenizer, asked))
    if not ids:
        raise DataError(f"task {task.task_id!r} has an empty prompt: a model continues at least one token")
    return ids


def sampling_requests(
    tasks: Sequence[EvalTask],
    tokenizer: Any,
    prompt: PromptFormat,
    settings: SamplingSettings,
    n: int,
    encoding: Encoding = DEFAULT_ENCODING,
    stripped_prompt: str | None = None,
) -> list[SamplingRequest]:
    """n requests per task; the key is `TASK#SAMPLE`. With `settings.contrast` each has its stripped prompt."""
    from fdiv.inference.sampling import SamplingRequest

    stripped: list[EvalTask | None] = [None] * len(tasks)
    if settings.contrast is not None:
        assert stripped_prompt is not None
        found, same = stripped_tasks(tasks, stripped_prompt)
        stripped = list(found)
        if same:
            info(f"stripped_prompt leaves {same} of {len(tasks)} prompts as they are: nothing is contrasted there")
    requests = []
    for task, bare in zip(tasks, stripped, strict=True):
        ids = encode_task(task, tokenizer, prompt, encoding)
        stripped_ids = () if bare is None else encode_task(bare, tokenizer, prompt, encoding)
        requests += [
            SamplingRequest(
                f"{task.task_id}#{sample:06d}",
                ids,
                settings.max_new_tokens,
                rows=1 if bare is None else 2,
                stream=stream_of(task.task_id, sample),
                stripped_ids=stripped_ids,
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
    stop_token_ids: Collection[int] = (),
) -> dict[str, tuple[int, ...]]:
    """Completions by key from one vLLM engine, on one process; each finished chunk is stored.

    Every request has a seed of its own, from `settings.seed` and its stream. Unlike the transformers pass, vLLM's
    rounding depends on what it computes together, so a resumed run may differ in a few completions.

    Raises:
        DataError: vLLM is not installed, or several processes run.
    """
    from fdiv.inference.backends import EngineSource

    engine = EngineSource(
        source,
        stop_token_ids=sorted(stop_token_ids),
        stop=settings.stop,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
        batch_size=chunk,
    )
    return engine.draw(requests, cache, "sampling")
