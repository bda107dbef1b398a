"""What an evaluation is told besides the model: `EvalContext`, built by the command line and by `fdiv eval …`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

__all__ = ["EvalContext"]


@dataclass
class EvalContext:
    """Surroundings of one call of an evaluation's `evaluate(model, tokenizer, datasets, context)`.

    `datasets` maps split names (`train`, `test`, …) to *untokenised* rows. An evaluation returns a flat
    `dict[str, float | None]` (None: not defined here, e.g. no reference) and may write files into `output_dir`.

    Args:
        training_args: The config of the run (`FDPOConfig` holds the divergence, β and `max_exponent`).
        output_dir: Where the evaluation may write files of its own. It exists when `evaluate` is called.
        reference_model: The frozen reference π_ref. None: a PEFT policy is its own reference with the adapter off, and
            at stage `"before"` the policy *is* the reference; otherwise the reference-based numbers are None.
        seed: Seed of everything random in the evaluation. Same seed, same samples, whatever the batch size.
        stage: `"before"` or `"after"` training, `"standalone"` for `fdiv eval …`.
        extra: Objects a family of evaluations needs besides (a rollout back end, a reward function).
    """

    training_args: TrainingArguments | Any
    output_dir: Path
    reference_model: PreTrainedModel | None = None
    seed: int = 0
    stage: Literal["before", "after", "standalone"] = "standalone"
    extra: dict[str, Any] | None = None
