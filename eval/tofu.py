"""TOFU evaluation of one model: one scoring pass, one generation pass, every metric.

log = TofuEvaluation(TofuEvalConfig(split="forget10", data="path/to/tofu")).run(model, tokenizer)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fdiv.errors import DataError
from fdiv.eval.aggregation import Aggregates, check_retain_log
from fdiv.eval.context import EvalContext
from fdiv.eval.eval_log import EvalLog, read_eval_log, write_eval_log
from fdiv.eval.generation import GenerationRequest, generate_texts
from fdiv.eval.presets import get_preset
from fdiv.eval.prompting import PromptFormat
from fdiv.eval.scoring import ScoringRequest, gradient_norms, score_texts
from fdiv.eval.tofu_aggregate import aggregate_tofu
from fdiv.eval.tofu_data import HUB_DATASET, TofuRows, load_tofu_rows
from fdiv.eval.tofu_plan import TofuPlan, build_metrics, plan_tofu

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Generator", "TofuEvalConfig", "TofuEvaluation", "evaluation_mode"]

Generator = Callable[[Sequence[GenerationRequest]], Mapping[str, Mapping[str, Any]]]
"""A generation back end bound to its model: requests in, records by key out."""


@contextmanager
def evaluation_mode(model: Any):
    """Dropout off inside, the former mode restored after."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@dataclass
class TofuEvalConfig:
    """Settings of a TOFU evaluation; as `eval: {name: tofu, …}` of a recipe it runs before and after training.

    Args:
        split: forget split, `forget01`, `forget05`, `forget10`, or any NAME with a `NAME_perturbed` set.
        data: hub dataset or local folder (see `fdiv.eval.tofu_data`).
        holdout: holdout set for the membership attacks; by default the split's own.
        preset: `open_unlearning`, `tofu_paper` or `tofu_2024`.
        retain_logs: `*_EVAL.json` of the retain model: forget quality and PrivLeak compare with it.
        retain_model: a retain model to evaluate instead of a log.
        reference_model: model of the Reference attack; by default the retain model.
        batch_size: rows of a scoring forward.
        generation_batch_size: prompts generated at once.
        padding_side: of the scoring batches; the numbers do not depend on it.
        max_items: keep so many evenly spaced rows of every set (None: all): a cheap subset to select epochs by.
        generate: False skips the generation pass, and with it ROUGE and model utility.
        gradnorm: False skips the GradNorm attack, which needs one backward per text.
        fluency_classifier: `auto`, a path or hub name, or `none` (see `fdiv.eval.gibberish`).
        chat_template, question_format, answer_format, system_prompt, date_string: see `PromptFormat`.
    """

    summary_metrics: ClassVar[tuple[str, ...]] = (
        *("forget_quality", "model_utility", "forget_truth_ratio", "forget_Q_A_ROUGE", "retain_Q_A_ROUGE"),
        *("extraction_strength", "privleak", "forget_ngram_entropy"),
    )
    lower_is_better: ClassVar[tuple[str, ...]] = (
        *("forget_Q_A_ROUGE", "forget_Q_A_Prob", "extraction_strength", "exact_memorization"),
    )

    split: str = "forget10"
    data: str = HUB_DATASET
    holdout: str | None = None
    preset: str = "open_unlearning"
    retain_logs: str | None = None
    retain_model: str | None = None
    reference_model: str | None = None
    batch_size: int = 32
    generation_batch_size: int = 64
    padding_side: Literal["right", "left"] = "right"
    max_items: int | None = None
    generate: bool = True
    gradnorm: bool = True
    fluency_classifier: str = "auto"
    chat_template: Literal["auto", "always", "never"] = "auto"
    question_format: str = PromptFormat.question_format
    answer_format: str = PromptFormat.answer_format
    system_prompt: str | None = None
    date_string: str | None = None

    def __post_init__(self):
        get_preset(self.preset)
        if self.preset == "muse_original":
            raise DataError("preset muse_original defines MUSE's metrics: use it with `fdiv eval muse`")
        if self.retain_logs and self.retain_model:
            raise DataError("give retain_logs or retain_model, not both")
        if self.max_items is not None and self.max_items < 1:
            raise DataError(f"max_items={self.max_items}: must be at least 1")
        if self.padding_side not in ("right", "left"):
            raise DataError(f"padding_side={self.padding_side!r}: choose right or left")
        self.prompt()

    def prompt(self) -> PromptFormat:
        """The prompt format these settings describe."""
        return PromptFormat(
            chat_template=self.chat_template,
            question_format=self.question_format,
            answer_format=self.answer_format,
            system_prompt=self.system_prompt,
            date_string=self.date_string,
        )

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, datasets: Any, context: EvalContext
    ) -> dict[str, float | None]:
        """Evaluate a model in memory (the recipe's `eval:` step); also writes `tofu_STAGE/TOFU_EVAL.json`.

        `datasets` is not used: TOFU's rows come from `data`. A reference model in the context serves the Reference
        attack when no `reference_model` is named.
        """
        from accelerate import PartialState

        run = TofuEvaluation(self, tokenizer)
        retain = run.retain_log()
        log = run.run(model, reference_model=run.load_reference() or context.reference_model)
        result = aggregate_tofu(log, run.preset, retain)
        if PartialState().is_main_process:
            write_eval_log(Path(context.output_dir) / f"tofu_{context.stage}" / "TOFU_EVAL.json", result.log)
        return dict(result.values)


