"""Evaluation while training: any `eval:` block at every `eval_strategy`, with random numbers of its own.

`metric_for_best_model`, `load_best_model_at_end` and `early_stopping_patience` work on its numbers (`eval_pass@8`,
say), for they are returned from `Trainer.evaluate` like those of the trainer's own evaluation; and on what the
training logs (`group/pass@8`, `entropy`), by the last value before the evaluation.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from fdiv.bounds import check_fields
from fdiv.bounds.blocks import SHARED
from fdiv.catalog import EVALUATIONS
from fdiv.errors import OptionError, RecipeError
from fdiv.evaluation import EvalContext
from fdiv.named import check_keys, split_spec
from fdiv.recipe.schema import coerce, section_of
from fdiv.training.config import option

__all__ = [
    "EvaluationOptions",
    "PeriodicEvaluationMixin",
    "build_evaluation",
    "evaluated",
    "preserved_random_state",
]


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Whatever is sampled inside, the random streams outside go on unchanged: an evaluation must not change
    the training it looks at."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@dataclass
class EvaluationOptions:
    """The keys of an evaluation while training. Put it before TRL's config in the bases.

    Raises:
        ValueError: no mapping, an unknown evaluation or setting; no `eval_strategy`; early stopping without a metric.
    """

    epoch_evaluation: dict[str, Any] | str | None = option(
        None, "An evaluation, as in the block `eval:`, to run at every eval_strategy: {name: tofu, max_items: 40, …}"
    )
    early_stopping_patience: int | None = option(
        None, "Stop when metric_for_best_model has not improved in this many evaluations", least=1
    )

    stop_at: float | None = option(None, "Stop at the first evaluation whose metric_for_best_model reaches this")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("early_stopping_patience", "stop_at"):
            if getattr(self, name) is not None and not self.metric_for_best_model:
                raise ValueError(
                    f"{name}={getattr(self, name)} needs metric_for_best_model, which says what has to improve"
                )
        if self.epoch_evaluation is None:
            return
        if not isinstance(self.epoch_evaluation, Mapping):
            raise ValueError(f"epoch_evaluation={self.epoch_evaluation!r}: give a mapping with a name")
        if self.eval_strategy == "no":
            raise ValueError("epoch_evaluation is set but eval_strategy is no: set eval_strategy to epoch or steps")
        build_evaluation(self.epoch_evaluation, self)


def build_evaluation(spec: Mapping[str, Any], training: Any = None) -> Any:
    """The evaluation that `{name: …, settings…}` names, as in a recipe's `eval:` block.

    Where the settings do not say, rows are encoded as in `training`, the config it belongs to.

    Raises:
        ValueError: no or an unknown name, a setting it does not have or refuses.
    """
    name, settings = split_spec(spec, "epoch_evaluation")
    evaluation = EVALUATIONS.find(name, "epoch_evaluation")
    section = section_of(evaluation, "epoch_evaluation")
    check_keys(settings, section.keys, f"epoch_evaluation ({name})", "key")
    missing = [key.name for key in section.keys.values() if key.required and key.name not in settings]
    if missing:
        raise OptionError(f"epoch_evaluation ({name}): {missing[0]!r} is missing", "epoch_evaluation")
    try:
        given = {key: coerce(value, section.keys[key], "epoch_evaluation") for key, value in settings.items()}
        made = evaluation(**given)
        check_fields(made, SHARED)
    except (ValueError, TypeError, RecipeError) as error:
        raise OptionError(f"epoch_evaluation ({name}): {error}", "epoch_evaluation") from error
    return made


def evaluated(trainer: Any, evaluation: Any, datasets: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run `evaluation` on the trainer's current model; what it returns.

    Its random numbers follow from the run's `seed` alone, so that every evaluation of a run sees the same ones, and
    training goes on as if there had been none.

    Args:
        trainer: a `transformers.Trainer`.
        evaluation: see `fdiv.catalog.EVALUATIONS`.
        datasets: split → untokenised rows.
    """
    args, model = trainer.args, trainer.model
    folder = Path(args.output_dir) / "epoch_evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    context = EvalContext(
        args, folder, seed=args.seed, stage="standalone", extra={"trainer": trainer}, row_reports=trainer.row_reports
    )
    training = model.training
    model.eval()
    try:
        with preserved_random_state(), torch.no_grad():
            return dict(evaluation.evaluate(model, trainer.processing_class, datasets or {}, context))
    finally:
        model.train(training)


