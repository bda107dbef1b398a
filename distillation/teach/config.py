"""Settings of `fdiv teach` and of `prepare: {name: taught}`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fdiv.divergences import get_divergence
from fdiv.inference.encoding import Encoding
from fdiv.models.dtypes import dtype_name
from fdiv.training.config import ChatTemplateOptions, RowOptions, option

__all__ = ["TeachConfig"]

_SHOWN = (
    "reverse_kl", "forward_kl", "jensen_shannon", "squared_hellinger", "total_variation", "pearson_chi2",
    "neyman_chi2",
)  # fmt: skip


@dataclass
class TeachConfig(ChatTemplateOptions, RowOptions):
    """Which teacher says what of which rows.

    Raises:
        ValueError: a value outside its range.
    """

    model: str = option("", "Teacher: directory or hub name; with `server_url` the name under which it is served")
    dataset: str = option(
        "",
        "Rows with `prompt` and `completion` (text or messages), and `teacher_prompt` where the teacher reads that: a "
        "file (json, jsonl, parquet, csv), a directory, or a hub name",
    )
    student: str | None = option(
        None,
        "Student: its tokenizer, chat template and end tokens encode the rows, as in training, and the share of the "
        "divergence that the top k holds is measured against it; not set: the teacher's own, and no share",
    )
    splits: list[str] = option(["train"], "Splits of the dataset; those that the training evaluates on, too")
    k: int = option(64, "Most likely tokens kept of each distribution", least=1)
    temperature: float = option(1.0, "What the teacher's logits are divided by: that of the training", above=0)
    max_completion_length: int = option(512, "Completions are cut to it, as in training, in tokens", least=1)
    adapter: str | None = option(None, "PEFT adapter on the teacher")
    dtype: str = option("auto", "auto (float32 on a CPU, the checkpoint's own elsewhere), float32, bfloat16, float16")
    batch_size: int = option(8, "Rows at a time", least=1)
    part_tokens: int = option(65_536, "Tokens of a file; a run that was killed goes on at the next file", least=1)
    server_url: str | None = option(None, "http(s)://host:port of a vLLM server that holds the teacher")
    tokenizer: str | None = option(None, "With `server_url`: path or hub name of the teacher's tokenizer")
    share_rows: int = option(64, "Rows that the share is measured on, spread evenly; 0: not measured", least=0)
    divergences: list[Any] = option(
        list(_SHOWN), "Divergences whose share is measured: names, or '{name: alpha, alpha: 0.3}'"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dtype = dtype_name(self.dtype)
        for name in ("splits", "divergences"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: name at least one")
        if len(set(self.splits)) < len(self.splits):
            raise ValueError(f"splits={self.splits}: one is named twice")
        for spec in self.divergences:
            get_divergence(spec)
        if self.server_url is None and self.tokenizer is not None:
            raise ValueError("tokenizer belongs to server_url: a model in memory has its own beside it")
        if self.server_url is not None:
            self._check_server()

    def _check_server(self) -> None:
        if not self.server_url.startswith(("http://", "https://")):  # type: ignore[union-attr]
            raise ValueError(f"server_url={self.server_url!r}: it must start with http:// or https://")
        if self.adapter is not None:
            raise ValueError(
                f"adapter={self.adapter!r} is loaded here, and server_url holds the teacher: leave it out"
            )
        if self.temperature != 1.0:
            raise ValueError(
                f"temperature={self.temperature:g}: a vLLM server gives the log-probabilities of a prompt at "
                "temperature 1, and the top k at another cannot be made of them"
            )

    def encoding(self) -> Encoding:
        """As `FDistillTrainer` encodes: a completion follows the prompt that the student would answer."""
        return Encoding(self.system_prompt, self.date_string, self.chat_template_kwargs, context="generation")
