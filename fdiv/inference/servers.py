"""Completions from OpenAI-compatible servers of the user's own: several at once, a bounded number of requests at each.

A data-parallel vLLM server is one address here, and shares its requests itself. A completion depends on (seed, task,
sample) as far as the server keeps to the seed of a request; vLLM does, up to its floating-point batching.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from fdiv.errors import DataError, RolloutError
from fdiv.inference.backends import request_seed
from fdiv.inference.cache import ItemCache
from fdiv.inference.sampling import SamplingRequest
from fdiv.inference.vllm_server import NoAnswerError, VLLMServer, choices_of, token_ids_of
from fdiv.terminal import info

__all__ = ["KEY_VARIABLE", "CompletionServers", "addresses"]

KEY_VARIABLE = "FDIV_API_KEY"
"""The environment variable with the key of an API; it is never written anywhere."""

_SETTING = "--server_url"
_RETRIES = 5  # of a request that gets no answer (after a timeout one): the server is then taken for dead
_BUSY_RETRIES = 20  # of one that is answered with 429: the server lives
_LONGEST_WAIT = 30.0
_STOPS = 4  # texts that OpenAI's interface takes
_SMALL_SEED = 2**31 - 1  # what servers other than vLLM are sure to take


def addresses(urls: Sequence[str]) -> list[str]:
    """The addresses without a slash or `/v1` at the end, each once.

    Raises:
        DataError: one that is no http(s) address, or holds a password.
    """
    found: dict[str, None] = {}
    for url in urls:
        if "@" in url.partition("://")[2].partition("/")[0]:
            raise DataError(f"{_SETTING} holds a user name or password: give a key in the variable {KEY_VARIABLE}")
        try:
            found[VLLMServer(url, setting=_SETTING).base_url] = None
        except ValueError as error:
            raise DataError(str(error)) from None
    if len(found) < len(urls):
        info(f"{_SETTING}: {len(urls)} addresses, of which {len(found)} are different: each is one server")
    return list(found)


class _Work:
    """The requests that are left, shared by task: a server that begins a task gets its samples, so that it computes
    the prompt once; one that has nothing left takes from the server with most."""

    def __init__(self, requests: Sequence[SamplingRequest], servers: int) -> None:
        tasks: dict[str, deque[SamplingRequest]] = {}
        for request in requests:
            tasks.setdefault(request.key.rpartition("#")[0], deque()).append(request)
        self._tasks = deque(tasks.values())
        self._own: list[deque[SamplingRequest]] = [deque() for _ in range(servers)]
        self._under_way = 0
        self._ended = False
        self._changed = threading.Condition()

    def take(self, server: int) -> SamplingRequest | None:
        """The next request of a server; None when there is nothing left to ask. Waits while what others ask may still
        come back."""
        with self._changed:
            while not self._ended:
                own = self._own[server]
                if not own and self._tasks:
                    own.extend(self._tasks.popleft())
                source = own or max(self._own, key=len)
                if source:
                    self._under_way += 1
                    return source.popleft()
                if not self._under_way:
                    return None
                self._changed.wait()
            return None

    def done(self) -> None:
        """A request was answered."""
        with self._changed:
            self._under_way -= 1
            self._changed.notify_all()

    def give_back(self, server: int, request: SamplingRequest) -> None:
        """A request that `server`, which is dead, did not answer; with all it had taken."""
        with self._changed:
            self._under_way -= 1
            self._tasks.appendleft(deque([request, *self._own[server]]))
            self._own[server].clear()
            self._changed.notify_all()

    def end(self) -> None:
        """Nothing is taken any more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class _Pass:
    """One call of `draw`: what is left, what has come, and whether it is over."""

    def __init__(self, work: _Work, temperature: float) -> None:
        self.work, self.temperature = work, temperature
        self.answers: queue.Queue[Any] = queue.Queue()
        self.stopped = threading.Event()


