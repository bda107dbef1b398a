"""The run of a benchmark on one model: score once, generate once, and hand everything to the benchmark's own
arithmetic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from fdiv.errors import DataError
from fdiv.eval.benchmark.aggregation import Aggregates, check_retain_log
from fdiv.eval.benchmark.attacked.run import run_attacks
from fdiv.eval.benchmark.log import EvalLog, read_eval_log, write_eval_log
from fdiv.eval.benchmark.output import keep_examples
from fdiv.eval.benchmark.presets import get_preset
from fdiv.eval.benchmark.rows import selected_rows
from fdiv.eval.benchmark.settings import EvaluationSettings
from fdiv.eval.metrics.gradient_norms import gradient_norms
from fdiv.inference.greedy import GenerationRequest, draft_from_scores, generate_texts, generates_plain_argmax
from fdiv.inference.processes import process_state
from fdiv.inference.scoring import ScoringRequest, score_texts
from fdiv.rows.report import RowReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fdiv.evaluation import EvalContext

__all__ = ["Generator", "ModelEvaluation", "evaluate_in_memory", "evaluation_mode", "selected_rows"]

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


@contextmanager
def evaluation_mode(model: Any):
    """Dropout off inside, the former mode restored after."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def evaluate_in_memory(
    evaluation_class: type[ModelEvaluation],
    config: EvaluationSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: EvalContext,
) -> dict[str, Any]:
    """Evaluate the model of a run; the main process writes `NAME_STAGE/NAME_EVAL.json`.

    A reference model in the context serves the Reference attack where no `reference_model` is named. Attacks on the
    unlearned model are made after training, not before.

    Returns:
        The values by name, None where one is not defined, and under `notes` the reasons.
    """
    run = evaluation_class(config, tokenizer)
    for report in run.row_reports(model):
        context.report_rows(report, config.min_used_fraction)
    run.retain_log()
    reference = run.load_reference() or context.reference_model
    result = run.aggregate(run.run(model, reference_model=reference, attacks=context.stage != "before"))
    if process_state().is_main_process:
        name = run.benchmark
        folder = Path(context.output_dir) / f"{name}_{context.stage}"
        write_eval_log(folder / f"{name.upper()}_EVAL.json", result.log)
    keep_examples(result.log, context)
    return {**result.values, "notes": dict(result.notes)}


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

    attacked_metrics: ClassVar[tuple[str, ...]] = ()
    """Per-item metrics that are kept of what is measured under attack."""

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
        self.salt = ""  # what the values of the cached items depend on beside the weights
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
    def attack_rows(self) -> list[dict[str, Any]]:
        """The forget rows as attacks take them, under the columns they were read from."""

    @abstractmethod
    def attack_context(self) -> dict[str, Any]:
        """What attacks may ask for (`fdiv.eval.unlearning.attacks.build_attack`): prompt format, neighbours."""

    @abstractmethod
    def attack_row(self, key: str) -> int | None:
        """Number among `attack_rows` of the row that a request of the plan is about; None: it is no forget row."""

    @abstractmethod
    def under_attack(self, rows: Sequence[Mapping[str, Any]], chosen: Sequence[int], weights: bool) -> ModelEvaluation:
        """This evaluation with a plan for the attacked rows of these numbers; where the weights were attacked, with a
        measure of what is retained."""

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
            from fdiv.models.loading import check_vocabulary, load_model

            check_vocabulary(self.config.retain_model, self.tokenizer, "retain_model")
            model = load_model(self.config.retain_model)
            self._retain = self.run(model, likelihood_only=True, title="retain model")
        return self._retain

    def load_reference(self) -> PreTrainedModel | None:
        """The Reference attack's model: the one named, else the retain model, else None."""
        from fdiv.models.loading import check_vocabulary, load_model

        name = self.config.reference_model or self.config.retain_model
        if not name:
            return None
        check_vocabulary(name, self.tokenizer, "reference_model")
        return load_model(name)

    def run(
        self,
        model: PreTrainedModel,
        *,
        reference_model: PreTrainedModel | None = None,
        generator: Generator | None = None,
        likelihood_only: bool = False,
        attacks: bool = True,
        title: str = "model",
    ) -> EvalLog:
        """Score and generate; call it on all processes, every one gets the whole log.

        Args:
            model: on its device; put in eval mode here and back after.
            reference_model: of the Reference attack; None leaves that attack out, with the reason in the log.
            generator: another generation back end; None generates with `model`.
            likelihood_only: only what a retain log needs.
            attacks: False leaves the attacks of the settings out.
            title: prefix of the progress bars.
        """
        plan, stamp = self.plan, self.stamp(model)
        missing = stamp["missing"]
        generations = reference = gradnorms = None
        with evaluation_mode(model):
            records = self.score(model, plan.likelihoods() if likelihood_only else plan.scoring, f"{title}: scoring")
            if not likelihood_only:
                if self.config.generate:
                    if generator:
                        generations = generator(plan.generation)
                    else:
                        generations = self.generate(model, title, records)
                gradnorms = self._gradnorms(model, missing, title)
            attacked: dict[str, dict[str, Any]] = {}
            if attacks and self.config.attacks:
                attacked, stamp["attacks"], reasons = run_attacks(self, model, title)
                missing |= reasons
        if "holdout" in self.missing:
            attacks = ("loss", "zlib", "reference", "min_k", "min_k_plus_plus", "gradnorm")
            missing |= {f"mia_{attack}": self.missing["holdout"] for attack in attacks}
        elif reference_model is None:
            missing["mia_reference"] = "no reference model was given (--reference_model or --retain_model)"
        elif not likelihood_only:
            with evaluation_mode(reference_model):
                reference = self.score(reference_model, plan.attacked(), "reference model: scoring")
        metrics = self.build_metrics(records, generations, reference, gradnorms) | attacked
        if not likelihood_only:
            self._classify(metrics, missing)
        return EvalLog(metrics, self.benchmark, self.preset.name, title, stamp)

    def cache_of(self, model: PreTrainedModel) -> dict[str, Any]:
        """Where items of this model are kept, as arguments of the passes."""
        from fdiv.models.fingerprints import weights_fingerprint

        digest = weights_fingerprint(model) + self.salt if self.cache_dir is not None else ""
        return {"cache_dir": self.cache_dir, "model_digest": digest, "progress": self.progress}

    def score(self, model: PreTrainedModel, requests: Sequence[ScoringRequest], title: str) -> Records:
        """`score_texts` under these settings."""
        pad_id = self.tokenizer.pad_token_id
        return score_texts(
            model,
            requests,
            pad_id=0 if pad_id is None else pad_id,
            batch_size=self.config.batch_size,
            padding_side=self.config.padding_side,
            title=title,
            **self.cache_of(model),
        )

    def _generate(self, model: PreTrainedModel, title: str, requests: Sequence[GenerationRequest]) -> Records:
        size, title = self.config.generation_batch_size, f"{title}: generating"
        cache = self.cache_of(model)
        return generate_texts(model, self.tokenizer, requests, batch_size=size, title=title, **cache)

    def generate(self, model: PreTrainedModel, title: str, records: Records) -> Records:
        """Greedy answers to the plan's prompts; what scoring told of them already is not generated again."""
        return self._generate(model, title, self._drafted(model, records))

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
        return gradient_norms(model, self.plan.attacked(), drop_last_label=drop, title=title, **self.cache_of(model))

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
