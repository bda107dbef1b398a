"""The keys that every unlearning method shares, and their checks; a method's own config adds a few lines to these."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from trl import SFTConfig

from fdiv.filling import check_template
from fdiv.training.config import EncodingOptions, RowOptions, divergence_option, named_divergence, option, refuse
from fdiv.training.evaluation import EvaluationOptions
from fdiv.unlearning.data.templates import TEMPLATE_SOURCES, GenerationSettings

__all__ = ["TemplateConfig", "UnlearningConfig", "retain_option"]

# Keys of supervised fine-tuning that have no counterpart here, and why.
_REFUSED = {
    "packing": "a row's score is that of one answer, and packed rows have no borders",
    "eval_packing": "a row's score is that of one answer, and packed rows have no borders",
    "padding_free": "forget, template and retain rows share one padded batch",
    "loss_type": "the method fixes the loss; `retain_term` chooses the retain half",
    "label_smoothing_factor": "it belongs to the cross-entropy of supervised fine-tuning",
    "assistant_only_loss": "the answer is what is scored; give rows with one answer each",
    "completion_only_loss": "the answer is what is scored, always",
    "truncation_mode": "cutting the prompt would change what the answer is conditioned on",
    "train_sampling_strategy": "the order of the rows is a function of (seed, epoch) here",
    "dataloader_drop_last": "an epoch is completed to whole global batches here, so nothing is dropped",
}


def retain_option(default: str, *others: str, why: str = "") -> Any:
    """The option `retain_term` of a method that has these retain terms; `why` not the others."""
    return option(default, "Retain half of the loss (see `UnlearningConfig`)", choices=(default, *others), why=why)


@dataclass
class UnlearningConfig(EvaluationOptions, EncodingOptions, RowOptions, SFTConfig):
    r"""What all unlearning methods share: loss = γ·forget term + α·retain term, the mean over examples.

    The forget rows are the training dataset; their formats are in `fdiv.unlearning.data.rows`. One retain row meets
    each forget row, chosen by (seed, epoch, index). The retain term is one of

    * `none`; * `nll`, the retain answers' mean token NLL;
    * `divergence`, the token-level divergence of the policy P from the reference Q on the retain answers;
    * `activations` (RMU), the squared distance of one layer's activations from the reference's.

    With `epoch_evaluation` the best epoch is chosen by `metric_for_best_model: selection` (see
    `fdiv.unlearning.selection`); the trainer's own evaluation is left out then unless there is an evaluation dataset.

    Raises:
        ValueError: a value outside its range, a retain term the method has not, a divergence that is not registered,
            an SFT key that cannot be honoured.
    """

    retain_term: str = retain_option("nll", "none", "divergence")
    retain_divergence: dict[str, Any] | str | None = divergence_option(
        "forward_kl", "f of `retain_term: divergence`, policy against reference (`forward_kl` is KL(reference‖policy))"
    )
    retain_level: str = option(
        "vocabulary",
        "`vocabulary`, the exact sum over the vocabulary at every position, or `tokens`, f(P/Q) at the retain "
        "answers' own tokens (see `fdiv.unlearning.losses.sampled_divergence` for what that estimates)",
        choices=("vocabulary", "tokens"),
    )
    forget_weight: float = option(1.0, "γ, the weight of the forget term", least=0)
    retain_weight: float = option(1.0, "α, the weight of the retain term", least=0)
    retain_dataset_name: str | None = option(None, "Hub id or path of the retain rows")
    retain_dataset_config: str | None = option(None, "Configuration of the retain dataset")
    retain_dataset_split: str = option("train", "Split of the retain dataset")
    prompt_format: str | None = option(
        None,
        "For question–answer rows (TOFU), a format string with {question}, the answer following after a space; not "
        "set: the tokenizer's chat template",
    )
    text_prompt_tokens: int = option(
        0, "For raw text rows (MUSE), how many tokens of a chunk are prompt and not scored", least=0
    )
    precompute_reference: bool = option(
        False,
        "Score the reference once before training and drop it, instead of keeping it in memory; for methods that need "
        "its token log-probabilities only",
    )
    disable_dropout: bool = option(
        True, "Train without dropout, so that policy and reference differ by their weights alone"
    )
    utility_floor: float = option(
        0.9, "Share of the model utility at the start that the chosen epoch must keep", above=0, most=1
    )
    selection_by: str | None = option(
        None,
        "What `metric_for_best_model: selection` chooses by among the epochs that keep the utility, in an evaluation "
        "on TOFU's rows; not set: `forget_quality`; `retrained_distance` where its p-values are all next to 0",
        choices=("forget_quality", "retrained_distance"),
    )

    def __post_init__(self) -> None:
        refuse(self, _REFUSED)
        super().__post_init__()
        if self.router_aux_loss_coef not in (None, 0):
            raise ValueError("router_aux_loss_coef: unlearning losses have no load-balancing term. Leave it out")
        self.router_aux_loss_coef = 0.0
        if self.prompt_format is not None:
            check_template(self.prompt_format, ("question",), needs=("question",), what="prompt_format")
        if self.prompt_format is not None and self.system_prompt is not None:
            raise ValueError(
                f"system_prompt={self.system_prompt!r} belongs to a chat template, and prompt_format makes plain "
                "text: drop one of the two"
            )
        if self.max_length is None:
            raise ValueError("max_length is not set: it bounds every row and cuts raw text into chunks")
        named_divergence(self.retain_divergence, "retain_divergence")

    def evaluation_keys(self) -> dict[str, Any]:
        """The template's keys, or the formats of plain text that `prompt_format` makes."""
        if self.prompt_format is None:
            return super().evaluation_keys()
        formats = {"chat_template": "never", "question_format": self.prompt_format, "answer_format": " {answer}"}
        return super().evaluation_keys() | formats

    def method_settings(self) -> dict[str, Any]:
        """The fields that define the objective: those of this config that supervised fine-tuning has not."""
        inherited = {entry.name for entry in fields(SFTConfig)}
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in inherited}


