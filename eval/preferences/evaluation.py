"""Evaluation on held-out preferences: accuracy, calibration, and how far the policy went from its reference.

In a recipe: `eval: {name: preferences, …}`; alone: `fdiv eval preferences`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fdiv.divergences import get_divergence
from fdiv.errors import DataError
from fdiv.models.reference import reference_of
from fdiv.statistics.calibration import length_normalised_calibration, margin_calibration
from fdiv.training.config import RowOptions

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fdiv.evaluation import EvalContext

__all__ = ["PreferencesEvalConfig"]

_HALVES = ("chosen", "rejected")


class _Scores(NamedTuple):
    """Of some completions, in order: summed log-probability (nats) and number of tokens, `[N]` float64."""

    log_prob: Tensor
    tokens: Tensor

    @property
    def mean(self) -> Tensor:
        return self.log_prob / self.tokens.clamp(min=1)


class _Prompt(NamedTuple):
    index: int
    ids: tuple[int, ...]


@dataclass
class PreferencesEvalConfig(RowOptions):
    """The `preferences` evaluation.

    On the pairs (y_w, y_l) of a split: `preference_accuracy` (length-normalised log-prob of y_w above that of y_l: the
    f-DPO paper's), `preference_accuracy_sum` (summed log-probs), `reward_accuracy` (f-scored margin above 0; an exact
    tie, such as at the start of training, counts ½ in all three), `reward_margin` and `reward_margin_raw` (mean of
    β(f′(u_w) − f′(u_l)) and of β(log u_w − log u_l)), `ece_length_normalised`, `ece_margin` (see
    `fdiv.statistics.calibration`), `chosen_log_ratio` and `rejected_log_ratio` (mean log π − log π_ref: displacement).

    On samples: `divergence` (D_f(π‖π_ref) of the run's f) and `forward_kl` (KL(π_ref‖π)) from completions of π_ref,
    `reverse_kl` (KL(π‖π_ref)) from completions of π, each with `_se` over prompts; `reference_ess`, the effective
    fraction (Σt)²/(NΣt²) of the reference's samples under π: where it is small, `divergence` rests on few samples and
    is too low. `entropy` is the mean entropy of the next-token distribution on own samples (nats per token).
    Completions cut at `max_new_tokens` make the divergences those of the cut texts, a lower bound.

    With a `scorer`, also `score`, its mean on own samples with `score_se` over prompts, and their `distinct_n` and
    `self_bleu_n` (see `fdiv.statistics.diversity`).

    Args:
        split: Which split of the data; the recipe's test split is `test`.
        batch_size: Rows of a forward. No influence on the numbers but for rounding.
        max_rows: Use the first N pairs. None: all.
        max_prompts: Sample for the first N different prompts. None: all.
        num_samples: Completions per prompt and model; 0 leaves the sampled numbers out.
        max_new_tokens: Longest completion sampled.
        temperature: Of the own samples behind `entropy`. The divergences are always of the models at temperature 1.
        ece_bins: Bins of the calibration errors.
        min_used_fraction: Smallest share of the pairs that must be left, not dropped and not the same twice.
        scorer: What rates own samples, as in `fdiv.alignment.scorers.build_scorer`; None: nothing does.
    """

    split: str = "test"
    batch_size: int = 16
    max_rows: int | None = None
    max_prompts: int | None = 64
    num_samples: int = 1
    max_new_tokens: int = 64
    temperature: float = 1.0
    ece_bins: int = 10
    scorer: Any = None

    summary_metrics: ClassVar[tuple[str, ...]] = (
        "preference_accuracy",
        "reward_accuracy",
        "reverse_kl",
        "entropy",
        "ece_length_normalised",
        "ece_margin",
    )
    frontier: ClassVar[tuple[str, str]] = ("reverse_kl", "preference_accuracy")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, smallest in (("batch_size", 1), ("num_samples", 0), ("max_new_tokens", 1), ("ece_bins", 1)):
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {smallest}")
        for name in ("max_rows", "max_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1, or empty for all")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: must be above 0")
        if self.scorer is not None:
            from fdiv.alignment.scorers import build_scorer

            build_scorer(self.scorer)
            if not self.num_samples:
                raise ValueError("scorer rates own samples, of which num_samples=0 takes none: set num_samples")
        # What the reference says never changes in a run: measured at the first stage, used again at the second, where
        # a run with precomputed reference log-probs has no reference model any more.
        self._reference: dict[str, Any] = {}
        self._cache_dir: Path | None = None

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        datasets: Mapping[str, Dataset],
        context: EvalContext,
    ) -> dict[str, Any]:
        """Measure `model`; call it on all processes. Numbers that need a reference are None where there is none.

        Raises:
            DataError: a config without divergence and β, no such split, rows that are no preferences, a prompt too
                long for the model.
        """
        args = context.training_args
        missing = [
            name for name in ("divergence", "resolve_divergence", "beta", "max_exponent") if not hasattr(args, name)
        ]
        if missing:
            raise DataError(
                f"eval preferences: the config {type(args).__name__} has no {missing[0]!r}; rewards and divergences "
                "are those of f_dpo or d2o: leave this evaluation out"
            )
        rows = self._rows(tokenizer, datasets, context)
        alone = context.stage == "standalone" and "trainer" not in (context.extra or {})
        self._cache_dir = Path(context.output_dir) / "cache" if alone else None
        prompts = _unique_prompts(rows)[: self.max_prompts]
        policy = {half: self._score(model, rows, half) for half in _HALVES}
        with reference_of(model, context.reference_model, at_start=context.stage == "before") as reference:
            if reference is not None and "scores" not in self._reference:
                self._reference["scores"] = {half: self._score(reference, rows, half, "reference") for half in _HALVES}
                if self.num_samples:
                    samples = self._sample(reference, tokenizer, prompts, context.seed, 1.0, "reference")
                    log_prob = self._score_samples(reference, prompts, samples, "reference")[0]
                    self._reference["samples"] = samples, log_prob
        scored = self._reference.get("scores")
        metrics = _pair_metrics(policy, scored, context.training_args, self.ece_bins)
        if self.num_samples:
            metrics |= self._sampled_metrics(model, tokenizer, prompts, context)
        return metrics

    def _rows(self, tokenizer: Any, datasets: Mapping[str, Dataset], context: EvalContext) -> list[dict[str, Any]]:
        from fdiv.training.data_checks import (
            check_preference_dataset,
            encoding_of,
            preference_report,
            tokenize_preferences,
        )

        if self.split not in datasets:
            raise DataError(f"eval preferences: no split {self.split!r} in the data; it has {sorted(datasets)}")
        rows = datasets[self.split]
        read = len(rows)
        if self.max_rows is not None and self.max_rows < read:
            check_preference_dataset(rows, f"the {self.split} dataset", "eval preferences")
            rows = rows.select(range(self.max_rows))
        max_length = getattr(context.training_args, "max_length", None)
        tokenized = tokenize_preferences(
            rows,
            tokenizer,
            encoding=encoding_of(context.training_args),
            max_length=max_length,
            name=self.split,
            method="eval preferences",
        )
        report = preference_report(read, tokenized, max_length, f"preferences of {self.split}", read - len(rows))
        context.report_rows(report, self.min_used_fraction)
        keys = ("prompt_ids", "chosen_ids", "rejected_ids")
        cut = [{key: list(row[key]) for key in keys} for row in tokenized]
        for row in cut if max_length else ():  # as the training collator does
            for half in _HALVES:
                row[f"{half}_ids"] = row[f"{half}_ids"][: max_length - len(row["prompt_ids"])]
        return cut

    # ---------------------------------------------------------------- passes over the data
    def _digest(self, model: Any, role: str) -> str:
        """What is kept depends on the weights, and on the role: a model may be its own reference, its adapter off."""
        from fdiv.models.fingerprints import weights_fingerprint

        return "" if self._cache_dir is None else f"{role} {weights_fingerprint(model)}"

    def _texts(
        self,
        model: Any,
        texts: Sequence[tuple[Sequence[int], Sequence[int]]],
        token_level: bool,
        title: str,
        role: str,
    ):
        from accelerate.utils import extract_model_from_parallel

        from fdiv.inference.prompting import EncodedText
        from fdiv.inference.scoring import ScoringRequest, score_texts

        requests = [
            ScoringRequest(f"{i:08d}", EncodedText((*prompt, *completion), len(prompt)), token_level)
            for i, (prompt, completion) in enumerate(texts)
        ]
        model = extract_model_from_parallel(model)
        found = score_texts(
            model,
            requests,
            pad_id=0,
            batch_size=self.batch_size,
            title=title,
            cache_dir=self._cache_dir,
            model_digest=self._digest(model, role),
        )
        return [found[request.key] for request in requests]

    def _score(self, model: Any, rows: list[dict[str, Any]], half: str, role: str = "policy") -> _Scores:
        texts = [(row["prompt_ids"], row[f"{half}_ids"]) for row in rows]
        return _as_scores(self._texts(model, texts, False, f"scoring {half} completions", role))

    def _sample(
        self,
        model: Any,
        tokenizer: Any,
        prompts: list[_Prompt],
        seed: int,
        temperature: float,
        role: str = "policy",
    ):
        from fdiv.inference.cache import ItemCache, fingerprint
        from fdiv.inference.processes import process_state
        from fdiv.inference.sampling import SamplingRequest, sample_completions

        requests = [
            SamplingRequest(f"{prompt.index:08d}-{k:04d}", prompt.ids, self.max_new_tokens, stream=(prompt.index, k))
            for prompt in prompts
            for k in range(self.num_samples)
        ]
        asked = [[list(prompt.ids), self.num_samples, self.max_new_tokens] for prompt in prompts]
        number_type = str(next(model.parameters()).dtype)
        digest = fingerprint(self._digest(model, role), asked, temperature, seed, number_type, tokenizer.eos_token_id)
        drawn = sample_completions(
            model,
            tokenizer,
            requests,
            temperature=temperature,
            seed=seed,
            batch_size=self.batch_size,
            cache=ItemCache(self._cache_dir, "samples", digest, process_state().process_index),
        )
        return [drawn[request.key] for request in requests]

    def _score_samples(self, model: Any, prompts: list[_Prompt], samples: list[tuple[int, ...]], role: str = "policy"):
        """Log-probs `[prompts, num_samples]` of samples, and the next-token entropy averaged over all their tokens."""
        repeated = [prompt.ids for prompt in prompts for _ in range(self.num_samples)]
        records = self._texts(model, list(zip(repeated, samples, strict=True)), True, "scoring samples", role)
        entropies = torch.tensor([-value for record in records for value in record["mean"]], dtype=torch.float64)
        return _as_scores(records).log_prob.view(len(prompts), self.num_samples), entropies.mean().item()

    def _sampled_metrics(
        self, model: Any, tokenizer: Any, prompts: list[_Prompt], context: EvalContext
    ) -> dict[str, float | None]:
        own = self._sample(model, tokenizer, prompts, context.seed, self.temperature)
        own_log_prob, entropy = self._score_samples(model, prompts, own)
        texts = [
            {
                "prompt": tokenizer.decode(prompt.ids, skip_special_tokens=True),
                "completion": tokenizer.decode(own[index * self.num_samples], skip_special_tokens=True),
            }
            for index, prompt in enumerate(prompts)
        ]
        context.keep_examples("preferences", texts)
        metrics: dict[str, float | None] = {"entropy": entropy}
        if self.scorer is not None:
            metrics |= self._scored_samples(tokenizer, prompts, own)
        if self.temperature != 1.0:
            own = self._sample(model, tokenizer, prompts, context.seed, 1.0)
            own_log_prob, _ = self._score_samples(model, prompts, own)
        from_policy = None
        with reference_of(model, context.reference_model, at_start=context.stage == "before") as reference:
            if reference is not None:
                from_policy = own_log_prob - self._score_samples(reference, prompts, own, "reference")[0]
        from_reference = None
        if "samples" in self._reference:
            samples, reference_log_prob = self._reference["samples"]
            from_reference = self._score_samples(model, prompts, samples)[0] - reference_log_prob
        return metrics | _divergence_metrics(from_reference, from_policy, context.training_args)

    def _scored_samples(self, tokenizer: Any, prompts: list[_Prompt], samples: list[tuple[int, ...]]):
        """`score` ± `score_se` and the diversity of own samples; None where it has no value."""
        from fdiv.alignment.scorers import build_scorer, checked_scorer
        from fdiv.statistics.diversity import diversity
        from fdiv.statistics.estimates import mean_and_error

        texts = tokenizer.batch_decode(samples, skip_special_tokens=True)
        beginnings = tokenizer.batch_decode([prompt.ids for prompt in prompts], skip_special_tokens=True)
        repeated = [beginning for beginning in beginnings for _ in range(self.num_samples)]
        scores = checked_scorer(build_scorer(self.scorer))(prompts=repeated, completions=texts)
        per_prompt = torch.tensor(scores, dtype=torch.float64).view(len(prompts), self.num_samples).mean(1)
        mean, error = mean_and_error(per_prompt)
        metrics = {"score": mean, "score_se": error, **diversity(texts, max_texts=500)}
        return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _as_scores(records: list[dict[str, Any]]) -> _Scores:
    tokens = torch.tensor([record["labels"] for record in records], dtype=torch.float64)
    mean_loss = torch.tensor([record["avg_loss"] or 0.0 for record in records], dtype=torch.float64)
    return _Scores(-mean_loss * tokens, tokens)


def _unique_prompts(rows: list[dict[str, Any]]) -> list[_Prompt]:
    """The different prompts in order of appearance; the index (among them) names the random stream."""
    unique = dict.fromkeys(tuple(row["prompt_ids"]) for row in rows)
    return [_Prompt(index, ids) for index, ids in enumerate(ids for ids in unique if ids)]


def _accuracy(margin: Tensor) -> float:
    return ((margin > 0).double() + 0.5 * (margin == 0).double()).mean().item()


def _pair_metrics(
    policy: dict[str, _Scores], reference: dict[str, _Scores] | None, args: Any, bins: int
) -> dict[str, float | None]:
    chosen, rejected = policy["chosen"], policy["rejected"]
    metrics: dict[str, float | None] = {
        "preference_accuracy": _accuracy(chosen.mean - rejected.mean),
        "preference_accuracy_sum": _accuracy(chosen.log_prob - rejected.log_prob),
        "ece_length_normalised": length_normalised_calibration(chosen.mean, rejected.mean, bins),
    }
    if reference is None:
        none = ("reward_accuracy", "reward_margin", "reward_margin_raw", "ece_margin")
        return metrics | dict.fromkeys([*none, *(f"{half}_log_ratio" for half in _HALVES)])
    log_ratio = {half: policy[half].log_prob - reference[half].log_prob for half in _HALVES}
    divergence = args.resolve_divergence()
    rewards = {half: args.beta * divergence.score(value, args.max_exponent) for half, value in log_ratio.items()}
    margin = rewards["chosen"] - rewards["rejected"]
    return metrics | {
        "reward_accuracy": _accuracy(margin),
        "reward_margin": margin.mean().item(),
        "reward_margin_raw": args.beta * (log_ratio["chosen"] - log_ratio["rejected"]).mean().item(),
        "ece_margin": margin_calibration(margin, bins),
        **{f"{half}_log_ratio": value.mean().item() for half, value in log_ratio.items()},
    }


def _divergence_metrics(from_reference: Tensor | None, from_policy: Tensor | None, args: Any) -> dict[str, Any]:
    """Divergences from log π − log π_ref `[prompts, samples]` on samples of π_ref and of π."""
    from fdiv.statistics.estimates import divergence_estimate

    forward_kl = get_divergence("forward_kl")
    metrics: dict[str, Any] = {}
    for name, divergence, log_ratio in (
        ("divergence", get_divergence(args.divergence), from_reference),
        ("forward_kl", forward_kl, from_reference),
        # KL(π‖π_ref) is the forward KL with the two models in each other's place, samples of π with 1/t.
        ("reverse_kl", forward_kl, None if from_policy is None else -from_policy),
    ):
        estimate = (None, None) if log_ratio is None else divergence_estimate(divergence, log_ratio)
        metrics[name], metrics[f"{name}_se"] = (None, None) if estimate[0] != estimate[0] else estimate
    metrics["reference_ess"] = None
    if from_reference is not None:
        flat = from_reference.flatten()
        metrics["reference_ess"] = (2 * flat.logsumexp(0) - (2 * flat).logsumexp(0)).exp().item() / len(flat)
    return metrics
