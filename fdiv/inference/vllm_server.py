r"""Rollouts from a vLLM server over plain HTTP, with weights passed through a directory.

The server may live in another environment or on another machine; the trainer's needs no vLLM. Start it with

    VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server \
        --model MODEL --logprobs-mode processed_logprobs

(`--dtype float32 --enforce-eager` on a CPU). VLLM_SERVER_DEV_MODE opens the end point that reloads weights: let
nothing but the trainer reach that port.
"""

from __future__ import annotations

import http.client
import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdiv.errors import RolloutError

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "NoAnswerError",
    "VLLMServer",
    "VLLMServerRollouts",
    "asked_again",
    "choices_of",
    "merged_state_dict",
    "token_ids_of",
]

_LONGEST_WAIT = 30.0


class NoAnswerError(RolloutError):
    """Nothing answers, or the server says that it cannot just now (5xx, 429): the same request may succeed later.

    Attributes:
        status: of the answer; None: there was none.
        wait: seconds that the server asks to wait (Retry-After); None: it says nothing.
    """

    def __init__(self, message: str, status: int | None = None, wait: float | None = None) -> None:
        super().__init__(message)
        self.status, self.wait = status, wait


class VLLMServer:
    """A vLLM server, or another with the OpenAI end points.

    Args:
        base_url: http(s)://host:port of the server, with or without `/v1` behind it.
        timeout: seconds to wait for one answer.
        setting: the key or flag that gave `base_url`, for messages.
        key: what the server wants to see as a bearer token; None: nothing.

    Raises:
        ValueError: `base_url` is no http(s) address.
        RolloutError: (when asked) no answer, or one that is an error or no JSON.
    """

    def __init__(
        self, base_url: str, *, timeout: float = 600.0, setting: str = "rollout_server_url", key: str | None = None
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"{setting}={base_url!r}: it must start with http:// or https://")
        self.base_url = base_url.rstrip("/").removesuffix("/v1").rstrip("/")
        self.timeout, self.setting, self._key = timeout, setting, key

    def models(self) -> list[dict[str, Any]]:
        """What the server serves: mappings with `id` and, from vLLM, `root` (the path or name it was started with)."""
        answer = self.get("/v1/models")
        offered = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(offered, list) or not all(isinstance(entry, dict) and "id" in entry for entry in offered):
            raise RolloutError(
                f"{self.base_url}/v1/models answered no list of models: give the address of an OpenAI-compatible "
                f"server in {self.setting}"
            )
        return offered

    def find(self, model: str | None, remedy: str) -> dict[str, Any]:
        """The entry of `models` that is `model`: by the name it is served under, or the path or name it was started
        with. None: the only one.

        Raises:
            RolloutError: it is not there, with `remedy`.
        """
        offered = self.models()
        if model is None and len(offered) == 1:
            return offered[0]
        for entry in offered if model is not None else ():
            root = entry.get("root")
            same_place = Path(str(model)).exists() and Path(str(root)).resolve() == Path(str(model)).resolve()
            if model in (entry["id"], root) or same_place:
                return entry
        names = ", ".join(str(entry["id"]) for entry in offered)
        raise RolloutError(f"{self.base_url} serves {names}, not {model or 'one model alone'}: {remedy}")

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer to a POST of `body`; None for an empty answer."""
        return self._open(
            urllib.request.Request(
                self.base_url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
        )

    def get(self, path: str) -> Any:
        """The JSON answer to a GET."""
        return self._open(urllib.request.Request(self.base_url + path))

    def _open(self, request: urllib.request.Request) -> Any:
        if self._key is not None:  # not sent to where a redirection points
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                content = answer.read()
            return json.loads(content, object_pairs_hook=_unique) if content else None
        except urllib.error.HTTPError as error:
            said = f"vLLM server: {request.full_url} answered {error.code}: {_detail(error)}"
            if error.code >= 500 or error.code in (408, 429):
                wait = str(error.headers.get("Retry-After") or "")
                raise NoAnswerError(said, error.code, float(wait) if wait.isdecimal() else None) from error
            remedy = (
                "; the environment variable FDIV_API_KEY holds the key of an API" if error.code in (401, 403) else ""
            )
            raise RolloutError(said + remedy) from error
        except (OSError, http.client.HTTPException) as error:  # refused, reset or cut off half-way, timed out
            raise NoAnswerError(
                f"no vLLM server answers at {request.full_url} ({error}): start one, or correct {self.setting}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise RolloutError(f"{request.full_url} answered something that is no JSON: {error}") from error


def _detail(error: urllib.error.HTTPError) -> str:
    """The first words of an error's text, which may be cut off like any other."""
    try:
        return " ".join(error.read(1000).decode(errors="replace").split())[:200]
    except (OSError, http.client.HTTPException) as cut:
        return f"its text did not come ({cut})"


