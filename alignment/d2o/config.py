"""`D2OConfig`: the keys of D²O and what it refuses of TRL's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trl import GRPOConfig

from fdiv.alignment.d2o.loss import d2o_experimental_reason
from fdiv.alignment.f_dpo.loss import check_f_dpo_divergence
from fdiv.alignment.scorers import build_scorer
from fdiv.divergences import Divergence
from fdiv.filling import check_template
from fdiv.inference.encoding import ENCODING_HELP, END_TOKENS, Encoding
from fdiv.memory.step_shape import StepShape, rollout_tokens, sampled_at_once
from fdiv.training.config import CappedDivergenceOptions, check_options, divergence_option, option, refuse
from fdiv.training.rollouts import GRPO_LOSS_KEYS, RolloutConfig

__all__ = ["ANCHOR_SOURCES", "D2OConfig"]

ANCHOR_SOURCES = ("offline", "online")

# Keys of GRPO's policy gradient, rewards and tools: D²O has none of these, so a value that is set would do nothing.
_REFUSED = dict.fromkeys(
    (*GRPO_LOSS_KEYS, "num_iterations", "router_aux_loss_coef"),
    "it belongs to GRPO's policy gradient, and D2O has none",
) | {
    "log_completions": "the anchors stand in the anchor file",
    "num_generations_eval": "a group has num_generations anchors in evaluation too",
    "sync_ref_model": "set refresh_every",
}


@dataclass
class D2OConfig(CappedDivergenceOptions, RolloutConfig, GRPOConfig):
    """Configuration of `D2OTrainer`: TRL's `GRPOConfig` keys for sampling, `divergence`, `normalized`, `max_exponent`,
    and those below.

    A row is one rejected answer with its group of K anchors, which is never split: `per_device_train_batch_size`
    counts rejected answers, and K + 1 sequences are scored for each. `temperature` and the other sampling keys are
    those of the anchors; log-ratios are always taken at temperature 1. `reverse_kl` is the paper's loss; another
    divergence is experimental unless α = β and both references are the same, and a warning says why.

    Raises:
        ValueError: a divergence that D²O cannot use, a value outside its range, or a GRPO key D²O has no use for.
    """

    num_generations: int = option(11, "K, the anchors in a group (11 in the paper), 0 for none", least=0)
    divergence: dict[str, Any] | str | None = divergence_option(
        "reverse_kl", "The f of the f-scored log-ratios, with f'(0+) = −∞"
    )
    alpha: float = option(0.1, "α, the weight of the rejected answer", above=0)
    beta: float = option(0.1, "β, the weight of the anchors' mean", least=0)
    disable_dropout: bool = option(
        True, "Train without dropout, so that policy and reference differ by their weights alone"
    )
    anchor_source: str = option(
        "offline",
        "`offline`: sampled once for every prompt, from the start model; `online`: sampled again from the policy in "
        "every step from `online_start_step` on, and offline before it",
        choices=ANCHOR_SOURCES,
    )
    online_start_step: int = option(0, "First optimizer step with online anchors", least=0)
    refresh_every: int | None = option(
        None,
        "Every N optimizer steps the default reference becomes the current policy; a reference that is "
        "another model stays. Not set: never",
        least=1,
    )
    anchor_instruction_templates: list[str] | None = option(
        None, "Texts with {prompt} in them, used in turn when anchors are sampled, and left out when they are scored"
    )
    anchor_cache: str | None = option(None, "File of the offline anchors; not set: `anchors.jsonl` in `output_dir`")
    anchor_batch_size: int = option(64, "Completions sampled at once before training", least=1)
    ref_pos: str | None = option(
        None, "Path or hub id of π_r⁺, the denominator of the rejected answer; not set: the frozen start model"
    )
    ref_neg: str | None = option(
        None, "Path or hub id of π_r⁻, the denominator of the anchors; not set: the frozen start model"
    )
    harmfulness_scorer: dict[str, Any] | str | None = option(
        None,
        "How harmful an anchor is (higher is more), for the log only: a scorer of `fdiv.alignment.scorers`, a name or "
        "a mapping with its arguments ({name: classifier, model: …, label: …})",
    )
    harmful_above: float = option(0.5, "An anchor with a higher score counts as harmful")
    max_length: int | None = option(
        1024, "Longest sequence in tokens; a longer rejected answer is cut. null: no bound", least=1
    )

    end_token: str = option("turn", ENCODING_HELP["end_token"], choices=END_TOKENS)

    def encoding(self) -> Encoding:
        """How rows are encoded: rejected answers follow the prompt that anchors are sampled from."""
        return Encoding(
            self.system_prompt, self.date_string, self.chat_template_kwargs, self.end_token, context="generation"
        )

    def __post_init__(self) -> None:
        check_options(self)
        refuse(self, _REFUSED)
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
            if name in (self.generation_kwargs or {}):
                raise ValueError(f"generation_kwargs: set {name!r} as a key of its own, {name}: …")
        if self.generation_batch_size is not None or self.steps_per_generation not in (None, 1):
            raise ValueError(
                "generation_batch_size and steps_per_generation: D2O samples for one micro-batch at a time, so that a "
                "step's anchors come from that step's policy. Leave them out"
            )
        # TRL checks that whole groups of two and more completions fit its batches. A row here is a whole group, so
        # these three numbers only serve to pass that check.
        anchors = self.num_generations
        self.num_generations, self.num_generations_eval, self.steps_per_generation = 2, 1, 2
        super().__post_init__()
        self.num_generations, self.num_generations_eval, self.steps_per_generation = anchors, None, 1
        self.generation_batch_size //= 2
        if self.data_seed is None:
            self.data_seed = self.seed  # TRL seeds each process differently, and the order of the rows must be one
        self._check_anchors()
        self.server_rollouts()  # refuses two back ends
        if self.harmfulness_scorer is not None:
            build_scorer(self.harmfulness_scorer)  # refuses unknown names and arguments
        self.warn_if_experimental(one_reference=self.ref_pos == self.ref_neg)

    def _check_anchors(self) -> None:
        if self.online_start_step and self.anchor_source == "offline":
            raise ValueError(
                f"online_start_step={self.online_start_step} with anchor_source={self.anchor_source!r}: it belongs to "
                "anchor_source=online"
            )
        if self.refresh_every is not None and self.ref_pos is not None and self.ref_neg is not None:
            raise ValueError(
                "refresh_every renews the default reference, but ref_pos and ref_neg replace it: unset it"
            )
        for template in self.anchor_instruction_templates or ():
            check_template(template, ("prompt",), needs=("prompt",), what="anchor_instruction_templates")

    def warn_if_experimental(self, *, one_reference: bool) -> None:
        """A UserWarning with the reason where the f-generalisation is a heuristic."""
        reason = d2o_experimental_reason(self.divergence, self.alpha, self.beta, one_reference=one_reference)
        if reason:
            warnings.warn(reason, UserWarning, stacklevel=3)

    def check_divergence(self, divergence: Divergence) -> Divergence:
        """`divergence`, where D²O can use it; ValueError with the reason elsewhere (f′(0⁺) is finite)."""
        return check_f_dpo_divergence(divergence, objective="D2O")

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
