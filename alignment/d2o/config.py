"""`D2OConfig`: the keys of D²O and what it refuses of TRL's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from trl import GRPOConfig

from fdiv.alignment.d2o.anchors import PLACEHOLDER
from fdiv.alignment.d2o.loss import check_d2o_weights, d2o_experimental_reason
from fdiv.alignment.f_dpo.loss import check_f_dpo_divergence
from fdiv.alignment.scorers import build_scorer
from fdiv.divergences import Divergence, get_divergence
from fdiv.memory.step_shape import StepShape, rollout_tokens, sampled_at_once
from fdiv.training.rollouts import GRPO_LOSS_KEYS, RolloutConfig

__all__ = ["ANCHOR_SOURCES", "D2OConfig"]

ANCHOR_SOURCES = ("offline", "online")

# Keys of GRPO's policy gradient, rewards and tools. D²O has none of these, so a value that is set would do nothing.
_GRPO_ONLY = (*GRPO_LOSS_KEYS, "log_completions", "num_generations_eval", "num_iterations", "router_aux_loss_coef")
_REASONS = {
    "log_completions": "the anchors stand in the anchor file",
    "num_generations_eval": "a group has num_generations anchors in evaluation too",
    "sync_ref_model": "set refresh_every",
}


@dataclass
class D2OConfig(RolloutConfig, GRPOConfig):
    r"""Configuration of `D2OTrainer`: TRL's `GRPOConfig` keys for sampling, and those below.

    A row is one rejected answer with its group of K anchors, which is never split: `per_device_train_batch_size`
    counts rejected answers, and K + 1 sequences are scored for each. K is `num_generations` (11, the paper's; 0
    leaves the anchors out). `temperature` and the other sampling keys are those of the anchors; log-ratios are always
    taken at temperature 1.

    Args:
        alpha: Weight of the rejected answer.
        beta: Weight of the anchors' mean.
        divergence: f of the f-scored log-ratios; `reverse_kl` is the paper's loss. Another one is experimental unless
            α = β and both references are the same, and a warning says why.
        max_exponent: Overflow cap on exp-type scores, in (0, 80]. None: the registry's own, 60.
        anchor_source: `offline`: drawn once for every prompt, from the start model. `online`: drawn anew from the
            policy in every step from `online_start_step` on; before it they are offline.
        online_start_step: First optimizer step with online anchors.
        refresh_every: After every so many optimizer steps the default reference becomes the policy as it is. None:
            never. A reference that is another model stays.
        anchor_instruction_templates: Texts with `{prompt}` in them, used in turn when anchors are sampled, and left
            out when they are scored.
        anchor_cache: File of the offline anchors. None: `anchors.jsonl` in `output_dir`.
        anchor_batch_size: Completions sampled at once before training.
        ref_pos: Path or hub id of π_r⁺, the denominator of the rejected answer. None: the frozen start model.
        ref_neg: The same of π_r⁻, the denominator of the anchors.
        harmfulness_scorer: How harmful an anchor is, for the log only: a scorer of `fdiv.alignment.scorers`, by name
            or as a mapping with its arguments (`{name: classifier, model: …, label: …}`). Higher is more harmful. Any
            function with TRL's reward signature can be given to the trainer instead.
        harmful_above: An anchor with a higher score counts as harmful.
        max_length: Longest sequence in tokens; a longer rejected answer is cut. None: no bound.

    Raises:
        ValueError: an unlawful divergence, α ≤ 0, β < 0, a value outside its range, or a GRPO key D²O has no use for.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "divergence", "harmfulness_scorer"]

    num_generations: int | None = field(default=11, metadata={"help": "K, the anchors in a group; 0 for none."})
    beta: float = field(default=0.1, metadata={"help": "Weight of the anchors' mean, at least 0."})
    disable_dropout: bool = field(
        default=True, metadata={"help": "Train without dropout, so that policy and reference differ by weights alone."}
    )
    alpha: float = field(default=0.1, metadata={"help": "Weight of the rejected answer, above 0."})
    # `| None` is what makes HfArgumentParser hand the command line's string over unparsed; None itself is refused.
    divergence: dict[str, Any] | str | None = field(
        default="reverse_kl",
        metadata={"help": "f of the f-scored log-ratios: a name, or a mapping with parameters (JSON)."},
    )
    max_exponent: float | None = field(
        default=None,
        metadata={"help": "Overflow cap on exp-type scores, in (0, 80]. Not set: the registry's own, 60."},
    )
    anchor_source: str = field(
        default="offline",
        metadata={
            "help": "offline: drawn once from the start model; online: anew in every step.",
            "choices": ANCHOR_SOURCES,
        },
    )
    online_start_step: int = field(default=0, metadata={"help": "First optimizer step with online anchors."})
    refresh_every: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps after which the reference becomes the policy. Not set: never."},
    )
    anchor_instruction_templates: list[str] | None = field(
        default=None,
        metadata={"help": "Texts with {prompt}, used for sampling anchors and left out for scoring them."},
    )
    anchor_cache: str | None = field(
        default=None, metadata={"help": "File of the offline anchors. Not set: anchors.jsonl in output_dir."}
    )
    anchor_batch_size: int = field(default=64, metadata={"help": "Completions sampled at once before training."})
    ref_pos: str | None = field(
        default=None, metadata={"help": "Reference of the rejected answer. Not set: the frozen start model."}
    )
    ref_neg: str | None = field(
        default=None, metadata={"help": "Reference of the anchors. Not set: the frozen start model."}
    )
    harmfulness_scorer: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Scorer of the anchors' harmfulness, for the log: a name or a mapping (JSON)."}
    )
    harmful_above: float = field(default=0.5, metadata={"help": "An anchor with a higher score counts as harmful."})
    max_length: int | None = field(
        default=1024, metadata={"help": "Longest sequence in tokens; a longer rejected answer is cut."}
    )

    def __post_init__(self) -> None:
        self._refuse_grpo_keys()
        if self.generation_batch_size is not None or self.steps_per_generation not in (None, 1):
            raise ValueError(
                "generation_batch_size and steps_per_generation: D2O samples for one micro-batch at a time, so that a "
                "step's anchors come from that step's policy. Leave them out"
            )
        if self.num_generations is None or self.num_generations < 0:
            raise ValueError(f"num_generations={self.num_generations}: K, the anchors in a group, is at least 0")
        # TRL checks that whole groups of two and more completions fit its batches. A row here is a whole group, so
        # these three numbers only serve to pass that check.
        anchors = self.num_generations
        self.num_generations, self.num_generations_eval, self.steps_per_generation = 2, 1, 2
        super().__post_init__()
        self.num_generations, self.num_generations_eval, self.steps_per_generation = anchors, None, 1
        self.generation_batch_size //= 2
        if self.data_seed is None:
            self.data_seed = self.seed  # TRL seeds each process differently, and the order of the rows must be one
        self._check_ranges()
        if self.divergence is None or isinstance(self.divergence, Divergence):
            raise ValueError(
                f"divergence={self.divergence!r}: give the name of a registered divergence, or a mapping with its "
                "parameters; register your own with `register_divergence` first"
            )
        self.resolve_divergence().score(torch.zeros(1), self.max_exponent)  # refuses a cap outside its range
        self.server_rollouts()  # refuses two back ends
        if self.harmfulness_scorer is not None:
            build_scorer(self.harmfulness_scorer)  # refuses unknown names and arguments
        self.warn_if_experimental(one_reference=self.ref_pos == self.ref_neg)

    def _refuse_grpo_keys(self) -> None:
        defaults = {entry.name: entry.default for entry in fields(GRPOConfig)}
        for name in _GRPO_ONLY:
            if getattr(self, name) != defaults[name]:
                reason = _REASONS.get(name, "it belongs to GRPO's policy gradient, and D2O has none")
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect in D2O: {reason}. Leave it out")
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
            if name in (self.generation_kwargs or {}):
                raise ValueError(f"generation_kwargs: set {name!r} as a key of its own, {name}: …")

    def _check_ranges(self) -> None:
        check_d2o_weights(self.alpha, self.beta)
        if self.anchor_source not in ANCHOR_SOURCES:
            raise ValueError(f"anchor_source={self.anchor_source!r}: use {' or '.join(ANCHOR_SOURCES)}")
        if self.online_start_step < 0 or (self.online_start_step and self.anchor_source == "offline"):
            raise ValueError(
                f"online_start_step={self.online_start_step} with anchor_source={self.anchor_source!r}: it is a step "
                "number, at least 0, and belongs to anchor_source=online"
            )
        for name in ("refresh_every", "max_length", "anchor_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if self.refresh_every is not None and self.ref_pos is not None and self.ref_neg is not None:
            raise ValueError(
                "refresh_every renews the default reference, but ref_pos and ref_neg replace it: unset it"
            )
        for template in self.anchor_instruction_templates or ():
            if PLACEHOLDER not in template:
                raise ValueError(f"anchor_instruction_templates: {template!r} has no {PLACEHOLDER} in it")

    def warn_if_experimental(self, *, one_reference: bool) -> None:
        """A UserWarning with the reason where the f-generalisation is a heuristic."""
        reason = d2o_experimental_reason(self.divergence, self.alpha, self.beta, one_reference=one_reference)
        if reason:
            warnings.warn(reason, UserWarning, stacklevel=3)

    def resolve_divergence(self) -> Divergence:
        """The `Divergence` the loss uses.

        Raises:
            ValueError: D²O is not lawful with it (f′(0⁺) is finite).
        """
        return check_f_dpo_divergence(get_divergence(self.divergence), objective="D2O")

    def sampling_settings(self) -> Mapping[str, Any]:
        """What the offline anchors depend on besides the model and the prompts."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_completion_length")
        return {name: getattr(self, name) for name in (*names, "anchor_instruction_templates", "generation_kwargs")}

    def step_shape(self, *, peft: bool, prompt_tokens: int | None = None, **_: Any) -> StepShape:
        """K anchors and the rejected answer of every row; the start model, and what replaces it on either side."""
        sampled, note = rollout_tokens(self, prompt_tokens)
        tokens = sampled if self.max_length is None else max(sampled, self.max_length)
        note = note if self.max_length is None else f"the longer of max_length={self.max_length} and {note}"
        given = (self.ref_pos is not None) + (self.ref_neg is not None)
        drawn = self.per_device_train_batch_size * self.num_generations
        if self.anchor_source == "offline" or self.online_start_step > 0:
            drawn = max(drawn if self.anchor_source == "online" else 0, self.anchor_batch_size)
        rows = self.per_device_train_batch_size * (self.num_generations + 1)
        references = given + int(given < 2 and not peft)
        return StepShape(
            rows, tokens, note, references, sampled_rows=sampled_at_once(self, drawn), sampled_tokens=sampled
        )
