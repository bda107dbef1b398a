"""f-DPO: direct preference optimisation regularised by any valid f-divergence (Wang et al. 2023, arXiv:2309.16240).

`FDPOConfig` and `FDPOTrainer` are TRL's `DPOConfig` and `DPOTrainer` with one more idea, `divergence`. With
`divergence="reverse_kl"` they train DPO, step for step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trl import DPOTrainer

from fdiv.alignment.f_dpo.config import FDPOConfig
from fdiv.alignment.f_dpo.loss import check_f_dpo_divergence, f_dpo_loss, f_dpo_rewards
from fdiv.divergences import get_divergence
from fdiv.errors import DataError
from fdiv.inference.cache import fingerprint
from fdiv.models.loading import check_all_fit, checked_tokenizer, context_length, keep_trainable_layout
from fdiv.models.logprobs import with_position_ids
from fdiv.models.reference import reference_for_trl
from fdiv.rows.report import RowReport
from fdiv.rows.sources import source_of
from fdiv.sealed import LISTING, NO_DIGEST, check_listed, listed
from fdiv.statistics.calibration import length_normalised_calibration, margin_calibration
from fdiv.statistics.estimates import density_weight_quantiles, log_ratio_quantiles, mean_and_error
from fdiv.terminal import info
from fdiv.training.data_checks import (
    check_preference_dataset,
    encode_preferences,
    named_rows,
    preference_report,
    report_name,
    with_checked,
)
from fdiv.training.trainer import ObjectiveTrainerMixin, own_options

__all__ = ["FDPOTrainer"]


class FDPOTrainer(ObjectiveTrainerMixin, DPOTrainer):
    r"""f-DPO on TRL's `DPOTrainer`; same arguments, same data types, `args` is an `FDPOConfig`.

    The reference is, in this order: `ref_model`; for a PEFT policy the base with the adapter off (the frozen copy of
    the adapter when training continues one); precomputed log-probabilities with `precompute_ref_log_probs`; a frozen
    copy of the model object as passed; a second load of the model named by a string.

    Logged beside what `DPOTrainer` logs: `rewards/*` is the f-scored implicit reward β·f′(u), what the loss compares;
    `rewards_raw/*` is β·log u, TRL's; `log_ratio/{chosen,rejected}_p05|p50|p95`, and the same of u·f″(u) as
    `density_weight/…`; `mean_f/<name>` with `_se`, the mean of f(u) over the rows; `clamped_fraction`; in evaluation
    `ece_length_normalised` and `ece_margin`. All are over every example since the last log, on all processes.

    Raises:
        DataError: (a ValueError) data without the needed columns or rows, a tokenizer without pad or eos token, no
            way to a reference.
        NonFiniteLossError: a NaN or infinite loss; in training before the optimizer step.
    """

    config_class = FDPOConfig
    title = "direct preference optimisation under any f-divergence"
    paper = "arXiv:2309.16240"
    columns = ("chosen", "rejected")
    optional_columns = ("prompt",)
    leaves_places_empty = True
    check_divergence = staticmethod(check_f_dpo_divergence)
    _tag_names = ["trl", "fdiv", "f-dpo"]
    _name = "f-DPO"
    _paper = {
        "title": "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints",
        "id": "2309.16240",
        "citation": """\