class CompletionServers:
    """Servers of one model, asked at the same time.

    Args:
        urls: their addresses, see `addresses`.
        model: the model; each server must serve it, under this name, from this path, or as `served_model`.
        served_model: the name that the servers give it; None: `model`.
        count_tokens: number of tokens of a text, for servers that do not say it.
        stop: texts that end a completion. stop_token_ids: end tokens, which vLLM is told.
        vocabulary: token ids of the model; None: not known.
        temperature, top_p, seed: of the completions.
        concurrency: requests under way at each server.
        timeout: seconds for one answer. pause: seconds before the first retry, doubled for each that follows.

    Raises:
        RolloutError: a server with another model; none that answers.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        served_model: str | None = None,
        *,
        count_tokens: Callable[[str], int],
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        vocabulary: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        concurrency: int = 64,
        timeout: float = 600.0,
        pause: float = 1.0,
    ) -> None:
        key = os.environ.get(KEY_VARIABLE, "").strip() or None
        if key is not None and not (key.isascii() and key.isprintable()):
            raise DataError(f"{KEY_VARIABLE} holds characters that no key has: set it again")
        self.servers = [VLLMServer(url, timeout=timeout, setting=_SETTING, key=key) for url in addresses(urls)]
        self.count_tokens, self.stop, self.stop_token_ids = count_tokens, list(stop), sorted(stop_token_ids)
        self.vocabulary, self.temperature, self.top_p, self.seed = vocabulary, temperature, top_p, seed
        self.concurrency, self.pause = concurrency, pause
        self.dead: dict[int, str] = {}
        self._served: list[dict[str, Any]] = []
        remedy = f"start it with this model, or say its name there with {_SETTING.replace('url', 'model')}"
        for number, server in enumerate(self.servers):
            entry: dict[str, Any] = {}
            try:
                entry = server.find(served_model or model, remedy)
            except NoAnswerError as error:
                self.dead[number] = str(error)
            self._served.append(entry)
        if len(self.dead) == len(self.servers):
            raise RolloutError(next(iter(self.dead.values())))
        for error in self.dead.values():
            info(f"goes on without a server: {error}")

    @property
    def names(self) -> list[str]:
        """What the servers call the model, each name once."""
        return list(dict.fromkeys(str(entry["id"]) for entry in self._served if entry))

    @property
    def context(self) -> int | None:
        """The most tokens of prompt and completion, of the server with the fewest; None: they do not say."""
        known = [entry["max_model_len"] for entry in self._served if isinstance(entry.get("max_model_len"), int)]
        return min(known, default=None)

    def living(self) -> list[int]:
        """Numbers of the servers that answer."""
        return [number for number in range(len(self.servers)) if number not in self.dead]

    def timed(self, turn: int, request: SamplingRequest) -> tuple[float, dict[str, Any]]:
        """Ask a server, whose turn it is, once: seconds to its answer, and the answer as `draw` has it.

        Raises:
            RolloutError: no answer, or one that cannot be used.
        """
        living = self.living()
        began = time.perf_counter()
        record = self._answer(living[turn % len(living)], request, self.temperature)
        return time.perf_counter() - began, record

    def draw(
        self, requests: Sequence[SamplingRequest], cache: ItemCache, title: str, *, temperature: float | None = None
    ) -> dict[str, dict[str, Any]]:
        """One completion per request, by key; what is in the cache is not asked again, what is answered is kept there.

        Args:
            requests, cache, title: see `fdiv.inference.batches.run_batches`. temperature: another than for the rest.

        Returns:
            By key: `ids`, or `completion`, `tokens` and `finish_reason` of a server that gives no token ids.
        Raises:
            RolloutError: an answer that cannot be used, or no server that answers any more; what was answered is kept.
        """
        from rich.progress import Progress

        self._check_context(requests)
        pending = [request for request in requests if request.key not in cache.items]
        one = _Pass(_Work(pending, len(self.servers)), self.temperature if temperature is None else temperature)
        answers = one.answers
        threads = [
            threading.Thread(target=self._serve, args=(number, one), daemon=True)
            for number in self.living()
            for _ in range(min(self.concurrency, len(pending)))
        ]
        try:
            with Progress(transient=True) as bar:
                task = bar.add_task(title, total=len(requests), completed=len(requests) - len(pending))
                for thread in threads:
                    thread.start()
                left = len(pending)
                while left:
                    for record in _arrived(answers):
                        left -= 1
                        cache.add([record])
                        bar.advance(task)
                    if left and not self.living() and answers.empty():
                        raise RolloutError(self._all_dead(len(requests) - left, len(requests)))
        finally:
            one.stopped.set()
            one.work.end()
            cache.add(record for record in _left(answers) if record["key"] not in cache.items)
        return {request.key: cache.items[request.key] for request in requests}

    def _check_context(self, requests: Sequence[SamplingRequest]) -> None:
        limit = self.context
        for request in requests:
            if limit is not None and len(request.prompt_ids) + request.max_new_tokens > limit:
                raise DataError(
                    f"{request.key}: a prompt of {len(request.prompt_ids)} tokens and max_new_tokens="
                    f"{request.max_new_tokens} exceed the server's context of {limit} (max_model_len): lower "
                    "max_new_tokens, or leave such prompts out"
                )

    def _all_dead(self, kept: int, total: int) -> str:
        reasons = "; ".join(dict.fromkeys(self.dead.values()))
        return (
            f"no server answers any more ({reasons}): {kept} of {total} samples are kept; start one, and run the same "
            "command again"
        )

    # ---------------------------------------------------------------- one thread of one server
    def _serve(self, number: int, one: _Pass) -> None:
        try:
            while (request := one.work.take(number)) is not None:
                try:
                    one.answers.put(self._asked(number, request, one))
                except NoAnswerError as error:
                    if number not in self.dead and not one.stopped.is_set():
                        self.dead[number] = str(error)
                        if self.living():
                            info(f"goes on without a server, its tasks go to the others: {error}")
                    one.work.give_back(number, request)
                    return
                one.work.done()
        except BaseException as error:
            one.answers.put(error)

    def _asked(self, number: int, request: SamplingRequest, one: _Pass) -> dict[str, Any]:
        """The answer to a request, asked again while the server does not answer."""
        failed = busy = 0
        while True:
            try:
                return self._answer(number, request, one.temperature)
            except NoAnswerError as error:
                busy, failed = (busy + 1, failed) if error.status == 429 else (busy, failed + _weight(error))
                if failed > _RETRIES or busy > _BUSY_RETRIES or number in self.dead or one.stopped.is_set():
                    raise
                wait = min(self.pause * 2 ** (failed + busy - 1), _LONGEST_WAIT * min(1.0, self.pause))
                wait = wait if error.wait is None else min(error.wait, _LONGEST_WAIT)
                if one.stopped.wait(wait) or number in self.dead:
                    raise

    def _answer(self, number: int, request: SamplingRequest, temperature: float) -> dict[str, Any]:
        server = self.servers[number]
        answer = server.post("/v1/completions", self._body(number, request) | {"temperature": temperature})
        choices = choices_of(answer, 1)
        choice = None if choices is None else choices[0]
        if choice is None or not (isinstance(choice.get("text"), str) or choice.get("token_ids")):
            raise RolloutError(
                f"{server.base_url} gave no completion for sample {request.key}: the server must have OpenAI's "
                "/v1/completions"
            )
        if choice.get("finish_reason") in ("abort", "error"):
            raise NoAnswerError(f"{server.base_url} broke off sample {request.key} ({choice['finish_reason']})")
        if choice.get("token_ids"):
            what, most = f"{server.base_url}, sample {request.key}", request.max_new_tokens
            ids = token_ids_of(choice["token_ids"], what, most=most, vocabulary=self.vocabulary)
            return {"key": request.key, "ids": ids}
        return {"key": request.key, **self._text_record(choice, answer.get("usage"), request)}

    def _text_record(self, choice: dict[str, Any], usage: Any, request: SamplingRequest) -> dict[str, Any]:
        text = choice["text"]
        tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
        tokens = self.count_tokens(text) if not isinstance(tokens, int) else tokens
        cuts = [position for position in (text.find(word) for word in self.stop) if position >= 0]
        reason = choice.get("finish_reason")
        if cuts or (reason == "stop" and isinstance(choice.get("stop_reason"), str)):
            found = "stop_text"
        else:
            ended = reason == "stop" or (reason != "length" and tokens < request.max_new_tokens)
            found = "stop" if ended else "length"
        return {"completion": text[: min(cuts)] if cuts else text, "tokens": tokens, "finish_reason": found}

    def _body(self, number: int, request: SamplingRequest) -> dict[str, Any]:
        entry, seed = self._served[number], request_seed(self.seed, request.stream)
        body: dict[str, Any] = {
            "model": entry["id"],
            "prompt": list(request.prompt_ids),
            "max_tokens": request.max_new_tokens,
            "top_p": self.top_p,
            "n": 1,
            "seed": seed,
        }
        if entry.get("owned_by") != "vllm":  # what OpenAI's interface knows, and no more
            stop = {"stop": self.stop[:_STOPS]} if self.stop else {}
            return {**body, **stop, "seed": seed & _SMALL_SEED}
        # Everything vLLM would fill in from the model's generation config is said outright.
        body |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True}
        return {**body, "stop": self.stop, "stop_token_ids": self.stop_token_ids}


def _weight(error: NoAnswerError) -> int:
    """What a failure counts of `_RETRIES`: one, and a whole timeout three."""
    reasons = (error.__cause__, getattr(error.__cause__, "reason", None))
    return 3 if any(isinstance(reason, TimeoutError) for reason in reasons) else 1


def _arrived(answers: queue.Queue[Any]) -> list[dict[str, Any]]:
    """What has come since the last look; waits a moment for something.

    Raises:
        what a thread raised, after nothing before it is lost.
    """
    found: list[dict[str, Any]] = []
    try:
        found.append(answers.get(timeout=0.2))
    except queue.Empty:
        return found
    if isinstance(found[0], BaseException):
        raise found[0]
    return found


def _left(answers: queue.Queue[Any]) -> list[dict[str, Any]]:
    """What came and was not looked at."""
    found = []
    while not answers.empty():
        found.append(answers.get())
    return [record for record in found if not isinstance(record, BaseException)]