@dataclass
class TofuEvaluation:
    """One evaluation: rows and requests are made, and a retain log is checked, before any model is loaded.

    Args:
        config: the settings.
        tokenizer: the evaluated model's.
        cache_dir: where finished items are kept for a continued run (None: nowhere).
        progress: show progress bars.
    """

    config: TofuEvalConfig
    tokenizer: PreTrainedTokenizerBase
    cache_dir: Path | None = None
    progress: bool = True
    rows: TofuRows = field(init=False)
    plan: TofuPlan = field(init=False)

    def __post_init__(self):
        config = self.config
        self.preset = get_preset(config.preset)
        self.rows = load_tofu_rows(config.split, config.data, config.holdout)
        self.plan = plan_tofu(self.rows, self.tokenizer, config.prompt(), self.preset, config.max_items)
        self._retain: EvalLog | None = None
        if config.retain_logs:
            self._retain = read_eval_log(config.retain_logs, "tofu")
            keys = self.plan.forget_keys()
            keys.stamp = self._stamp(None)
            check_retain_log(keys, self._retain, "forget_Q_A_PARA_Prob")

    def _stamp(self, model: PreTrainedModel | None) -> dict[str, Any]:
        from fdiv import __version__

        config = self.config
        stamp: dict[str, Any] = {
            "fdiv_version": __version__,
            "split": config.split,
            "forget_rows": self.rows.forget_digest(),
            "use_stemmer": self.preset.use_stemmer,
            "max_items": config.max_items,
            "prompt": config.prompt().__dict__,
            "definitions": self.preset.describe(),
            "missing": dict(self.rows.missing),
        }
        if model is not None:
            stamp |= {"model": model.config._name_or_path, "dtype": str(next(model.parameters()).dtype)}
        return stamp

    def retain_log(self) -> EvalLog | None:
        """The retain log given, or the one of the retain model named, which is loaded and scored for it."""
        if self._retain is None and self.config.retain_model:
            from fdiv.eval.model_loading import load_model

            model = load_model(self.config.retain_model)
            self._retain = self.run(model, likelihood_only=True, title="retain model")
        return self._retain

    def load_reference(self) -> PreTrainedModel | None:
        """The Reference attack's model: the one named, else the retain model, else None."""
        from fdiv.eval.model_loading import load_model

        name = self.config.reference_model or self.config.retain_model
        return load_model(name) if name else None

    def _score(self, model: PreTrainedModel, requests: Sequence[ScoringRequest], title: str):
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

    def _cache(self, model: PreTrainedModel) -> dict[str, Any]:
        from fdiv.eval.model_loading import model_fingerprint

        digest = model_fingerprint(model) if self.cache_dir is not None else ""
        return {"cache_dir": self.cache_dir, "model_digest": digest, "progress": self.progress}

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
        plan, config, stamp = self.plan, self.config, self._stamp(model)
        missing = stamp["missing"]
        generations = reference = gradnorms = None
        with evaluation_mode(model):
            records = self._score(model, plan.likelihoods() if likelihood_only else plan.scoring, f"{title}: scoring")
            if not likelihood_only:
                if config.generate:
                    generations = generator(plan.generation) if generator else self._generate(model, title)
                gradnorms = self._gradnorms(model, missing, title)
        if likelihood_only or not plan.rows.holdout:
            pass
        elif reference_model is None:
            missing["mia_reference"] = "no reference model was given (--reference_model or --retain_model)"
        else:
            with evaluation_mode(reference_model):
                reference = self._score(reference_model, plan.attacked(), "reference model: scoring")
        metrics = build_metrics(plan, records, generations, reference, gradnorms)
        if not plan.rows.holdout:
            missing |= {f"mia_{a}": plan.rows.missing["holdout"] for a in ("loss", "zlib", "min_k", "min_k_plus_plus")}
        if not likelihood_only:
            self._fluency(metrics, missing)
        return EvalLog(metrics, "tofu", self.preset.name, title, stamp)

    def _generate(self, model: PreTrainedModel, title: str):
        size = self.config.generation_batch_size
        return generate_texts(
            model,
            self.tokenizer,
            self.plan.generation,
            batch_size=size,
            title=f"{title}: generating",
            **self._cache(model),
        )

    def _gradnorms(self, model: PreTrainedModel, missing: dict[str, str], title: str):
        from transformers.integrations import is_deepspeed_zero3_enabled

        reason = None
        if not self.config.gradnorm:
            reason = "switched off (gradnorm: false)"
        elif not self.plan.rows.holdout:
            reason = self.plan.rows.missing["holdout"]
        elif is_deepspeed_zero3_enabled():
            reason = "per-text gradients are not available under ZeRO-3"
        elif any(p.grad is not None for p in model.parameters()):
            reason = "the model holds gradients of a training step in progress, which GradNorm would clear"
        elif not any(p.requires_grad for p in model.parameters()):
            reason = "all parameters are frozen"
        if reason is not None:
            missing["mia_gradnorm"] = reason
            return None
        return gradient_norms(
            model,
            self.plan.attacked(),
            drop_last_label=self.preset.drop_last_label,
            title=f"{title}: gradient norms",
            **self._cache(model),
        )

    def _fluency(self, metrics: dict[str, Any], missing: dict[str, str]) -> None:
        from fdiv.eval.gibberish import clean_text_probability

        name, rows = "forget_Q_A_gibberish", metrics.get("forget_Q_A_ROUGE", {}).get("value_by_index", {})
        if self.config.fluency_classifier == "none" or not rows:
            missing[name] = "switched off (fluency_classifier: none)" if rows else "nothing was generated"
            return
        try:
            scores = clean_text_probability([r["generation"] for r in rows.values()], self.config.fluency_classifier)
        except DataError as error:
            missing[name] = str(error)
            return
        metrics[name] = {"value_by_index": {i: {"score": s} for i, s in zip(rows, scores, strict=True)}}

    def aggregate(self, log: EvalLog) -> Aggregates:
        """Aggregates of a log of this evaluation against its retain log."""
        return aggregate_tofu(log, self.preset, self._retain)