@dataclass
class TemplateConfig(UnlearningConfig):
    r"""Adds where the answer in place of the forgotten one comes from (FLAT, IdkDPO, AltPO)."""

    template_source: str = option(
        "refusals",
        "Where template answers come from: `refusals`, a list from which one is sampled by (seed, epoch, index); "
        "`fixed`, one string; `column`, a string or list of strings in each row; `generated`, another model's answers",
        choices=TEMPLATE_SOURCES,
    )
    template_text: str | None = option(None, "The string of source `fixed`")
    template_file: str | None = option(
        None,
        "File for source `refusals`, one per line (TOFU's `idontknow.jsonl`); not set: a short list of our own",
    )
    template_column: str | None = option(None, "The column of source `column`")
    template_model: str | None = option(
        None, "The model of source `generated`; not set: the model to be trained, before training"
    )
    template_instruction: str | None = option(
        None, "Request to that model, with {question} and {answer} filled in; not set: the bare prompt"
    )
    template_answers_per_row: int = option(1, "Generated answers per row", least=1)
    template_max_new_tokens: int = option(64, "Longest generated answer in tokens", least=1)
    template_temperature: float = option(1.0, "Sampling temperature of generated answers, 0 is greedy", least=0)
    template_cache: str | None = option(
        None, "File that keeps the generated answers; not set: `templates.json` in `output_dir`"
    )

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
        for name, source in self._OWNER.items():
            value = getattr(self, name)
            if value is not None and source != self.template_source:
                raise ValueError(
                    f"{name}={value!r} belongs to template_source={source!r}, but template_source is "
                    f"{self.template_source!r}: change one of the two"
                )
            if name in ("template_text", "template_column") and source == self.template_source and not value:
                raise ValueError(f"template_source={source!r} needs {name}")
        if self.template_instruction is not None:
            check_template(self.template_instruction, ("question", "answer"), what="template_instruction")
        self.generation_settings("")  # refuses several greedy answers

    def generation_settings(self, model: str) -> GenerationSettings:
        """How `template_source: generated` draws answers from `model`."""
        return GenerationSettings(
            model=self.template_model or model,
            instruction=self.template_instruction,
            answers_per_row=self.template_answers_per_row,
            max_new_tokens=self.template_max_new_tokens,
            temperature=self.template_temperature,
            seed=self.seed,
            encoding=self.encoding(),
        )


def check_positive(config: Any, *names: str) -> None:
    """Deprecated, goes with release 0.3: declare the field with `fdiv.training.config.option(…, above=0)`."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name}={getattr(config, name)}: must be above 0")
