"""The most likely tokens at every place of a given completion, from a vLLM server's prompt log-probabilities.

`/v1/completions` with `prompt_logprobs: k` answers, for every token of the prompt, the k most likely ones and the
token itself, as `{"ID": {"logprob": …, "rank": …, "decoded_token": …}}`, at temperature 1; −∞ comes as −9999. A server
gives at most 20 unless it was started with `--max-logprobs`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdiv.errors import RolloutError
from fdiv.inference.vllm_server import VLLMServer, asked_again, choices_of

__all__ = ["PromptLogProbs", "ServedTokens"]

_AT_ONCE = 8  # requests under way from one process
_IMPOSSIBLE = -9990.0  # vLLM writes −9999 for −∞, which JSON lacks
_ROUNDING = 1e-3  # how far above 0 a log-probability, above 1 their mass may be by rounding
_LEAST_REST = float(torch.finfo(torch.float32).eps)


class ServedTokens(NamedTuple):
    """What the server says of the `n` tokens of one completion.

    Attributes:
        ids: `[n, k]`, the most likely first; −1 for one that has no mass, or is none of the vocabulary.
        log_probs: `[n, k]`. log_tail: `[n]`, of the mass of all other tokens, at least the rounding of float32.
        own: `[n]`, log-probabilities of the tokens themselves. All float32.
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor
    own: Tensor


class PromptLogProbs:
    """A vLLM server that is asked for the top k at every token of a completion.

    Args:
        url: http(s)://host:port. model: path or hub name the server was started with, or the name it serves it under.
        k: most likely tokens. setting: the key or flag of the URL, for messages.
        timeout: seconds for one answer. retries: how often a request without an answer is made again, after 1, 2, 4 …
            seconds, at most 30.

    Raises:
        ValueError: no http(s) address.
        RolloutError: no answer, or it serves another model.
    """

    def __init__(
        self, url: str, model: str | None, k: int, *, setting: str, timeout: float = 600.0, retries: int = 4
    ) -> None:
        self.server = VLLMServer(url, timeout=timeout, setting=setting)
        self.k, self.retries, self.first_wait = k, retries, 1.0
        entry = self._again(lambda: self.server.find(model, "start the server with the teacher, or name one of them"))
        self.served, self.root = str(entry["id"]), str(entry.get("root") or entry["id"])

    def ask(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], vocabulary: int) -> list[ServedTokens]:
        """The top k at every token of the completions.

        Args:
            rows: token ids of (prompt, completion). vocabulary: ids from here on are masked out.

        Raises:
            RolloutError: no answer after all retries, or one that no model can have given.
        """
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(lambda row: self._one(*row, vocabulary), rows))

    def _one(self, prompt: Sequence[int], completion: Sequence[int], vocabulary: int) -> ServedTokens:
        ids = [*prompt, *completion]
        body = {
            "model": self.served, "prompt": ids, "max_tokens": 1, "temperature": 1.0, "seed": 0, "n": 1,
            "prompt_logprobs": self.k,
        }  # fmt: skip
        answer = self._again(lambda: self.server.post("/v1/completions", body))
        places = self._places(answer, len(ids))
        try:
            rows = [self._row(places[len(prompt) + n], token, vocabulary) for n, token in enumerate(completion)]
        except ValueError as error:
            raise RolloutError(f"{self.server.base_url}, completion {list(completion)[:6]} …: {error}") from None
        tables = [torch.tensor([row[part] for row in rows]) for part in range(4)]
        return ServedTokens(tables[0], *(table.float() for table in tables[1:]))

    def _places(self, answer: Any, length: int) -> list[Any]:
        """`prompt_logprobs` of the one choice, one entry for each token that was sent."""
        choices = choices_of(answer, 1)
        found = None if choices is None else choices[0].get("prompt_logprobs")
        if not isinstance(found, list) or len(found) != length:
            what = f"{len(found)} entries" if isinstance(found, list) else "nothing"
            raise RolloutError(
                f"{self.server.base_url} gave {what} as prompt_logprobs for {length} tokens: is it a vLLM server?"
            )
        return found

    def _row(self, place: Any, token: int, vocabulary: int) -> tuple[list[int], list[float], float, float]:
        """ids, log-probs, log of the rest and the token's own of one place; ValueError says what is wrong."""
        known = _numbers(place)
        if token not in known:
            raise ValueError(f"no log-probability of the token {token} itself")
        wanted = min(self.k, vocabulary)
        if len(known) < wanted:
            raise ValueError(
                f"{len(known)} of the {wanted} most likely tokens: start the server with --max-logprobs {self.k}, or "
                "lower k"
            )
        best = sorted(known, key=lambda number: (-known[number], number))[: self.k]
        mass = sum(math.exp(known[number]) for number in best)
        if mass > 1 + _ROUNDING * 10:
            raise ValueError(f"the most likely tokens have a mass of {mass:.3f}, more than 1: no log-probabilities")
        # What is no token of the student's is masked out, and the rest is a distribution again.
        beyond = sum(math.exp(known[number]) for number in best if number >= vocabulary)
        shift = math.log1p(-min(beyond, 1 - _LEAST_REST))
        kept = [number for number in best if number < vocabulary and known[number] > _IMPOSSIBLE]
        log_probs = [known[number] - shift for number in kept]
        rest = 1.0 - sum(map(math.exp, log_probs))
        tail = -math.inf if len(kept) >= vocabulary else math.log(max(rest, _LEAST_REST))
        missing = self.k - len(kept)
        own = known[token] - shift if known[token] > _IMPOSSIBLE else -math.inf
        return [*kept, *[-1] * missing], [*log_probs, *[-math.inf] * missing], tail, own

    def _again(self, ask: Any) -> Any:
        """Ask until there is an answer, at most `retries` times more."""
        return asked_again(ask, self.retries, self.first_wait)


def _numbers(place: Any) -> dict[int, float]:
    """Token id → log-probability, at most 0; ValueError for what is none."""
    if not isinstance(place, Mapping) or not place:
        raise ValueError(f"{str(place)[:40]} in place of log-probabilities")
    known: dict[int, float] = {}
    for key, entry in place.items():
        value = entry.get("logprob") if isinstance(entry, Mapping) else entry
        if not str(key).isdecimal():
            raise ValueError(f"{key!r} is no token id")
        if int(key) in known:
            raise ValueError(f"the token {int(key)} stands twice")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value) or value > _ROUNDING:
            raise ValueError(f"the log-probability of token {key} is {value}: a number of at most 0 is due")
        known[int(key)] = min(float(value), 0.0)
    return known
