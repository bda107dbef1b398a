"""The run of a benchmark on one model: score once, generate once, and hand everything to the benchmark's own
arithmetic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from fdiv.errors import DataError
from fdiv.eval.benchmark.aggregation import Aggregates, check_retain_log
from fdiv.eval.benchmark.log import EvalLog, read_eval_log
from fdiv.eval.benchmark.presets import get_preset
from fdiv.eval.benchmark.settings import EvaluationSettings
from fdiv.eval.metrics.gradient_norms import gradient_norms
from fdiv.inference.greedy import GenerationRequest, draft_from_scores, generate_texts, generates_plain_argmax
from fdiv.inference.scoring import ScoringRequest, score_texts
from fdiv.rows.report import RowReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Generator", "ModelEvaluation", "evaluation_mode", "selected_rows"]

Records = Mapping[str, Mapping[str, Any]]
Generator = Callable[[Sequence[GenerationRequest]], Records]
"""A generation back end bound to its model: requests in, records by key out."""


class _Plan(Protocol):
    scoring: list[ScoringRequest]
    generation: list[GenerationRequest]

    def attacked(self) -> list[ScoringRequest]: ...
    def likelihoods(self) -> list[ScoringRequest]: ...
    def empty_log(self) -> EvalLog: ...
    def scored_answer(self, key: str) -> str | None: ...


def selected_rows(count: int, max_rows: int | None, max_items: int | None) -> list[int]:
    """Row indices that count: the preset's first `max_rows`, thinned evenly to `max_items`."""
    count = count if max_rows is None else min(count, max_rows)
    if max_items is None or max_items >= count:
        return list(range(count))
    return sorted({int(i) for i in np.linspace(0, count - 1, max_items).round()})