@inproceedings{wang2024beyond,
    title     = {{Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints}},
    author    = {Chaoqi Wang and Yibo Jiang and Chenghao Yang and Han Liu and Yuxin Chen},
    year      = 2024,
    booktitle = {The Twelfth International Conference on Learning Representations, {ICLR} 2024},
    eprint    = {2309.16240}
}""",
    }

    def __init__(
        self,
        model,
        ref_model=None,
        args: FDPOConfig | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
    ) -> None:
        args = own_options(type(self), args, model)
        self.divergence = args.resolve_divergence()
        checked = _check_data(train_dataset, eval_dataset, args)
        train_dataset, eval_dataset = with_checked(checked, eval_dataset)
        processing_class = _checked_processing_class(processing_class, model, args)
        if ref_model is None and peft_config is None and not isinstance(model, str):
            ref_model = reference_for_trl(model, args)
        super().__init__(
            model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        if hasattr(self.train_dataset, "__len__") and len(self.train_dataset) == 0:
            raise DataError(
                f"no training row is left: every prompt fills max_length={args.max_length} alone. Raise max_length"
            )
        _check_lengths(train_dataset, self.train_dataset, self.model, args.max_length)
        used = named_rows(self.train_dataset, self.eval_dataset)
        for name, rows in named_rows(train_dataset, eval_dataset).items():
            report = _report(rows, used[name], args, report_name(name))
            if report is None:
                info(f"{report_name(name)}: a stream, whose rows are checked as they are read and not counted")
            else:
                self.report_rows(report)

    def objective_settings(self) -> dict[str, Any]:
        """The divergence (as the loss uses it), β and the overflow cap."""
        return {
            "divergence": self.args.divergence,
            "normalized": self.args.normalized,
            "beta": self.beta,
            "max_exponent": self.args.max_exponent,
        }

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        """TRL's model card with the divergence among the tags and the objective's settings in a table."""
        tags = [tags] if isinstance(tags, str) else list(tags or ())
        super().create_model_card(model_name, dataset_name, [*tags, get_divergence(self.args.divergence).name])

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: FDPOConfig, dataset_name: str) -> Any:
        """As TRL's for a processor; through the one encoder (`fdiv.inference.encoding`) for a tokenizer."""
        if hasattr(processing_class, "tokenizer"):
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        bound = args.max_length if args.truncation_mode == "keep_start" else None
        kept: list[int] = []
        if dataset_name == "train":
            self.row_numbers = kept
        with args.main_process_first(desc=f"tokenising the {dataset_name} dataset"):
            return encode_preferences(
                dataset,
                processing_class,
                args.encoding(),
                max_length=bound,
                name=dataset_name,
                num_proc=args.dataset_num_proc,
                kept=kept,
            )

    @classmethod
    def why_not_exact(cls, args: FDPOConfig) -> str | None:
        """Precomputed reference log-probabilities were scored in batches with the removed rows."""
        if args.precompute_ref_log_probs:
            return (
                "precompute_ref_log_probs: true scores the rows in batches, whose padding follows from all of their "
                "rows; set it to false"
            )
        return super().why_not_exact(args)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """As TRL's, whose file of values is named by weights and rows; here also by their bound, and checked."""
        keep_trainable_layout(self.model)  # TRL does this while it sets up, before our own turn comes
        self.check_heads()
        weights = self._precompute_model_hash
        self._precompute_model_hash = fingerprint(weights, self.args.max_length, self.args.truncation_mode)
        try:
            with _checked_values(dataset, self._precompute_model_hash, self.accelerator.is_main_process):
                return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = weights

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """As TRL's; with position ids, so that a data collator may pad on either side."""
        return super().compute_ref_log_probs(model, with_position_ids(model, inputs))

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool):
        inputs = with_position_ids(model, inputs)
        not_for_the_model = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}
        model_kwargs = {k: v for k, v in inputs.items() if k not in not_for_the_model} | {"use_cache": False}
        if self.aux_loss_enabled:
            model_kwargs["output_router_logits"] = True
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        outputs = model(**model_kwargs, labels=labels, fused_lm_head=True)
        mask = inputs["completion_mask"][:, 1:]
        # Prompt-learning PEFT puts virtual tokens in front of the outputs: keep the positions of the real ones.
        per_token = {
            name: getattr(outputs, name)[:, -mask.size(1) :]
            for name in ("log_probs", "entropy", "mean_logits", "is_top1")
        }
        logps = per_token.pop("log_probs").sum(dim=1)
        if self.precompute_ref_logps:
            ref_logps = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        else:
            ref_logps = torch.cat(self.compute_ref_log_probs(self.ref_model or self.model, inputs))
        log_ratio = logps - ref_logps
        chosen, rejected = log_ratio.chunk(2)  # the batch is [chosen; rejected]
        losses = f_dpo_loss(chosen, rejected, self.divergence, self.beta, max_exponent=self.args.max_exponent)
        loss = losses.mean()
        columns = {"loss": losses}
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            columns = {"loss": losses + self.router_aux_loss_coef * outputs.aux_loss.detach()}
            columns["aux_loss"] = outputs.aux_loss.detach().expand_as(losses)
        self.record_examples(columns | self._columns(logps, log_ratio, per_token, mask, inputs["attention_mask"]))
        if return_outputs:  # only for `compute_metrics` on logits, which the fused head does not build
            with torch.no_grad():
                outputs = model(**model_kwargs)
            return loss, outputs
        return loss

    @torch.no_grad()
    def _columns(
        self, logps: Tensor, log_ratio: Tensor, per_token: dict[str, Tensor], mask: Tensor, attention_mask: Tensor
    ) -> dict[str, Tensor]:
        """Per pair, for `reduce_examples`: everything logged is arithmetic on these."""
        rows = {
            "log_ratio": log_ratio,
            "reward": f_dpo_rewards(log_ratio, self.divergence, self.beta, max_exponent=self.args.max_exponent),
            "clamped": self.divergence.capped(log_ratio, self.args.max_exponent),
            "logps": logps,
            "tokens": mask.sum(1),
            "attended": attention_mask.sum(1),
            **{name: (value * mask).sum(1) for name, value in per_token.items()},
        }
        halves = ("chosen", "rejected")
        return {
            f"{half}_{name}": part
            for name, value in rows.items()
            for half, part in zip(halves, value.chunk(2), strict=True)
        }

    def reduce_examples(self, examples: dict[str, Tensor], mode: str) -> dict[str, float]:
        """TRL's metrics and ours; see the class. Token-level ones are means over tokens, the others over pairs."""
        pair = {name: torch.stack([examples[f"chosen_{name}"], examples[f"rejected_{name}"]], dim=1) for name in _ROWS}
        if mode == "train":
            self._total_train_tokens += int(pair["attended"].sum()) // self._tp_size
        margins = pair["reward"][:, 0] - pair["reward"][:, 1]
        raw = self.beta * pair["log_ratio"]
        tokens = pair["tokens"].sum(0).clamp(min=1)
        metrics = {
            "entropy": (pair["entropy"].sum() / tokens.sum()).item(),
            "num_tokens": self._total_train_tokens,
            "mean_token_accuracy": (pair["is_top1"][:, 0].sum() / tokens[0]).item(),
            "rewards/accuracies": (margins > 0).double().mean().item(),
            "rewards/margins": margins.mean().item(),
            "rewards_raw/margins": (raw[:, 0] - raw[:, 1]).mean().item(),
            "clamped_fraction": pair["clamped"].amax(1).mean().item(),
        }
        for side, half in enumerate(("chosen", "rejected")):
            metrics[f"logits/{half}"] = (pair["mean_logits"][:, side].sum() / tokens[side]).item()
            metrics[f"logps/{half}"] = pair["logps"][:, side].mean().item()
            metrics[f"rewards/{half}"] = pair["reward"][:, side].mean().item()
            metrics[f"rewards_raw/{half}"] = raw[:, side].mean().item()
            metrics |= log_ratio_quantiles(half, pair["log_ratio"][:, side])
            metrics |= density_weight_quantiles(half, self.divergence, pair["log_ratio"][:, side])
        # The rows are data, not samples of π_ref: a mean of f over them is no estimate of D_f and has not its bounds.
        divergence = get_divergence(self.args.divergence)
        name = f"mean_f/{divergence.label}"
        metrics[name], metrics[f"{name}_se"] = mean_and_error(divergence.generator(pair["log_ratio"]).mean(1))
        if "aux_loss" in examples:
            metrics["aux_loss"] = examples["aux_loss"].mean().item()
        if mode == "eval":
            # The mean over the pairs; Trainer's own weighs an incomplete last batch like a full one.
            metrics["loss"] = examples["loss"].mean().item()
            mean_logps = pair["logps"] / pair["tokens"].clamp(min=1)
            metrics["ece_length_normalised"] = length_normalised_calibration(
                mean_logps[:, 0], mean_logps[:, 1], self.args.ece_bins
            )
            metrics["ece_margin"] = margin_calibration(margins, self.args.ece_bins)
        return metrics