class _StopAt(TrainerCallback):
    """Ends the training at the first evaluation, after a step was made, whose metric has reached `value`; one that is
    gone on with after that is at its end."""

    def __init__(self, value: float) -> None:
        self.value = value

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done = [entry for entry in state.log_history if 0 < entry.get("step", 0) <= state.global_step]
        if any(self._reached(args, entry) for entry in done):
            control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        if state.global_step > 0 and self._reached(args, metrics or {}):
            control.should_training_stop = True

    def _reached(self, args: Any, metrics: Mapping[str, Any]) -> bool:
        name = args.metric_for_best_model
        found = metrics.get(name if name.startswith("eval_") else f"eval_{name}")
        return found is not None and (found >= self.value if args.greater_is_better else found <= self.value)


class PeriodicEvaluationMixin:
    """A trainer whose evaluation is `epoch_evaluation`, where that is set, instead of TRL's own.

    Put it before the TRL class in the bases, call `_with_evaluation` on the evaluation rows before its constructor,
    and `_stop_early` after it.
    """

    args: Any

    def _with_evaluation(self, args: Any, train_dataset: Any, eval_dataset: Any) -> Any:
        """The `eval_dataset` for Trainer, which wants one wherever it evaluates."""
        self.epoch_evaluation = (
            None if args.epoch_evaluation is None else build_evaluation(args.epoch_evaluation, args)
        )
        self._evaluation_rows = {} if eval_dataset is None else {"test": eval_dataset}
        if self.epoch_evaluation is not None and eval_dataset is None:
            return train_dataset.select([0])
        return eval_dataset

    def _stop_early(self) -> None:
        """Add the callbacks that `early_stopping_patience` and `stop_at` ask for."""
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))
        if self.args.stop_at is not None:
            self.add_callback(_StopAt(self.args.stop_at))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in Trainer; nothing where the training had ended, and is gone on with after its last evaluation."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """`epoch_evaluation`, its numbers with the prefix `eval_`; without one, as in TRL."""
        if self.epoch_evaluation is None or metric_key_prefix != "eval":
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        rows = {"train": self.train_dataset, **self._evaluation_rows}
        values = evaluated(self, self.epoch_evaluation, rows)
        metrics = {f"eval_{name}": float(value) for name, value in values.items() if isinstance(value, (int, float))}
        metrics |= self._chosen_from_the_log(values)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _chosen_from_the_log(self, values: Mapping[str, Any]) -> dict[str, float]:
        """What `metric_for_best_model` names, where it is no number of the evaluation: the value last logged while
        training (`group/pass@8`, `entropy` …). The training's own `loss` is none that models are chosen by.

        Raises:
            OptionError: after the first step, neither the evaluation nor the log has it.
        """
        name = (self.args.metric_for_best_model or "").removeprefix("eval_")
        if not name or name in values or self.state.global_step == 0:
            return {}
        logged = [entry[name] for entry in self.state.log_history if name in entry and name != "loss"]
        if logged:
            return {f"eval_{name}": float(logged[-1])}
        known = ", ".join(sorted(key for key, value in values.items() if isinstance(value, (int, float))))
        raise OptionError(
            f"metric_for_best_model={name}: epoch_evaluation gives no such number, and the training has logged none "
            f"up to step {self.state.global_step}. The evaluation gives: {known or 'none'}; a number of the log must "
            "have been logged before (logging_steps)",
            "metric_for_best_model",
        )
