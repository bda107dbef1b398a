"""The base of every unlearning trainer: scores of forget, template and retain rows, the reference, the log.

A method is a subclass that says which rows and scores it needs and returns its forget term, one value per example.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import SFTTrainer

from fdiv.divergences import Divergence, get_divergence
from fdiv.files import plain
from fdiv.memory.step_shape import StepShape
from fdiv.models.fingerprints import data_fingerprint
from fdiv.models.loading import check_all_fit, checked_tokenizer
from fdiv.models.reference import Reference
from fdiv.rows.sources import Source, source_of
from fdiv.statistics.estimates import density_weight_quantiles, log_ratio_quantiles, mean_and_error
from fdiv.training.config import DivergenceOptions
from fdiv.training.evaluation import PeriodicEvaluationMixin
from fdiv.training.places import RowsAt
from fdiv.training.trainer import ObjectiveTrainerMixin, own_options
from fdiv.unlearning.config import TemplateConfig, UnlearningConfig
from fdiv.unlearning.data import ForgetDataset, UnlearningCollator
from fdiv.unlearning.data.assembly import build_forget_dataset, read_retain_rows
from fdiv.unlearning.data.pairing import EpochSampler
from fdiv.unlearning.data.rows import load_rows
from fdiv.unlearning.losses import nll, sampled_divergence
from fdiv.unlearning.roles import (
    PrecomputedReference,
    RoleScores,
    score_reference,
    score_rows,
    split_roles,
    trimmed_rows,
)
from fdiv.unlearning.selection import evaluate_epoch
from fdiv.unlearning.vocabulary_losses import vocabulary_divergence

__all__ = ["UnlearningTrainer"]


class _EpochCallback(TrainerCallback):
    """Tells the sampler the epoch; a resumed run reaches it through no other way on every backend."""

    def __init__(self, trainer: UnlearningTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.sampler.set_epoch(int(state.epoch))


class UnlearningTrainer(PeriodicEvaluationMixin, ObjectiveTrainerMixin, SFTTrainer):
    r"""γ·forget term + α·retain term on TRL's `SFTTrainer`; subclasses give the forget term.

    Args:
        model: path, hub id, model or `PeftModel`. args: the method's config.
        train_dataset: the forget rows (`fdiv.unlearning.data` lists their formats).
        eval_dataset: forget rows to evaluate on, or a dict of such; partners are those of epoch 0.
        retain_dataset: the retain rows; None loads those that `args` names, if any. They are trained on unless
            `retain_term` is `none`, and always evaluated on.
        ref_model: the frozen reference, where the method needs one; None makes it: for a PEFT policy the base with
            the adapter off (a frozen copy of the adapter when training continues one), else a frozen copy.

    Logged, as means over every example since the last log on all processes: `forget_term`, `retain_term`,
    `prob/{template,forget,retain}` (length-normalised probability, TOFU's), and where there is a reference
    `log_ratio/{role}_p05|p50|p95` of whole answers and, with `_se` over examples, per token on the retain rows (on the
    forget rows when there are no others): `divergence/<name>`, exact over the vocabulary, where the method has logits,
    else `mean_f/<name>`, the mean of f(P/Q) at the rows' own tokens, which are no samples of the reference.

    Raises:
        ValueError: rows without the needed columns, a forget row inside the retain set, missing retain rows, a
            tokenizer without pad token.
        NonFiniteLossError: a NaN or infinite loss in training, before the optimizer step.
    """

    loss_is_scaled_for_ga = False  # a mean over the micro-batch: Trainer divides by the accumulation steps
    config_class: ClassVar[type[UnlearningConfig]] = UnlearningConfig
    #: Whether the forget term compares with a template answer, looks at logits, or needs reference scores.
    forget_needs_logits: ClassVar[bool] = False
    forget_needs_reference: ClassVar[bool] = False
    #: The roles of the rows of a batch, in the collator's order; a template answer only where the config has one.
    roles: ClassVar[tuple[str, ...]] = ("template", "forget", "retain")
    tags = ("trl", "fdiv", "unlearning")
    leaves_places_empty = True

    def __init__(
        self,
        model,
        args: UnlearningConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        retain_dataset=None,
        ref_model=None,
        processing_class=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
    ) -> None:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
        args = own_options(type(self), args, model)
        if train_dataset is None or len(train_dataset) == 0:
            raise ValueError("train_dataset is missing or empty: it holds the rows to forget")
        processing_class = checked_tokenizer(processing_class, model, pad_token=args.pad_token)
        self.uses_template = "template" in self.roles and isinstance(args, TemplateConfig)
        self._model_at_start, self._model_name = model, name
        self._retain_numbers: list[int] = []
        self._retain_rows = read_retain_rows(
            retain_dataset, args, processing_class, lambda report: self.report_rows(report, args), self._retain_numbers
        )
        self._own_evaluation = eval_dataset is not None
        eval_dataset = self._with_evaluation(args, train_dataset, eval_dataset)
        starting_adapter = not isinstance(model, str) and is_peft_model(model)
        super().__init__(
            model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        del self._model_at_start
        self._check_lengths(train_dataset, retain_dataset)
        if args.disable_dropout:
            _disable_dropout(self.model)
        self.divergence = args.resolve_divergence() if isinstance(args, DivergenceOptions) else None
        self.data_collator = self.make_collator()
        self.reference = self._make_reference(ref_model, starting_adapter)
        self.add_callback(_EpochCallback(self))
        self._stop_early()

    # ---------------------------------------------------------------- what a method gives
    def forget_term(self, scores: dict[str, RoleScores]) -> Tensor:
        """The forget half of the loss → [B], or [1] for a statistic of the batch."""
        raise NotImplementedError

    def retain_loss(self, retain: RoleScores) -> Tensor:
        """The retain half of the loss → [B]."""
        if self.args.retain_term == "nll":
            return nll(retain.log_probs, retain.mask)
        divergence = get_divergence(self.args.retain_divergence)
        if self.args.retain_level == "vocabulary":
            return vocabulary_divergence(retain.logits, retain.reference.logits, retain.mask, divergence)
        return sampled_divergence(retain.token_log_ratio, retain.mask, divergence)

    def retain_weight(self) -> float:
        """α; a method with a multiplier of its own overrides this."""
        return self.args.retain_weight

    def example_loss(
        self, scores: dict[str, RoleScores], forget_term: Tensor, retain_term: Tensor | None = None
    ) -> Tensor:
        """γ·forget term + α·retain term → [B], or [1] for a statistic of the batch."""
        loss = self.args.forget_weight * forget_term
        return loss if retain_term is None else loss + self.retain_weight() * retain_term

    def method_columns(self, scores: dict[str, RoleScores]) -> dict[str, Tensor]:
        """Further per-example values to log as means, [B] each."""
        return {}

    def make_collator(self) -> UnlearningCollator:
        """The collator; rows of all roles share one padded batch."""
        return UnlearningCollator(self._tokenizer.pad_token_id, pad_to_multiple_of=self.args.pad_to_multiple_of)

    @property
    def metric_divergence(self) -> Divergence:
        """The f of `divergence/<name>`, `mean_f/<name>`: the method's own, else the retain term's."""
        return get_divergence(getattr(self.args, "divergence", None) or self.args.retain_divergence)

    @property
    def needs_logits(self) -> bool:
        """Whether vocabulary-sized scores are needed."""
        return self._looks_at_logits(self.args)

    @classmethod
    def _looks_at_logits(cls, args: UnlearningConfig) -> bool:
        return cls.forget_needs_logits or (args.retain_term == "divergence" and args.retain_level == "vocabulary")

    @classmethod
    def _uses_reference(cls, args: UnlearningConfig) -> bool:
        return cls.forget_needs_reference or args.retain_term in ("divergence", "activations")

    @classmethod
    def step_shape(cls, args: UnlearningConfig, *, peft: bool, **_: Any) -> StepShape:
        """Forget rows, template and retain rows where there are any; the reference where the loss needs one."""
        template = "template" in cls.roles and isinstance(args, TemplateConfig)
        roles = 1 + template + (args.retain_term != "none")
        references = int(cls._uses_reference(args) and not (peft or args.precompute_reference))
        # A method that looks at a layer's activations takes the logits as well, for its log.
        logits = cls._looks_at_logits(args) or hasattr(args, "layer")
        rows, note = roles * args.per_device_train_batch_size, f"max_length={args.max_length}"
        on_logits = (lambda scores: cls._on_logits(args, scores.chunk(roles))) if logits else None
        return StepShape(rows, args.max_length, note, references, on_logits)

    @classmethod
    def _on_logits(cls, args: UnlearningConfig, roles: tuple[Tensor, ...]) -> list[Tensor]:
        """Terms that save of float32 logits `[N, V]` what the loss does; the forget term stands as a cross-entropy."""
        terms = []
        if cls.forget_needs_logits:
            forget = roles[-2] if args.retain_term != "none" else roles[-1]
            terms.append((torch.ones_like(forget) * forget.log_softmax(-1)).sum(-1))
        if args.retain_term == "divergence" and args.retain_level == "vocabulary":
            terms.append((roles[-1] * roles[-1].detach().clone()).sum(-1))  # the kernel keeps both sides' logits
        return terms

    # ---------------------------------------------------------------- data
    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if isinstance(dataset, ForgetDataset):
            return dataset
        if formatting_func is not None:
            raise ValueError(
                "formatting_func is not used here: give rows in one of the formats of fdiv.unlearning.data"
            )
        train = dataset_name == "train"
        retain = self._retain_rows if args.retain_term != "none" or not train else ()
        return build_forget_dataset(
            dataset, retain, args, processing_class, getattr(self, "_model_at_start", None), self._model_name,
            name="forget" if train else f"{dataset_name} forget",
            report=lambda report: self.report_rows(report, args),
            retain_numbers=self._retain_numbers,
        )  # fmt: skip

    def _check_lengths(self, forget: Any, retain: Any) -> None:
        """Refuse rows that are longer than the model's context; chunks of raw text are as long as `max_length`."""
        for what, given, rows in (
            ("forget", forget, self.train_dataset.forget),
            ("retain", retain, self.train_dataset.retain),
        ):
            raw = self.train_dataset.raw_text or given is None
            source = Source(f"the {what} rows") if raw else source_of(given, f"the {what} rows")
            lengths = (len(row.prompt_ids) + len(row.answer_ids) for row in rows)
            check_all_fit(lengths, self.model, source.row, "set max_length to at most")

    @classmethod
    def why_not_exact(cls, args: UnlearningConfig) -> str | None:
        """What was made of all rows together before training: reference scores, generated template answers."""
        if args.precompute_reference:
            return (
                "precompute_reference: true scores the rows in batches, whose padding follows from all of their rows; "
                "set it to false"
            )
        if getattr(args, "template_source", None) == "generated":
            return "template_source: generated samples the answers of all rows in batches; keep them in a column"
        return super().why_not_exact(args)

    @classmethod
    def further_rows(cls, args: UnlearningConfig) -> dict[str, Any]:
        """The retain rows that training meets."""
        if args.retain_term == "none" or args.retain_dataset_name is None:
            return {}
        return {"retain": load_rows(args.retain_dataset_name, args.retain_dataset_config, args.retain_dataset_split)}

    def rows_at(self) -> RowsAt:
        """A forget row and its retain row; the place is empty where either is removed."""
        return self.train_dataset.rows_at

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["index", "epoch", "forget", "retain", "template"]

    def _get_train_sampler(self, train_dataset=None) -> EpochSampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        self.sampler = self._sampler_over(rows)
        return self.sampler

    def _sampler_over(self, rows: ForgetDataset) -> EpochSampler:
        batch = self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        return EpochSampler(len(rows), seed=rows.seed, global_batch_size=batch)

    # ---------------------------------------------------------------- reference
    def _make_reference(self, ref_model, starting_adapter: bool) -> Reference | PrecomputedReference | None:
        args = self.args
        if not self._uses_reference(args):
            if ref_model is not None:
                raise ValueError(f"ref_model is given, but {self._name} with this retain_term uses no reference")
            return None
        reference = Reference(self, ref_model, copy_adapter=starting_adapter)
        if not args.precompute_reference:
            return reference
        if self.needs_logits or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "precompute_reference keeps token log-probabilities only and scores on whole models: set it to false "
                "for a method that looks at the vocabulary or at activations, under DeepSpeed and under FSDP"
            )
        table = PrecomputedReference()
        table.fill(reference, list(self._rows_ahead()), self.data_collator, args.per_device_eval_batch_size)
        return table

    def _rows_ahead(self):
        """Every row that training and evaluation will score, in all epochs."""
        evals = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        sampler = self._sampler_over(self.train_dataset)
        epochs = math.ceil(self.args.num_train_epochs)
        if self.args.max_steps > 0:
            batch = self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
            epochs = math.ceil(self.args.max_steps * batch / len(sampler))
        for rows, count in [(self.train_dataset, epochs), *((rows, 1) for rows in evals.values() if rows is not None)]:
            for address in range(count * len(rows)):
                item = rows[address]
                yield from (item[role] for role in ("template", "forget", "retain") if role in item)

    # ---------------------------------------------------------------- loss
    def score_roles(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, RoleScores]:
        """Score the rows, and without gradient also under the reference, if there is one.

        Template answers are short: they have a forward of their own, as wide as they are. All other rows share one.
        """
        size = len(inputs["index"])
        roles = tuple(role for role in self.roles if role != "template" or self.uses_template)
        roles = roles[: inputs["input_ids"].size(0) // size]
        own = roles.index("template") + 1 if "template" in roles else 0
        options = {"logits": self.needs_logits, "layer": getattr(self.args, "layer", None)}
        scores: dict[str, RoleScores] = {}
        for part, start in ((roles[:own], 0), (roles[own:], own * size)):
            if not part:
                continue
            rows = trimmed_rows(inputs, slice(start, start + len(part) * size), self.args.pad_to_multiple_of)
            found = split_roles(score_rows(model, rows, **options), part, size)
            if self.reference is not None:
                reference = split_roles(score_reference(self.reference, rows, **options), part, size)
                found = {role: found[role].with_reference(reference[role]) for role in part}
            scores |= found
        return scores

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean over the micro-batch of γ·forget term + α·retain term; the per-example values go to the log."""
        scores = self.score_roles(model, inputs)
        terms = {"forget_term": self.forget_term(scores)}
        if "retain" in scores and self.args.retain_term != "none":
            terms["retain_term"] = self.retain_loss(scores["retain"])
        losses = self.example_loss(scores, **terms)
        size = len(inputs["index"])
        columns = {"loss": losses, **terms, **self.method_columns(scores)}
        with torch.no_grad():
            columns = {name: value.detach().expand(size) for name, value in columns.items()} | _common_columns(scores)
        self.record_examples(columns | self._divergence_column(scores))
        return (losses.mean(), {}) if return_outputs else losses.mean()

    @torch.no_grad()
    def _divergence_column(self, scores: dict[str, RoleScores]) -> dict[str, Tensor]:
        rows = scores["retain"] if "retain" in scores else scores[self.roles[-2]]
        if rows.reference is None:
            return {}
        if rows.logits is None:
            # The tokens are those of the data, not samples of the reference: no estimate of a divergence.
            return {"mean_f": sampled_divergence(rows.token_log_ratio, rows.mask, self.metric_divergence)}
        pair = rows.logits, rows.reference.logits
        return {"divergence": vocabulary_divergence(*pair, rows.mask, self.metric_divergence)}

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Trainer's evaluation on the forget rows, where there are any, and then `epoch_evaluation`."""
        own = super(PeriodicEvaluationMixin, self).evaluate
        if self.epoch_evaluation is None or metric_key_prefix != "eval":
            return own(eval_dataset, ignore_keys, metric_key_prefix)
        metrics = {}
        if eval_dataset is not None or self._own_evaluation:
            metrics = own(eval_dataset, ignore_keys, metric_key_prefix)
        found = evaluate_epoch(self, self.epoch_evaluation)
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics | found)
        return metrics | found

    def reduce_examples(self, examples: dict[str, Tensor], mode: str) -> dict[str, float]:
        """Means, quantiles of the log-ratios, and the divergence with its standard error; see the class."""
        metrics: dict[str, float] = {}
        for name, values in examples.items():
            if name.startswith("log_ratio/"):
                role = name.removeprefix("log_ratio/")
                metrics |= log_ratio_quantiles(role, values)
                metrics |= density_weight_quantiles(role, self.metric_divergence, values)
            elif name in ("divergence", "mean_f"):
                label = f"{name}/{self.metric_divergence.label}"
                metrics[label], metrics[f"{label}_se"] = mean_and_error(values)
            elif name != "loss" or mode == "eval":  # Trainer's own weighs an incomplete last batch like a full one
                metrics[name] = values.mean().item()
        return metrics

    def objective_settings(self) -> dict[str, Any]:
        """The method's name and the keys that define its loss and rows."""
        return {"method": self._name, **self.args.method_settings()}

    def run_identity(self) -> dict[str, Any]:
        """Also the retain term with its divergence and rows, and the template answers, where they are trained on."""
        term = self.args.retain_term
        return super().run_identity() | {
            "retain_term": term,
            "retain_divergence": plain(self.args.retain_divergence) if term == "divergence" else None,
            "retain dataset": data_fingerprint(self._retain_rows) if term != "none" else None,
            "template answers": data_fingerprint(getattr(self.train_dataset, "templates", None)),
        }


def _common_columns(scores: dict[str, RoleScores]) -> dict[str, Tensor]:
    """Per example: each role's length-normalised probability, and its log-ratio where there is a reference."""
    columns = {f"prob/{role}": torch.exp(-nll(part.log_probs, part.mask)) for role, part in scores.items()}
    with_reference = {role: part for role, part in scores.items() if part.reference is not None}
    return columns | {f"log_ratio/{role}": part.log_ratio for role, part in with_reference.items()}


def _disable_dropout(model: nn.Module) -> None:
    from trl.trainer.utils import disable_dropout_in_model

    disable_dropout_in_model(model)