_ROWS = ("log_ratio", "reward", "clamped", "logps", "tokens", "attended", "entropy", "mean_logits", "is_top1")


@contextmanager
def _checked_values(dataset: Any, model_hash: str, is_main_process: bool) -> Iterator[None]:
    """Compare the reference log-probabilities that an earlier run left with their digest; list those made inside.

    Raises:
        DataError: they have changed since they were written.
    """
    from datasets.fingerprint import Hasher

    find = getattr(dataset, "_get_cache_file_path", None)  # a streamed dataset, which TRL refuses, has none
    if find is None:
        yield
        return
    path = Path(find(Hasher.hash((dataset._fingerprint, model_hash))))
    listing = f"{path.name}.{LISTING}"
    if path.is_file():
        if check_listed(path, "remove it, so that the reference is scored again", listing=listing) is None:
            info(f"{path}: {NO_DIGEST}")
        yield
        return
    yield
    if is_main_process and path.is_file():
        with listed(path, listing=listing):
            pass  # TRL has written it


def _check_data(train_dataset: Any, eval_dataset: Any, args: FDPOConfig) -> dict[str, Any]:
    """The datasets by name, checked; streams are checked as they are read."""
    checked = {}
    for name, dataset in ({"train_dataset": None} | named_rows(train_dataset, eval_dataset)).items():
        checked[name] = check_preference_dataset(dataset, name)
        # TRL hands the precomputed values over in a cache file beside the data's own, which such data have not.
        if args.precompute_ref_log_probs and args.world_size > 1 and not getattr(dataset, "cache_files", True):
            raise DataError(
                f"{name} lies in memory only, so {args.world_size} processes cannot share precomputed reference "
                "log-probs: load it from a file, or set precompute_ref_log_probs to false"
            )
    return checked


