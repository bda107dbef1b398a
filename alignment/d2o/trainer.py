"""D²O: distributional dispreference optimisation, alignment from negatives alone (Duan et al. 2024, arXiv:2403.03419).

`D2OTrainer` is TRL's `GRPOTrainer` for the sampling and placement it does, with D²O's loss: each rejected answer is
pushed below the mean of K self-samples of its prompt (the anchors).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback
from trl import GRPOTrainer

from fdiv.alignment.d2o.anchors import (
    ANCHORS_FILE,
    Anchor,
    AnchorCache,
    anchor_prompts_at_once,
    check_context,
    draw_anchors,
    draw_offline_anchors,
    prompt_key,
)
from fdiv.alignment.d2o.config import D2OConfig
from fdiv.alignment.d2o.data import collate_groups, prepare_negatives
from fdiv.alignment.d2o.loss import d2o_loss
from fdiv.alignment.d2o.metrics import group_columns, reduce_groups
from fdiv.alignment.f_dpo.loss import check_f_dpo_divergence
from fdiv.alignment.scorers import build_scorer, checked_scorer
from fdiv.errors import DataError
from fdiv.inference.encoding import encoding_stamp
from fdiv.models.fingerprints import tokenizer_fingerprint, vocabulary_size, weights_fingerprint
from fdiv.models.loading import checked_tokenizer, load_second_model
from fdiv.models.logprobs import sequence_log_prob, token_scores
from fdiv.models.reference import Reference
from fdiv.training.places import held_rows
from fdiv.training.rollouts import RolloutMixin, without_trl_reference
from fdiv.training.trainer import ObjectiveTrainerMixin, own_options

__all__ = ["D2OConfig", "D2OTrainer"]

_ROWS = ("input_ids", "attention_mask", "completion_mask")


class _AnchorCallback(TrainerCallback):
    """Draws the offline anchors when the model is placed and no step was taken, and refreshes the reference."""

    def __init__(self, trainer: D2OTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer.require_anchors(*self.trainer.all_datasets())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if args.refresh_every is not None and state.global_step % args.refresh_every == 0:
            self.trainer.start_reference.refresh()


class D2OTrainer(RolloutMixin, ObjectiveTrainerMixin, GRPOTrainer):
    r"""D²O on TRL's `GRPOTrainer`; `args` is a `D2OConfig`, rows are those of `fdiv.alignment.d2o.data`.

    Anchors come from a row's `anchors` column where there is one, else from the model: from the file of offline
    anchors (sampled before the first step, for training and evaluation prompts), or from the policy in each step.
    One forward with gradient scores the K anchors and the rejected answer of every row; log-probabilities are summed
    over tokens at temperature 1, under the bare prompt.

    Args:
        model: path, hub id, model or `PeftModel`; as for `GRPOTrainer`.
        harmfulness_func: a function with TRL's reward signature that scores the anchors for the log, or a sequence
            classifier as TRL takes; wins over `harmfulness_scorer` of `args`. A score of None or NaN is left out and
            counted in `harmfulness/unscored`.
        ref_model_pos: π_r⁺, the denominator of the rejected answer; wins over `ref_pos` of `args`. None: the frozen
            start model (under PEFT the base with the adapter off, or a frozen copy of the adapter where training
            continues one or the reference is refreshed).
        ref_model_neg: π_r⁻, the denominator of the anchors, made in the same way.
        rollout_func: TRL's, to sample anchors by other means (`fdiv.training.rollouts`); one completion for
            each prompt it gets.

    Logged, over every group since the last log on all processes: `rewards/{anchors,rejected,margins,accuracies}` (the
    f-scored β·mean and α·rejected that the loss compares), `rewards_raw/*` (of log-ratios), `logps/*`,
    `log_ratio/{anchors,rejected}_p05|p50|p95`, `clamped_fraction`; `divergence/<f>` and `divergence/jeffreys` from the
    policy to the reference with `_se` over prompts (`…_to_pos`, `…_to_neg` where there are two), weighted for how the
    anchors were sampled, exact but for top-k, top-p, min-p and repetition penalty; `anchors/{online,mean_length,
    clipped_ratio}`; with a scorer `harmfulness/{anchors,anchors_se,harmful_share,unscored}`.

    Raises:
        DataError: data, tokenizer or anchors that cannot be used.
        RolloutError: the rollout back end failed or gave an empty completion.
        ScorerError: the scorer raised or returned the wrong number of scores.
        NonFiniteLossError: a NaN or infinite loss, before the optimizer step.
    """

    leaves_places_empty = True  # a row is a whole group: its place is empty, and the mean counts it with a loss of 0
    loss_is_scaled_for_ga = False  # a mean over the micro-batch: Trainer divides by the accumulation steps
    config_class = D2OConfig
    title = "distributional dispreference optimisation: rejected answers against own samples"
    paper = "arXiv:2403.03419"
    columns = ("prompt", "rejected")
    optional_columns = ("anchors",)
    check_divergence = staticmethod(check_f_dpo_divergence)
    _tag_names = ["trl", "fdiv", "d2o"]
    _name = "D2O"
    _paper = {
        "title": "Negating Negatives: Alignment with Human Negative Samples via Distributional Dispreference "
        "Optimization",
        "id": "2403.03419",
        "citation": """\