def asked_again(ask: Callable[[], Any], retries: int, first_wait: float = 1.0) -> Any:
    """`ask()`, made again while there is no answer: after 1, 2, 4 … times `first_wait` seconds or as the server says,
    at most 30.

    Raises:
        RolloutError: no answer after `retries` further tries.
    """
    started, wait = time.monotonic(), first_wait
    for attempt in range(retries + 1):
        try:
            return ask()
        except NoAnswerError as error:
            if attempt == retries:
                seconds = time.monotonic() - started
                raise RolloutError(f"{error}; asked {attempt + 1} times in {seconds:.0f} s") from error
            time.sleep(min(wait if error.wait is None else error.wait, _LONGEST_WAIT))
            wait *= 2
    return None


def choices_of(answer: Any, count: int) -> list[dict[str, Any]] | None:
    """The `count` choices of a completion, by `index` where there are several; None: it holds something else."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != count or not all(isinstance(one, dict) for one in choices):
        return None
    if count > 1:
        if sorted(one["index"] for one in choices if isinstance(one.get("index"), int)) != list(range(count)):
            return None
        choices = sorted(choices, key=lambda one: one["index"])
    return choices


def token_ids_of(ids: Any, what: str, *, most: int, vocabulary: int | None = None) -> list[int]:
    """The token ids of a completion that a server gave.

    Args:
        ids: as it gave them. what: server and sample, for messages. most: tokens that were asked for.
        vocabulary: token ids of the model; None: not known.

    Raises:
        RolloutError: something that is no token id of the model, or more of them than were asked for.
    """
    known = isinstance(ids, list | tuple)
    wrong = [one for one in ids if not _is_token(one, vocabulary)][:1] if known else [ids]
    if wrong:
        size = "" if vocabulary is None else f" of {vocabulary}"
        raise RolloutError(f"{what}: {wrong[0]!r:.60} in place of a token id{size}: does it serve this model?")
    if len(ids) > most:
        raise RolloutError(f"{what}: {len(ids)} tokens, and {most} at most were asked for: is it a vLLM server?")
    return list(ids)


def _is_token(one: Any, vocabulary: int | None) -> bool:
    return isinstance(one, int) and not isinstance(one, bool) and 0 <= one and (vocabulary is None or one < vocabulary)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of a name that stands twice Python would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} stands twice in an object")
    return found


class VLLMServerRollouts(VLLMServer):
    """TRL `rollout_func`: one completion per prompt from the server, which holds the weights of the last hand-over.

    Weights are passed before the first rollout and whenever `rollout_version(trainer)` changed since; a trainer
    without that method is at version `state.global_step`. Each process asks for its own prompts; the main process
    passes the weights. An adapter is merged into a copy of the weights, never into the model.

    Args:
        base_url: http(s)://host:port of the server.
        sync_dir: a directory that trainer and server both see under the same path.
        timeout: seconds to wait for one answer.

    Raises:
        RolloutError: no answer, an answer that is not a completion per prompt, or no permission to reload weights.
    """

    def __init__(self, base_url: str, sync_dir: str | Path, *, timeout: float = 600.0) -> None:
        super().__init__(base_url, timeout=timeout)
        self.sync_dir = Path(sync_dir)
        self._model: str | None = None
        self._version: Any = None

    def __call__(self, prompts: list, trainer: Any) -> dict[str, Any]:
        self._hand_over(trainer)
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
        answer = self.post("/v1/completions", self._request(prompt_ids, trainer))
        choices = choices_of(answer, len(prompts))
        if choices is None:
            given = answer.get("choices") if isinstance(answer, dict) else None
            count = len(given) if isinstance(given, list) else "no"
            raise RolloutError(
                f"{self.base_url} returned {count} completions for {len(prompts)} prompts, or not one for each: is it "
                "a vLLM server?"
            )
        ids, log_probs = [], []
        for number, choice in enumerate(choices):
            what = f"{self.base_url}, completion {number}"
            ids.append(token_ids_of(choice.get("token_ids"), what, most=trainer.max_completion_length))
            said = choice.get("logprobs")
            log_probs.append(said.get("token_logprobs") if isinstance(said, dict) else None)
            if not isinstance(log_probs[-1], list) or not all(isinstance(one, int | float) for one in log_probs[-1]):
                raise RolloutError(f"{what}: no log-probabilities of its tokens: is it a vLLM server?")
        return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": log_probs}

    def _request(self, prompt_ids: list[list[int]], trainer: Any) -> dict[str, Any]:
        if self._model is None:
            self._model = self.models()[0]["id"]
        return {
            "model": self._model,
            "prompt": prompt_ids,
            "n": 1,
            "max_tokens": trainer.max_completion_length,
            "temperature": trainer.temperature,
            "top_p": trainer.top_p,
            "top_k": trainer.top_k or -1,
            "min_p": trainer.min_p or 0.0,
            "repetition_penalty": trainer.repetition_penalty,
            "stop_token_ids": list(trainer.eos_token_ids),
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **(trainer.args.generation_kwargs or {}),
        }

    # ---------------------------------------------------------------- weights
    def _hand_over(self, trainer: Any) -> None:
        ask = getattr(trainer, "rollout_version", None)
        version = trainer.state.global_step if ask is None else ask()
        if version == self._version:
            return
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathers ZeRO-3 and FSDP shards
        if trainer.accelerator.is_main_process:
            model = trainer.accelerator.unwrap_model(trainer.model)
            target = (self.sync_dir / f"version-{version}").resolve()
            inner = model.get_base_model() if hasattr(model, "peft_config") else model
            inner.save_pretrained(target, state_dict=merged_state_dict(model, state))
            self._reload(target)
            for old in self.sync_dir.glob("version-*"):
                if old.resolve() != target:
                    shutil.rmtree(old)
        trainer.accelerator.wait_for_everyone()
        self._version = version

    def _reload(self, path: Path) -> None:
        try:
            self.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(path)}})
        except RolloutError as error:
            raise RolloutError(
                f"{error}. If that is a 404, start the server with VLLM_SERVER_DEV_MODE=1, which opens the end point "
                f"for reloading weights; else check that the server sees {path}"
            ) from error
        self.post("/reset_prefix_cache", {})


def merged_state_dict(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` of `model` with its active LoRA adapters added to the base weights, under the base model's names.

    Modules of `modules_to_save` (a head trained whole) take the place of the base's.

    The model itself is not touched: merging and unmerging would change its weights by rounding. A model without
    adapters gives `state` unchanged.

    Raises:
        RolloutError: an adapter that is not plain LoRA (DoRA, prompt learning, …), whose merged weight is not a sum; a
            base in 4 or 8 bits; an adapter on the embeddings or the head of a model that ties them.
    """
    if not hasattr(model, "peft_config"):
        return state
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    from fdiv.inference.tied_weights import adapter_on_tied_weights

    tied = adapter_on_tied_weights(model)
    if tied is not None:
        raise RolloutError(
            f"the adapter changes {tied} of a model that shares one matrix between embeddings and head, so it "
            "cannot be passed to a server as weights: leave that module out of lora_target_modules and "
            "lora_modules_to_save, or let transformers sample (leave rollout_server_url out)"
        )
    prefix = "base_model.model."
    # What PEFT added, it keeps outside `base_layer`: lora_A, lora_B, …
    merged = {
        name.removeprefix(prefix).replace(".base_layer.", "."): tensor
        for name, tensor in state.items()
        if name.startswith(prefix) and ".lora_" not in name and ".modules_to_save." not in name
    }
    _put_saved_modules(model, state, prefix, merged)
    found = False
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if (
            not isinstance(module, LoraLayer)
            or any(module.use_dora.values())
            or not hasattr(module, "get_delta_weight")
        ):
            raise RolloutError(
                f"{name} carries a {type(module).__name__} adapter, whose merged weight cannot be formed without "
                "touching the model: use plain LoRA, or TRL's vLLM modes"
            )
        found = True
        key = f"{name}.weight"
        if not merged[key].is_floating_point():
            raise RolloutError(
                f"{name} is quantised: the base of a QLoRA run cannot be passed to a server as weights; let "
                "transformers sample (leave rollout_server_url out), or do without load_in_4bit and load_in_8bit"
            )
        for adapter in module.active_adapters:
            delta = module.get_delta_weight(adapter)
            merged[key] = merged[key] + delta.to(merged[key])
    if not found:
        raise RolloutError("the PEFT method adds no LoRA layer, so it cannot be passed as weights: use plain LoRA")
    return merged


def _put_saved_modules(
    model: nn.Module, state: dict[str, torch.Tensor], prefix: str, merged: dict[str, torch.Tensor]
) -> None:
    """In `merged`, the trained copies of `modules_to_save` under the names of the modules they stand for."""
    from peft.utils import ModulesToSaveWrapper

    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        for key in [key for key in merged if key.startswith(f"{name}.original_module.")]:
            plain = key.replace(".original_module.", ".", 1)
            merged[plain] = merged.pop(key)
            for adapter in module.active_adapters:
                merged[plain] = state[prefix + key.replace(".original_module.", f".modules_to_save.{adapter}.", 1)]