@contextmanager
def evaluation_mode(model: Any):
    """Dropout off inside, the former mode restored after."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class ModelEvaluation(ABC):
    """One evaluation. Rows and requests are made, and a retain log is checked, before any model is loaded.

    Args:
        config: the settings.
        tokenizer: the evaluated model's.
        cache_dir: where finished items are kept for a continued run (None: nowhere).
        progress: show progress bars.
    """

    benchmark: ClassVar[str]
    retain_metric: str
    """The metric whose rows a retain log must share."""
    fluency: ClassVar[tuple[str, str, int]]
    """Metric with the generations, name of the classifier's metric, tokens of a generation it reads."""

    plan: _Plan
    missing: dict[str, str]
    """Why row sets are absent, by set; a `holdout` entry switches the attacks off."""

    def __init__(
        self,
        config: EvaluationSettings,
        tokenizer: PreTrainedTokenizerBase,
        cache_dir: Path | None = None,
        progress: bool = True,
    ):
        self.config, self.tokenizer, self.cache_dir, self.progress = config, tokenizer, cache_dir, progress
        self.preset = get_preset(config.preset)
        self._retain: EvalLog | None = None
        self._prepare()
        if config.retain_logs:
            self._retain = read_eval_log(config.retain_logs, self.benchmark)
            empty = self.plan.empty_log()
            empty.stamp = self.stamp(None)
            check_retain_log(empty, self._retain, self.retain_metric)

    @abstractmethod
    def _prepare(self) -> None:
        """Load rows and set `plan` and `missing`."""

    @abstractmethod
    def row_stamp(self) -> dict[str, Any]:
        """What identifies the rows: `split`, `forget_rows`, …"""

    @abstractmethod
    def row_reports(self, model: PreTrainedModel) -> list[RowReport]:
        """What became of the rows of each set, for a model with its context."""

    @abstractmethod
    def build_metrics(
        self, records: Records, generations: Records | None, reference: Records | None, gradnorms: Records | None
    ) -> dict[str, dict[str, Any]]:
        """The metric tree of per-item values from the passes' results."""

    @abstractmethod
    def aggregate(self, log: EvalLog) -> Aggregates:
        """Aggregates of a log of this evaluation against its retain log."""

    def stamp(self, model: PreTrainedModel | None) -> dict[str, Any]:
        """What is written about the run into its log."""
        from fdiv import __version__
        from fdiv.models.fingerprints import tokenizer_fingerprint

        config = self.config
        stamp: dict[str, Any] = {
            "fdiv_version": __version__,
            **self.row_stamp(),
            "use_stemmer": self.preset.use_stemmer,
            "max_items": config.max_items,
            "prompt": config.prompt().stamp(self.tokenizer),
            "definitions": self.preset.describe(),
            "missing": dict(self.missing),
        }
        if model is not None:
            stamp |= {"model": model.config._name_or_path, "dtype": str(next(model.parameters()).dtype)}
            stamp["tokenizer"] = tokenizer_fingerprint(self.tokenizer)
        return stamp

    def retain_log(self) -> EvalLog | None:
        """The retain log given, or the one of the retain model named, which is loaded and scored for it."""
        if self._retain is None and self.config.retain_model:
            from fdiv.models.loading import load_model

            model = load_model(self.config.retain_model)
            self._retain = self.run(model, likelihood_only=True, title="retain model")
        return self._retain

    def load_reference(self) -> PreTrainedModel | None:
        """The Reference attack's model: the one named, else the retain model, else None."""
        from fdiv.models.loading import load_model

        name = self.config.reference_model or self.config.retain_model
        return load_model(name) if name else None

    def run(
        self,
        model: PreTrainedModel,
        *,
        reference_model: PreTrainedModel | None = None,
        generator: Generator | None = None,
        likelihood_only: bool = False,
        title: str = "model",
    ) -> EvalLog:
        """Score and generate; call it on all processes, every one gets the whole log.

        Args:
            model: on its device; put in eval mode here and back after.
            reference_model: of the Reference attack; None leaves that attack out, with the reason in the log.
            generator: another generation back end; None generates with `model`.
            likelihood_only: only what a retain log needs.
            title: prefix of the progress bars.
        """
        plan, stamp = self.plan, self.stamp(model)
        missing = stamp["missing"]
        generations = reference = gradnorms = None
        with evaluation_mode(model):
            records = self._score(model, plan.likelihoods() if likelihood_only else plan.scoring, f"{title}: scoring")
            if not likelihood_only:
                if self.config.generate:
                    if generator:
                        generations = generator(plan.generation)
                    else:
                        generations = self._generate(model, title, self._drafted(model, records))
                gradnorms = self._gradnorms(model, missing, title)
        if "holdout" in self.missing:
            attacks = ("loss", "zlib", "reference", "min_k", "min_k_plus_plus", "gradnorm")
            missing |= {f"mia_{attack}": self.missing["holdout"] for attack in attacks}
        elif reference_model is None:
            missing["mia_reference"] = "no reference model was given (--reference_model or --retain_model)"
        elif not likelihood_only:
            with evaluation_mode(reference_model):
                reference = self._score(reference_model, plan.attacked(), "reference model: scoring")
        metrics = self.build_metrics(records, generations, reference, gradnorms)
        if not likelihood_only:
            self._classify(metrics, missing)
        return EvalLog(metrics, self.benchmark, self.preset.name, title, stamp)

    def _cache(self, model: PreTrainedModel) -> dict[str, Any]:
        from fdiv.models.fingerprints import weights_fingerprint

        digest = weights_fingerprint(model) if self.cache_dir is not None else ""
        return {"cache_dir": self.cache_dir, "model_digest": digest, "progress": self.progress}

    def _score(self, model: PreTrainedModel, requests: Sequence[ScoringRequest], title: str) -> Records:
        pad_id = self.tokenizer.pad_token_id
        return score_texts(
            model,
            requests,
            pad_id=0 if pad_id is None else pad_id,
            batch_size=self.config.batch_size,
            padding_side=self.config.padding_side,
            title=title,
            **self._cache(model),
        )

    def _generate(self, model: PreTrainedModel, title: str, requests: Sequence[GenerationRequest]) -> Records:
        size, title = self.config.generation_batch_size, f"{title}: generating"
        cache = self._cache(model)
        return generate_texts(model, self.tokenizer, requests, batch_size=size, title=title, **cache)

    def _drafted(self, model: PreTrainedModel, records: Records) -> list[GenerationRequest]:
        """The plan's generations, with as much of each as scoring the true answer already told."""
        if not generates_plain_argmax(model):
            return self.plan.generation
        scored = {request.key: request.text for request in self.plan.scoring}
        sources = {request.key: self.plan.scored_answer(request.key) for request in self.plan.generation}
        return [
            draft_from_scores(request, scored[source], records[source]["is_top1"])
            if (source := sources[request.key]) in scored
            else request
            for request in self.plan.generation
        ]

    def _gradnorms(self, model: PreTrainedModel, missing: dict[str, str], title: str) -> Records | None:
        from transformers.integrations import is_deepspeed_zero3_enabled

        reason = None
        if not self.config.gradnorm:
            reason = "switched off (gradnorm: false)"
        elif "holdout" in self.missing:
            reason = self.missing["holdout"]
        elif is_deepspeed_zero3_enabled():
            reason = "per-text gradients are not available under ZeRO-3"
        elif any(p.grad is not None for p in model.parameters()):
            reason = "the model holds gradients of a training step in progress, which GradNorm would clear"
        elif not any(p.requires_grad for p in model.parameters()):
            reason = "all parameters are frozen"
        if reason is not None:
            missing["mia_gradnorm"] = reason
            return None
        drop, title = self.preset.drop_last_label, f"{title}: gradient norms"
        return gradient_norms(model, self.plan.attacked(), drop_last_label=drop, title=title, **self._cache(model))

    def _classify(self, metrics: dict[str, Any], missing: dict[str, str]) -> None:
        from fdiv.eval.metrics.gibberish import clean_text_probability

        source, name, max_length = self.fluency
        rows = metrics.get(source, {}).get("value_by_index", {})
        classifier = self.config.fluency_classifier
        if classifier == "none" or not rows:
            missing[name] = "switched off (fluency_classifier: none)" if rows else "nothing was generated"
            return
        try:
            scores = clean_text_probability(
                [r["generation"] for r in rows.values()], classifier, max_length=max_length
            )
        except DataError as error:
            missing[name] = str(error)
            return
        metrics[name] = {"value_by_index": {i: {"score": s} for i, s in zip(rows, scores, strict=True)}}
