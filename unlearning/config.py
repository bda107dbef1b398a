"""The keys that every unlearning method shares, and their checks; a method's own config adds a few lines to these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from trl import SFTConfig

from fdiv.divergences import Divergence, get_divergence
from fdiv.unlearning.data.templates import TEMPLATE_SOURCES, GenerationSettings
from fdiv.unlearning.selection import build_evaluation

__all__ = ["TemplateConfig", "UnlearningConfig", "check_positive", "named_divergence"]

# SFT options that have no counterpart here: name → (value that leaves it alone, reason).
_REFUSED_OPTIONS: dict[str, tuple[Any, str]] = {
    "packing": (False, "a row's score is that of one answer, and packed rows have no borders"),
    "eval_packing": (None, "a row's score is that of one answer, and packed rows have no borders"),
    "padding_free": (False, "forget, template and retain rows share one padded batch"),
    "loss_type": ("nll", "the method fixes the loss; `retain_term` chooses the retain half"),
    "label_smoothing_factor": (0.0, "it belongs to the cross-entropy of supervised fine-tuning"),
    "assistant_only_loss": (False, "the answer is what is scored; give rows with one answer each"),
    "completion_only_loss": (None, "the answer is what is scored, always"),
    "truncation_mode": ("keep_start", "cutting the prompt would change what the answer is conditioned on"),
    "train_sampling_strategy": ("random", "the order of the rows is a function of (seed, epoch) here"),
    "group_by_length": (False, "the order of the rows is a function of (seed, epoch) here"),
    "dataloader_drop_last": (False, "an epoch is completed to whole global batches here, so nothing is dropped"),
}


def named_divergence(spec: Any, key: str) -> Divergence:
    """The divergence that a config names.

    Raises:
        ValueError: `spec` is None or an object (a config holds names, so that it can be written beside the result), or
            `get_divergence` refuses it.
    """
    if not isinstance(spec, (str, Mapping)):
        raise ValueError(
            f"{key}={spec!r}: give the name of a registered divergence, or a mapping with its parameters; register "
            "your own with `register_divergence` first"
        )
    return get_divergence(spec)


def check_positive(config: Any, *names: str) -> None:
    """Raise ValueError for a field of `config` that is not above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name}={getattr(config, name)}: must be above 0")


