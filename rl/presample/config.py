"""Settings of pre-sampling: the flags of `fdiv presample` and the keys of `prepare: {name: rehearsal}`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fdiv.inference.backends import SAMPLING_BACKENDS
from fdiv.rl.dph.rehearsal import parse_threshold

__all__ = ["DECISIONS", "PresampleConfig"]

DECISIONS = ("threshold", "wrong", "tries", "training_temperature", "reward_threshold", "allow_empty")
"""Settings that say what becomes of the samples; the others say how they are drawn and scored."""
_MACHINE = ("batch_size", "server_url", "vllm_memory")
_WRONG = ("explore", "drop")


def _key(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass
class PresampleConfig:
    """How the reference is sampled and what becomes of a prompt.

    Args:
        model: Reference: directory or hub name.
        dataset: Rows with `prompt` (text or messages) and the columns the reward reads: a file (json, jsonl, parquet,
            csv), a directory, or a hub name.
        reward: What scores completions, as in a recipe: a name, `{name: …}`, `module:function` with TRL's signature,
            or (in Python) such a function. 1 is correct, 0 is not; None is "not scored" and is counted.
        split: Split of the dataset.
        adapter: PEFT adapter on the model.
        dtype: `auto` is float32 on a CPU and the checkpoint's own type elsewhere; give the type of the training.
        num_samples: n, samples per prompt.
        temperature: Of the sampling.
        top_p: Of the sampling.
        max_completion_length: Bound on a completion, in tokens.
        chat_template_kwargs: Passed to the chat template, as in training.
        reward_threshold: For a reward that is not 0/1: a completion is correct from this reward on.
        threshold: A prompt is near-perfect where at least this share of its n samples is correct: 7/8, 0.875.
        wrong: What becomes of prompts without a correct sample: `explore` (the paper) or `drop`.
        tries: How often one more sample is drawn for a near-perfect prompt until one is correct; a prompt without
            is explored.
        training_temperature: Logits are divided by it for the reference log-probabilities; None: `temperature`.
        backend: `transformers`; `vllm` (in this process); `server` (a vLLM server at `server_url`).
        server_url: http(s)://host:port of the server.
        server_model: Name under which it serves the reference, where that is not `model`.
        vllm_memory: Share of GPU memory vLLM takes.
        batch_size: Samples at a time.
        seed: Of the samples.
        allow_empty: Write an empty cache, or an empty explore set, instead of an error.

    Raises:
        ValueError: a value outside its range.
    """

    model: str = _key("", "Reference: directory or hub name.")
    dataset: str = _key("", "Rows with prompt and the reward's columns: a file, a directory or a hub name.")
    reward: dict[str, Any] | str | None = _key(None, "What scores completions: NAME, {name: ...}, module:function.")  # noqa: RUF009
    split: str = _key("train", "Split of the dataset.")
    adapter: str | None = _key(None, "PEFT adapter on the model.")
    dtype: str = _key("auto", "auto (float32 on a CPU), float32, bfloat16, float16: that of the training.")
    num_samples: int = _key(8, "Samples per prompt.")
    temperature: float = _key(1.0, "Temperature of the sampling.")
    top_p: float = _key(0.95, "Nucleus of the sampling.")
    max_completion_length: int = _key(256, "Bound on a completion, in tokens.")
    chat_template_kwargs: dict[str, Any] | None = _key(None, "Passed to the chat template, as in training.")  # noqa: RUF009
    reward_threshold: float | None = _key(None, "A completion is correct from this reward on. Not set: 0/1 rewards.")
    threshold: str | float = _key("7/8", "Share of correct samples from which on a prompt is near-perfect.")
    wrong: str = _key("explore", "What becomes of prompts without a correct sample.", choices=list(_WRONG))
    tries: int = _key(1, "Draws of the one more sample that must be correct.")
    training_temperature: float | None = _key(None, "Temperature of the log-probabilities. Not set: temperature.")
    backend: str = _key("transformers", "What samples.", choices=list(SAMPLING_BACKENDS))
    server_url: str | None = _key(None, "http(s)://host:port of the vLLM server.")
    server_model: str | None = _key(None, "Name under which the server serves the reference.")
    vllm_memory: float = _key(0.5, "Share of GPU memory vLLM takes.")
    batch_size: int = _key(64, "Samples at a time.")
    seed: int = _key(0, "Seed of the samples.")
    allow_empty: bool = _key(False, "Write an empty cache or explore set instead of an error.")

    def __post_init__(self) -> None:
        for entry in fields(self):
            choices, value = entry.metadata.get("choices"), getattr(self, entry.name)
            if choices and value not in choices:
                raise ValueError(f"{entry.name} must be one of {', '.join(choices)}, got {value!r}")
        for name in ("num_samples", "max_completion_length", "tries", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("temperature", "training_temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        for name in ("top_p", "vllm_memory"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1], got {getattr(self, name)}")
        if (self.backend == "server") != (self.server_url is not None):
            raise ValueError(
                f"server_url belongs to backend: server, and only to it (backend={self.backend}, "
                f"server_url={self.server_url})"
            )
        if self.server_model is not None and self.backend != "server":
            raise ValueError(f"server_model belongs to backend: server (backend={self.backend})")
        if self.backend == "server" and self.adapter and not self.server_model:
            raise ValueError("with an adapter, say in server_model under which name the server serves it")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or above, got {self.seed}")
        parse_threshold(self.threshold)

    @property
    def scoring_temperature(self) -> float:
        """The temperature of the reference log-probabilities."""
        return float(self.temperature if self.training_temperature is None else self.training_temperature)

    def drawing(self) -> dict[str, Any]:
        """The settings that the samples and their rewards depend on, JSON-ready."""
        names = [entry.name for entry in fields(PresampleConfig) if entry.name not in (*DECISIONS, *_MACHINE)]
        settings = {name: asdict(self)[name] for name in names}
        if callable(self.reward):
            settings["reward"] = f"{self.reward.__module__}:{self.reward.__qualname__}"
        return settings

    def decisions(self) -> dict[str, Any]:
        """The settings that the partition and the cache depend on, given the samples; JSON-ready."""
        return {
            "threshold": str(parse_threshold(self.threshold)),
            "wrong": self.wrong,
            "tries": self.tries,
            "training_temperature": self.scoring_temperature,
            "reward_threshold": self.reward_threshold,
            "allow_empty": self.allow_empty,
        }