@inproceedings{duan2024negating,
    title     = {{Negating Negatives: Alignment with Human Negative Samples via Distributional Dispreference
                 Optimization}},
    author    = {Shitong Duan and Xiaoyuan Yi and Peng Zhang and Yan Liu and Zheng Liu and Tun Lu and Xing Xie and
                 Ning Gu},
    year      = 2024,
    booktitle = {Findings of the Association for Computational Linguistics: {EMNLP} 2024},
    eprint    = {2403.03419}
}""",
    }

    def __init__(
        self,
        model,
        args: D2OConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        harmfulness_func=None,
        ref_model_pos: nn.Module | None = None,
        ref_model_neg: nn.Module | None = None,
        rollout_func=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
    ) -> None:
        args = own_options(type(self), args, model)
        if hasattr(processing_class, "tokenizer"):
            raise DataError("D2OTrainer trains on text: pass a tokenizer, not a multimodal processor")
        processing_class = checked_tokenizer(processing_class, model, padding_side="left")
        self.divergence = args.resolve_divergence()
        scorer = harmfulness_func or (build_scorer(args.harmfulness_scorer) if args.harmfulness_scorer else None)
        starting_adapter = not isinstance(model, str) and is_peft_model(model)
        self._prepare = lambda rows, split, kept=None: prepare_negatives(
            rows, processing_class, max_length=args.max_length, anchors=args.num_generations, name=split,
            report=lambda report: self.report_rows(report, args), encoding=args.encoding(), kept=kept,
        )  # fmt: skip
        used: list[int] = []
        # TRL would load a second model for β > 0, and bake the sampling temperature into the scores.
        with without_trl_reference(args, temperature=1.0):
            super().__init__(
                model,
                reward_funcs=[_no_score if scorer is None else _checked_harmfulness(scorer)],
                args=args,
                train_dataset=self._prepare(train_dataset, "train_dataset", used),
                eval_dataset=_each(eval_dataset, self._prepare),
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                rollout_func=rollout_func or args.server_rollouts(),
            )
        self.row_numbers = used or None  # none of rows that came with their tokens: they are used as they are
        self.scores_harmfulness = scorer is not None
        self._set_sampling_temperature(args.temperature)
        self.num_generations = self.num_generations_eval = 1  # TRL's sampler: each row once, a row is a whole group
        loading = {} if quantization_config is None else {"quantization_config": quantization_config}
        self._make_references(
            _loaded(ref_model_pos, args.ref_pos, args, loading),
            _loaded(ref_model_neg, args.ref_neg, args, loading),
            starting_adapter,
        )
        check_context(self)
        place = args.anchor_cache or Path(args.output_dir) / ANCHORS_FILE
        self.anchors = AnchorCache(place, self._anchor_settings(), vocabulary_size(self.model))
        self.note("anchors", self.anchors.notes)
        self.add_callback(_AnchorCallback(self))

    # ---------------------------------------------------------------- set-up
    def _anchor_settings(self) -> dict[str, Any]:
        """What offline anchors depend on: weights, sampling, and how their prompts become tokens."""
        chat = not isinstance(self.train_dataset[0]["prompt"], str)
        return {
            "start_model": weights_fingerprint(self.model),
            **self.args.sampling_settings(),
            **encoding_stamp(self._tokenizer, self.args.encoding(), chat=chat),
            "dtype": str(next(self.model.parameters()).dtype),
            "tokenizer": tokenizer_fingerprint(self._tokenizer),
        }

    def _set_sampling_temperature(self, temperature: float) -> None:
        self.temperature = temperature
        if self.use_vllm:
            self.vllm_generation.temperature = temperature
        else:
            self.generation_config.temperature = self.generation_kwargs["temperature"] = temperature

    def _make_references(self, pos: nn.Module | None, neg: nn.Module | None, starting_adapter: bool) -> None:
        args = self.args
        self.start_reference = None
        if pos is None or neg is None:
            copy = starting_adapter or args.refresh_every is not None
            self.start_reference = Reference(self, copy_adapter=copy)
        self.reference_pos = self.start_reference if pos is None else Reference(self, pos)
        self.reference_neg = self.start_reference if neg is None else Reference(self, neg)
        if self.reference_pos is not self.reference_neg:
            args.warn_if_experimental(one_reference=False)
        self.ref_model = self.reference_pos.model  # where evaluations look for it; None: the adapter switched off

    def objective_settings(self) -> dict[str, Any]:
        """The weights, the divergence, the anchors' origin and the references."""
        names = (
            "alpha",
            "beta",
            "divergence",
            "max_exponent",
            "num_generations",
            "anchor_source",
            "online_start_step",
        )
        names += ("refresh_every", "anchor_instruction_templates", "temperature", "top_p", "ref_pos", "ref_neg")
        return {name: getattr(self.args, name) for name in names}

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt", "rejected", "anchors", "prompt_ids", "rejected_ids", "anchor_ids"]

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        # Not GRPO's: its order depends on how often it was read, so a run resumed after the first epoch would see
        # other rows than the uninterrupted one. Transformers' order is a function of (seed, epoch).
        if not self.args.shuffle_dataset:
            return SequentialSampler(self.train_dataset if dataset is None else dataset)
        return Trainer._get_train_sampler(self, dataset)

    # ---------------------------------------------------------------- anchors
    def all_datasets(self) -> list[Any]:
        """The tokenised training and evaluation datasets."""
        evals = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        return [self.train_dataset, *(dataset for dataset in evals.values() if dataset is not None)]

    def require_anchors(self, *datasets: Any) -> None:
        """Draw the offline anchors that are missing, where offline anchors are used at all.

        Raises:
            DataError: some are missing and training has begun, so the start model is gone.
        """
        count = self.args.num_generations
        rows = [row for dataset in datasets for row in self._held(dataset) if row.get("anchor_ids") is None]
        if self._online or not rows or count == 0:
            return
        if self.state.global_step > 0:
            for row in rows:
                self.anchors.anchors(row["prompt_ids"], count)
            return
        draw_offline_anchors(self, self.anchors, rows, count)

    def _held(self, dataset: Any) -> Iterator[Mapping[str, Any]]:
        """The rows of a dataset, without those that the training leaves out."""
        gone = self.places is not None and dataset is self.train_dataset
        return (row for number, row in enumerate(dataset) if not (gone and self.places.is_empty(number)))

    @classmethod
    def why_not_resumed(cls, args: D2OConfig, rows: Any) -> str | None:
        """Offline anchors that were sampled in batches of several prompts."""
        if args.num_generations == 0 or "anchors" in rows.column_names:
            return None
        if args.anchor_source == "online" and args.online_start_step == 0:
            return None
        if anchor_prompts_at_once(args) == 1:
            return None
        return (
            f"its offline anchors were sampled {anchor_prompts_at_once(args)} prompts at a time "
            f"(anchor_batch_size={args.anchor_batch_size}), so those of other rows follow from the removed ones' too; "
            "`fdiv run` with exclude_rows makes it from the beginning. A run can be replayed with anchor_batch_size "
            f"of at most {2 * args.num_generations - 1}, with a column `anchors`, or with anchor_source: online"
        )

    @property
    def _online(self) -> bool:
        args = self.args
        return args.anchor_source == "online" and self.state.global_step >= args.online_start_step

    def score_harmfulness(self, rows: Sequence[Mapping[str, Any]], ids: Sequence[list[int]]) -> list[float | None]:
        """The scorer's number for completion `ids[i]` of row i; None where it gave none, or without a scorer."""
        if not self.scores_harmfulness:
            return [None] * len(ids)
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        prompts = [row["prompt"] for row in rows]
        if not isinstance(prompts[0], str):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        scores = self._calculate_rewards(list(rows), prompts, texts, list(ids))  # gathered: this process's part stands
        part = self.my_part(scores, len(rows))[:, 0].tolist()
        return [score if torch.isfinite(torch.tensor(score)) else None for score in part]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        inputs = held_rows(inputs)
        count, online = self.args.num_generations, self._online
        if count and inputs[0].get("anchor_ids") is not None:
            online = False
            groups = [[Anchor(ids, None, None) for ids in row["anchor_ids"]] for row in inputs]
        elif online:
            groups = draw_anchors(self, inputs, count)
        else:
            groups = [self.anchors.anchors(row["prompt_ids"], count) if count else [] for row in inputs]
        batch = collate_groups(inputs, groups, self._tokenizer.pad_token_id, self.eos_token_ids)
        batch["online"] = torch.full((len(inputs),), float(online))
        return {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}

    # ---------------------------------------------------------------- loss
    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        r"""The mean over the B prompts of

            −log σ( (β/K)·Σ_k h(log π(y_k)/π_r⁻(y_k)) − α·h(log π(y_l)/π_r⁺(y_l)) )

        with the anchors y_1 … y_K, the rejected answer y_l and the score h = f′ (arXiv:2403.03419; log u for
        `reverse_kl`). `inputs` holds K + 1 rows for each prompt, `[B, K+1, T]`, the rejected answer last. Nothing of
        `GRPOTrainer`'s loss is used.
        """
        args = self.args
        # 1. log π of the anchors and the rejected answers: one forward with gradient for all of them.
        rows = {name: inputs[name].flatten(0, 1) for name in _ROWS}
        shape = inputs["input_ids"].shape[:2]
        log_prob = sequence_log_prob(token_scores(model, **rows)).view(shape)
        # 2. log π_r⁺ and log π_r⁻ of the same rows, without gradient; as a rule they are one model.
        pos = neg = sequence_log_prob(self.reference_pos.score(**rows)).view(shape)
        if self.reference_neg is not self.reference_pos:
            neg = sequence_log_prob(self.reference_neg.score(**rows)).view(shape)
        # 3. Log-ratios: the anchors against π_r⁻, the rejected answer against π_r⁺.
        anchors, rejected = log_prob[:, :-1] - neg[:, :-1], log_prob[:, -1] - pos[:, -1]
        # 4. The loss of each prompt. Trainer divides by the accumulation steps.
        losses = d2o_loss(anchors, rejected, args.alpha, args.beta, self.divergence, max_exponent=args.max_exponent)
        # 5. What is logged of each prompt.
        columns = group_columns(args, self.divergence, inputs, log_prob, pos, neg, harmfulness=self.scores_harmfulness)
        self.record_examples({"loss": losses, **columns})
        return losses.mean()

    def reduce_examples(self, examples: dict[str, Tensor], mode: str) -> dict[str, float]:
        """See the class and `fdiv.alignment.d2o.metrics`."""
        if mode == "train":
            self._total_train_tokens += int(examples["attended"].sum())
        metrics = reduce_groups(examples, self.divergence, self.args.num_generations)
        if mode == "eval":
            metrics["loss"] = examples["loss"].mean().item()  # each row once; Trainer's own counts a filled-up batch
        return metrics | {"num_tokens": self._total_train_tokens}

    # ---------------------------------------------------------------- evaluation and checkpoints
    def evaluate(self, eval_dataset=None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in TRL; rows that are new since construction are tokenised, and need anchors sampled before step 1."""
        eval_dataset = _each(eval_dataset, self._prepare)
        given = eval_dataset if eval_dataset is not None else self.eval_dataset
        self.require_anchors(*(given.values() if isinstance(given, dict) else [given] if given is not None else ()))
        return super().evaluate(eval_dataset, *args, **kwargs)

    def save_method_state(self, folder: Path) -> None:
        """The reference that `refresh_every` replaced."""
        super().save_method_state(folder)
        if self.args.refresh_every is not None:
            self.start_reference.save(folder / "reference")

    def load_method_state(self, folder: Path) -> None:
        """Read it back; offline anchors of the run that the checkpoint is of, where this one has none (a replay)."""
        super().load_method_state(folder)
        theirs = folder.parent / ANCHORS_FILE
        if not len(self.anchors) and theirs.is_file():
            rows = [row for dataset in self.all_datasets() for row in self._held(dataset)]
            keys = {prompt_key(row["prompt_ids"]) for row in rows}
            self.anchors.take(theirs, keys, write=self.accelerator.is_main_process)
        if self.args.refresh_every is not None:
            self.start_reference.load(folder / "reference")


def _each(dataset: Any, prepare: Any) -> Any:
    """An evaluation dataset, or a dict of them, prepared; None and a key of one stay."""
    if dataset is None or isinstance(dataset, str):
        return dataset
    if isinstance(dataset, dict):
        return {name: prepare(rows, f"eval_dataset[{name!r}]") for name, rows in dataset.items()}
    return prepare(dataset, "eval_dataset")


def _no_score(completions: Sequence[Any], **_: Any) -> list[None]:
    """In place of the reward function TRL insists on; never called."""
    return [None] * len(completions)


def _checked_harmfulness(scorer: Any) -> Any:
    return scorer if isinstance(scorer, str) else checked_scorer(scorer, finite=False)


def _loaded(
    model: nn.Module | None, path: str | None, args: D2OConfig, loading: Mapping[str, Any]
) -> nn.Module | None:
    """The reference given as an object, or by its path in the config, loaded as the policy; None: the start model."""
    if model is not None or path is None:
        return model
    return load_second_model(path, **(args.model_init_kwargs or {}), **loading)