def _checked_processing_class(processing_class: Any, model: Any, args: FDPOConfig) -> Any:
    """The tokenizer or processor, with the pad and end tokens that completions need."""
    revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
    loading = {"revision": revision, "trust_remote_code": args.trust_remote_code}
    made = checked_tokenizer(processing_class, model, pad_token=args.pad_token, processor=True, **loading)
    if getattr(made, "tokenizer", made).eos_token is None:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or type(model).__name__
        raise DataError(
            f"the tokenizer of {name!r} has no eos token, which ends every completion: set `tokenizer.eos_token`"
        )
    return made


def _report(given: Any, used: Any, args: FDPOConfig, name: str) -> RowReport | None:
    """What became of rows that TRL has tokenised; None for a stream, which has not been read."""
    if not hasattr(used, "__len__") or "prompt_ids" not in used.column_names:
        return None
    return preference_report(len(given), used, args.max_length, name, keep_end=args.truncation_mode == "keep_end")


def _check_lengths(given: Any, dataset: Any, model: Any, max_length: int | None) -> None:
    """Refuse rows that are longer than the model's context after truncation; streamed rows are checked when scored."""
    limit = context_length(model)
    if limit is None or (max_length is not None and max_length <= limit) or not hasattr(dataset, "__len__"):
        return
    rows = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    whole = (len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows)
    lengths = (tokens if max_length is None else min(tokens, max_length) for tokens in whole)
    check_all_fit(lengths, model, partial(_row_name, given, dataset), "set max_length to at most")


def _row_name(given: Any, dataset: Any, number: int) -> str:
    """Row `number` of the tokenised rows as the data has it; where rows were dropped before it, by its text."""
    source = source_of(given, "")
    if len(given) != len(dataset):
        return f"the training row with the chosen answer {str(dataset[number]['chosen'])[:60]!r} …"
    return f"row {number} of the training data" if source.path is None else source.row(number)
