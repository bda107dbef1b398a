"""Settings of pre-sampling: the flags of `fdiv presample` and the keys of `prepare: {name: rehearsal}`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from fdiv.inference.backends import SAMPLING_BACKENDS
from fdiv.models.dtypes import dtype_name
from fdiv.rl.dph.rehearsal import parse_threshold
from fdiv.rl.modes import resolve_mode
from fdiv.rl.presample.selection import WEIGHTS
from fdiv.training.config import ChatTemplateOptions, RowOptions, option

__all__ = ["DECISIONS", "PresampleConfig"]

DECISIONS = (
    "threshold", "wrong", "tries", "training_temperature", "reward_threshold", "allow_empty",
    "keep", "samples_per_prompt", "mode", "weights", "kind",
)  # fmt: skip
"""Settings that say what becomes of the samples; the others say how they are sampled and scored."""
_MACHINE = ("batch_size", "server_url", "vllm_memory")
_CHECKS = ("min_used_fraction",)


@dataclass
class PresampleConfig(ChatTemplateOptions, RowOptions):
    """How the reference is sampled and what becomes of a prompt.

    `reward` may also be a function with TRL's signature in Python; 1 is correct, 0 is not, None is "not scored" and is
    counted.

    Raises:
        ValueError: a value outside its range.
    """

    model: str = option("", "Reference: directory or hub name")
    dataset: str = option(
        "",
        "Rows with `prompt` (text or messages) and the columns the reward reads: a file (json, jsonl, parquet, csv), "
        "a directory, or a hub name",
    )
    reward: dict[str, Any] | str | None = option(
        None, "What scores completions: NAME, {name: …}, or `module:function` with TRL's signature"
    )
    split: str = option("train", "Split of the dataset")
    adapter: str | None = option(None, "PEFT adapter on the model")
    dtype: str = option(
        "auto",
        "auto (float32 on a CPU, the checkpoint's own elsewhere), float32, bfloat16, float16: that of the training",
    )
    num_samples: int = option(
        8, "n, samples per prompt; they sort the prompts, and at most as many are cached for one", least=1
    )
    temperature: float = option(1.0, "Temperature of the sampling", above=0)
    top_p: float = option(0.95, "Nucleus of the sampling", above=0, most=1)
    max_completion_length: int = option(256, "Bound on a completion, in tokens", least=1)
    reward_threshold: float | None = option(
        None, "For a reward that is not 0/1: a completion is correct from this reward on"
    )
    threshold: str | float = option(
        "7/8",
        "A prompt is near-perfect where at least this share of its n samples is correct: 7/8, 0.875, or `one` for at "
        "least one sample",
    )
    keep: str = option(
        "near_perfect",
        "Whose verified samples are cached: `near_perfect` prompts; `solved` ones, with at least one correct sample; "
        "`all`, where those without one get up to `tries` more samples. Near-perfect prompts that are cached are not "
        "explored, all others are",
        choices=("near_perfect", "solved", "all"),
    )
    samples_per_prompt: int = option(
        1,
        "Verified samples cached per prompt, distinct modes first. At 1 with `keep: near_perfect` it is the paper's "
        "one further sample; else correct ones of the n that were sampled, so at most `num_samples`",
        least=1,
    )
    mode: str = option(
        "answer",
        "What makes two correct samples the same: answer, expression, sql, text, or `module:function` of a completion",
    )
    weights: str = option(
        "samples",
        "What counts the same in the rehearsal loss: each cached sample, each mode, each prompt",
        choices=WEIGHTS,
    )
    kind: str | None = option(
        None,
        "Column that names the kind of a prompt, for the table; not set: kind, level, difficulty, type or subject, "
        "where it has at most 50 different values",
    )
    wrong: str = option(
        "explore",
        "What becomes of prompts without a correct sample (`explore`: the paper)",
        choices=("explore", "drop"),
    )
    tries: int = option(
        1,
        "How often one more sample is taken for a prompt that needs one (`samples_per_prompt`, `keep`) until one is "
        "correct; a prompt without is explored",
        least=1,
    )
    training_temperature: float | None = option(
        None, "Logits are divided by it for the reference log-probabilities; not set: `temperature`", above=0
    )
    backend: str = option(
        "transformers",
        "What samples: `transformers`, `vllm` (in this process), `server` (a vLLM server at `server_url`)",
        choices=SAMPLING_BACKENDS,
    )
    server_url: str | None = option(None, "http(s)://host:port of the vLLM server")
    server_model: str | None = option(None, "Name under which it serves the reference, where that is not `model`")
    vllm_memory: float = option(0.5, "Share of GPU memory vLLM takes", above=0, most=1)
    batch_size: int = option(64, "Samples at a time", least=1)
    seed: int = option(0, "Seed of the samples", least=0)
    allow_empty: bool = option(False, "Write an empty cache, or an empty explore set, instead of an error")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dtype = dtype_name(self.dtype)
        if (self.backend == "server") != (self.server_url is not None):
            raise ValueError(
                f"server_url belongs to backend: server, and only to it (backend={self.backend}, "
                f"server_url={self.server_url})"
            )
        if self.server_model is not None and self.backend != "server":
            raise ValueError(f"server_model belongs to backend: server (backend={self.backend})")
        if self.backend == "server" and self.adapter and not self.server_model:
            raise ValueError("with an adapter, say in server_model under which name the server serves it")
        if self.threshold == "one":
            self.threshold = f"1/{self.num_samples}"
        parse_threshold(self.threshold)
        resolve_mode(self.mode)
        if self.samples_per_prompt > self.num_samples:
            raise ValueError(
                f"samples_per_prompt={self.samples_per_prompt} is more than num_samples={self.num_samples}, of which "
                "the cached samples are taken: raise num_samples"
            )

    @property
    def draws_one_more(self) -> bool:
        """Whether the cached sample of a near-perfect prompt is a further one, as in the paper."""
        return self.keep == "near_perfect" and self.samples_per_prompt == 1

    @property
    def scoring_temperature(self) -> float:
        """The temperature of the reference log-probabilities."""
        return float(self.temperature if self.training_temperature is None else self.training_temperature)

    def drawing(self) -> dict[str, Any]:
        """The settings that the samples and their rewards depend on, JSON-ready."""
        names = [
            entry.name for entry in fields(PresampleConfig) if entry.name not in (*DECISIONS, *_MACHINE, *_CHECKS)
        ]
        settings = {name: asdict(self)[name] for name in names}
        if callable(self.reward):
            settings["reward"] = f"{self.reward.__module__}:{self.reward.__qualname__}"
        return settings

    def decisions(self) -> dict[str, Any]:
        """The settings that the partition and the cache depend on, given the samples; JSON-ready."""
        settled = {"threshold": str(parse_threshold(self.threshold)), "training_temperature": self.scoring_temperature}
        return {name: getattr(self, name) for name in DECISIONS} | settled