@dataclass
class UnlearningConfig(SFTConfig):
    r"""What all unlearning methods share: loss = γ·forget term + α·retain term, the mean over examples.

    The forget rows are the training dataset; their formats are in `fdiv.unlearning.data`.

    Args:
        retain_term: `none`; `nll`, the retain answers' mean token NLL; `divergence`, the token-level divergence
            of the policy from the reference on the retain answers (P the policy, Q the reference).
        retain_divergence: which one, for `retain_term: divergence`; `forward_kl` is KL(reference ‖ policy).
        retain_level: `vocabulary`, the exact sum over the vocabulary at every position; `tokens`, f(P/Q) at the
            retain answers' own tokens (see `fdiv.unlearning.losses.sampled_divergence` for what that estimates).
        forget_weight: γ. retain_weight: α.
        retain_dataset_name, retain_dataset_config, retain_dataset_split: hub id or path of the retain rows, its
            configuration and its split. One retain row is drawn for each forget row by (seed, epoch, index).
        prompt_format: for question–answer rows (TOFU), a format string with `{question}`, the answer following after
            a space; None uses the tokenizer's chat template.
        text_prompt_tokens: for raw text rows (MUSE), how many tokens of a chunk are prompt and not scored.
        precompute_reference: score the reference once before training and drop it, instead of keeping it in memory;
            for methods that need its token log-probabilities only.
        disable_dropout: train without dropout, so that policy and reference differ by their weights alone.
        epoch_evaluation: an evaluation, as in a recipe's `eval:` block, run whenever `eval_strategy` says; the best
            epoch is chosen by `metric_for_best_model: selection` (see `fdiv.unlearning.selection`). The trainer's own
            evaluation is left out then unless there is an evaluation dataset.
        utility_floor: for that choice, the share of the model utility at the start that must be kept.

    Raises:
        ValueError: a retain term the method has not, a weight below 0, an unlawful divergence, an SFT option that
            cannot be honoured.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "retain_divergence", "epoch_evaluation"]

    #: The retain terms that are lawful for the method, and why not the others.
    retain_terms: ClassVar[tuple[str, ...]] = ("none", "nll", "divergence")
    retain_reason: ClassVar[str] = ""

    retain_term: str = field(
        default="nll",
        metadata={"help": "Retain half of the loss.", "choices": ("none", "nll", "divergence", "activations")},
    )
    # `| None` is what makes HfArgumentParser hand the command line's string over unparsed; None itself is refused.
    retain_divergence: dict[str, Any] | str | None = field(
        default="forward_kl", metadata={"help": "f of the retain term `divergence`, policy against reference."}
    )
    retain_level: str = field(
        default="vocabulary",
        metadata={
            "help": "Exact sum over the vocabulary, or the rows' own tokens.",
            "choices": ("vocabulary", "tokens"),
        },
    )
    forget_weight: float = field(default=1.0, metadata={"help": "Weight of the forget term (gamma)."})
    retain_weight: float = field(default=1.0, metadata={"help": "Weight of the retain term (alpha)."})
    retain_dataset_name: str | None = field(default=None, metadata={"help": "Hub id or path of the retain rows."})
    retain_dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the retain dataset."})
    retain_dataset_split: str = field(default="train", metadata={"help": "Split of the retain dataset."})
    prompt_format: str | None = field(
        default=None,
        metadata={"help": "Prompt of question-answer rows, with {question}; not set: the chat template."},
    )
    text_prompt_tokens: int = field(default=0, metadata={"help": "Unscored tokens at the start of a raw text chunk."})
    precompute_reference: bool = field(
        default=False, metadata={"help": "Score the reference once before training instead of keeping it in memory."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout."})
    epoch_evaluation: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Evaluation to run at every eval_strategy: {name: tofu, max_items: 40, ...}."}
    )
    utility_floor: float = field(
        default=0.9, metadata={"help": "Share of the starting model utility the selected epoch must keep."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (neutral, reason) in _REFUSED_OPTIONS.items():
            if getattr(self, name, neutral) != neutral:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} cannot be honoured here: {reason}. Leave it at {neutral!r}"
                )
        if self.router_aux_loss_coef not in (None, 0):
            raise ValueError("router_aux_loss_coef: unlearning losses have no load-balancing term. Leave it out")
        self.router_aux_loss_coef = 0.0
        if self.retain_term not in self.retain_terms:
            raise ValueError(
                f"retain_term={self.retain_term!r} is not lawful for {type(self).__name__}: use "
                f"{' or '.join(self.retain_terms)}. {self.retain_reason}".rstrip()
            )
        if self.retain_level not in ("vocabulary", "tokens"):
            raise ValueError(f"retain_level={self.retain_level!r}: use 'vocabulary' or 'tokens'")
        for name in ("forget_weight", "retain_weight", "text_prompt_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0")
        if self.prompt_format is not None and "{question}" not in self.prompt_format:
            raise ValueError(f"prompt_format={self.prompt_format!r} has no {{question}} in it")
        if self.max_length is None:
            raise ValueError("max_length is not set: it bounds every row and cuts raw text into chunks")
        named_divergence(self.retain_divergence, "retain_divergence")
        if not 0 < self.utility_floor <= 1:
            raise ValueError(f"utility_floor={self.utility_floor}: must be above 0 and at most 1")
        if self.epoch_evaluation is not None:
            if not isinstance(self.epoch_evaluation, Mapping):
                raise ValueError(f"epoch_evaluation={self.epoch_evaluation!r}: give a mapping with a name")
            if self.eval_strategy == "no":
                raise ValueError("epoch_evaluation is set but eval_strategy is no: set eval_strategy to epoch")
            build_evaluation(self.epoch_evaluation)

    def method_settings(self) -> dict[str, Any]:
        """The fields that define the objective: those of this config that supervised fine-tuning has not."""
        inherited = {entry.name for entry in fields(SFTConfig)}
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in inherited}


@dataclass
class TemplateConfig(UnlearningConfig):
    r"""Adds where the answer in place of the forgotten one comes from (FLAT, IdkDPO, AltPO).

    Args:
        template_source: `refusals`, a list from which one is drawn by (seed, epoch, index); `fixed`, one string;
            `column`, a string or list of strings in each row; `generated`, another model's answers.
        template_text: the string of `fixed`.
        template_file: a file for `refusals`, one per line (TOFU's `idontknow.jsonl`); None: a short list of our own.
        template_column: the column of `column`.
        template_model: the model of `generated`; None: the model to be trained, before training.
        template_instruction: put to that model, with `{question}` and `{answer}` filled in; None: the bare prompt.
        template_answers_per_row, template_max_new_tokens, template_temperature: how many answers it gives per row, how
            long, and how random (0 is greedy).
        template_cache: file that keeps the generated answers; None: `templates.json` in `output_dir`.
    """

    template_source: str = field(
        default="refusals", metadata={"help": "Where template answers come from.", "choices": TEMPLATE_SOURCES}
    )
    template_text: str | None = field(default=None, metadata={"help": "The answer of source `fixed`."})
    template_file: str | None = field(default=None, metadata={"help": "Refusals, one per line, of source `refusals`."})
    template_column: str | None = field(default=None, metadata={"help": "Column of source `column`."})
    template_model: str | None = field(
        default=None, metadata={"help": "Model of source `generated`; not set: the model to be trained."}
    )
    template_instruction: str | None = field(
        default=None, metadata={"help": "Request to that model, with {question} and {answer}."}
    )
    template_answers_per_row: int = field(default=1, metadata={"help": "Generated answers per row."})
    template_max_new_tokens: int = field(default=64, metadata={"help": "Longest generated answer in tokens."})
    template_temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; 0 is greedy."})
    template_cache: str | None = field(default=None, metadata={"help": "File that keeps the generated answers."})

    _OWNER: ClassVar[dict[str, str]] = {
        "template_text": "fixed",
        "template_file": "refusals",
        "template_column": "column",
        "template_model": "generated",
        "template_instruction": "generated",
        "template_cache": "generated",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template_source not in TEMPLATE_SOURCES:
            raise ValueError(f"template_source={self.template_source!r}: use one of {', '.join(TEMPLATE_SOURCES)}")
        for name, source in self._OWNER.items():
            value = getattr(self, name)
            if value is not None and source != self.template_source:
                raise ValueError(
                    f"{name}={value!r} belongs to template_source={source!r}, but template_source is "
                    f"{self.template_source!r}: change one of the two"
                )
            if name in ("template_text", "template_column") and source == self.template_source and not value:
                raise ValueError(f"template_source={source!r} needs {name}")
        self.generation_settings("")  # refuses numbers outside their range

    def generation_settings(self, model: str) -> GenerationSettings:
        """How `template_source: generated` draws answers from `model`."""
        return GenerationSettings(
            model=self.template_model or model,
            instruction=self.template_instruction,
            answers_per_row=self.template_answers_per_row,
            max_new_tokens=self.template_max_new_tokens,
            temperature=self.template_temperature,
            seed=self.seed,
        )
