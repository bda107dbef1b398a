"""The evaluation `unlearning`: rows of one's own before and after, on cheap measures in every epoch, and under attack.

    eval: {name: unlearning, forget: rows.jsonl, retain: others.jsonl}
    epoch_evaluation: {name: unlearning, forget: rows.jsonl, retain: others.jsonl, profile: cheap}

Before training it also says which rows the model does not look to know; after it, it writes `erasure.html` and
`erasure.json` into the run's directory.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from fdiv.errors import DataError
from fdiv.eval.benchmark.settings import PromptSettings
from fdiv.eval.unlearning.attacks.build import NamedAttack, build_attacks
from fdiv.eval.unlearning.data import Rows
from fdiv.eval.unlearning.measurement import Measured, Measurement, attack_values
from fdiv.eval.unlearning.sets import check_context, check_end, check_retrained, load_sets
from fdiv.evaluation import EvalContext
from fdiv.models.loading import context_length
from fdiv.named import lookup
from fdiv.rows.sources import mark_source
from fdiv.sealed import read_record, write_record
from fdiv.terminal import info, is_main_process

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PROFILES", "Profile", "UnlearningEvalConfig", "UnlearningEvaluation", "unknown_rows_line"]


class Profile(NamedTuple):
    """How much is measured: answers sampled of each row, greedy ones shown, attacks; whether a report is written."""

    samples: int
    examples: int
    attacks: tuple[str | Mapping[str, Any], ...]
    report: bool = True


_CURVE = [1, 5, 20, 50]
PROFILES = {
    "cheap": Profile(0, 0, (), report=False),
    "quick": Profile(8, 3, ({"name": "relearn", "steps": [1, 5]}, "int4")),
    "thorough": Profile(
        64,
        3,
        (
            {"name": "relearn", "steps": _CURVE},
            {"name": "relearn_unrelated", "steps": _CURVE},
            *("int8", "int4", "nf4", "prefix", "answer_prefix", "priming", "noise"),
            {"name": "sampling", "samples": 64, "temperature": 1.5},
            *("adapter_removal", "adapter_scaling"),
        ),
    ),
}
"""`profile:`; all but the cheap one measure paraphrases and write the report."""

_RECORD = "unlearning.json"


@dataclass
class UnlearningEvalConfig(PromptSettings):
    """Settings of the evaluation.

    Args:
        forget: file of the rows to forget (see `fdiv.eval.unlearning.data`), or a dataset of the hub.
        retain: rows to keep; attacks may show them, and they are measured where no `neighbours` are given.
        neighbours: rows near the forget rows that were not trained on.
        holdout: rows of the kind of the forget rows that the model has never seen, for the membership scores.
        general: rows or texts of general knowledge; None: a few sentences of our own.
        paraphrases: file with other wordings of the forget rows. paraphrase_model: a model that writes them.
        retrained: a model that never saw the forget rows, measured beside this one.
        profile: `cheap` (likelihoods), `quick` (8 samples a row, relearning for 5 steps, int4) or `thorough` (64
            samples, all attacks).
        samples: answers sampled of each row, in place of the profile's. leak_rows: how many rows are sampled, evenly
            spaced; None: all.
        attacks: names and mappings (`fdiv.catalog.ATTACKS`), in place of the profile's.
        relearning_rate: learning rate of the relearning; None: that of the run, else the attack's own.
        max_items: evenly spaced rows of each set that are kept; None: all.
        max_new_tokens: bound on an answer, in tokens.
        batch_size, generation_batch_size: of scoring and of generating.
        hide_texts: the report shows digests in place of forget rows and answers.
        cache: folder for finished items, so that a killed run goes on; None: beside the results.
    """

    summary_metrics: ClassVar[tuple[str, ...]] = (
        *("forgotten", "kept", "forget_probability", "extraction_strength", "exact_memorization"),
        *("paraphrase_probability", "neighbour_probability", "general_probability", "leak@8"),
    )

    forget: str = ""
    retain: str | None = None
    neighbours: str | None = None
    holdout: str | None = None
    general: str | None = None
    paraphrases: str | None = None
    paraphrase_model: str | None = None
    retrained: str | None = None
    profile: Literal["cheap", "quick", "thorough"] = "quick"
    samples: int | None = None
    leak_rows: int | None = None
    attacks: list[Any] | None = None
    relearning_rate: float | None = None
    max_items: int | None = None
    max_new_tokens: int = 128
    batch_size: int = 32
    generation_batch_size: int = 64
    hide_texts: bool = False
    cache: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        lookup(PROFILES, self.profile, "profile", error=DataError)
        for name, least in (("samples", 0), ("leak_rows", 1), ("max_items", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise DataError(f"{name}={value}: must be at least {least}")
        if self.relearning_rate is not None and not 0 < self.relearning_rate < 1:
            raise DataError(f"relearning_rate={self.relearning_rate}: must lie between 0 and 1")
        self.attack_specs()

    def attack_specs(self, **context: Any) -> list[NamedAttack]:
        """The attacks, made; those of the profile where none are stated."""
        stated = PROFILES[self.profile].attacks if self.attacks is None else self.attacks
        return build_attacks(list(stated), **context)

    # ---------------------------------------------------------------- inside a run
    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, datasets: Any, context: EvalContext
    ) -> dict[str, Any]:
        """Evaluate a model in memory (the recipe's `eval:` step, or `epoch_evaluation`).

        Returns the values by name, None where one is not defined, and under `notes` the reasons. The rows are those of
        the settings, not those of `datasets`.
        """
        evaluation = UnlearningEvaluation(self, tokenizer, context)
        for report in evaluation.row_reports(context_length(model)):
            if not evaluation.every_epoch:  # the report of all rows has said it
                context.report_rows(report, self.min_used_fraction)
        start = evaluation.start()
        measured = evaluation.measurement.likelihoods(model, None if start is None else start.chance)
        if context.stage == "before" or (start is None and not evaluation.every_epoch):
            evaluation.say_unknown(measured)
        evaluation.measure_more(model, measured, attacked=context.stage != "before")
        evaluation.write(model, measured, start)
        refused = {f"attack/{result.name}": result.reason for result in measured.attacks if result.reason is not None}
        values = measured.values | attack_values(measured.attacks) | dict.fromkeys(refused)
        return {**values, "notes": measured.notes | refused}


class UnlearningEvaluation:
    """One evaluation: the rows, the passes and what is written.

    Args:
        config: the settings. tokenizer: of the model. context: where it stands in a run.
    """

    def __init__(self, config: UnlearningEvalConfig, tokenizer: PreTrainedTokenizerBase, context: EvalContext):
        if not config.forget:
            raise DataError("forget is not set: name the file of the rows to forget")
        self.config, self.context = config, context
        self.profile = PROFILES[config.profile]
        sources = ("retain", "neighbours", "holdout", "general", "paraphrases", "paraphrase_model", "max_items")
        given = {name: getattr(config, name) for name in sources}
        self.sets = load_sets(tokenizer, config.forget, **given, seed=context.seed)
        check_end(tokenizer, getattr(tokenizer, "name_or_path", "the model"))
        if config.retrained is not None:
            check_retrained(config.retrained, tokenizer)
        self.measurement = Measurement(
            self.sets,
            tokenizer,
            config.prompt(),
            samples=self.profile.samples if config.samples is None else config.samples,
            leak_rows=config.leak_rows,
            examples=self.profile.examples,
            paraphrased=self.profile.report,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            generation_batch_size=config.generation_batch_size,
            seed=context.seed,
            cache_dir=Path(config.cache) if config.cache else context.output_dir.parent / "cache",
            progress=is_main_process() and sys.stdout.isatty(),
        )

    @property
    def every_epoch(self) -> bool:
        """Whether it is the `epoch_evaluation` of a run."""
        return self.context.stage == "standalone" and "trainer" in (self.context.extra or {})

    def row_reports(self, limit: int | None) -> list[Any]:
        """What became of the rows; rows beyond the model's context of `limit` tokens are refused."""
        sets, measurement = self.sets, self.measurement
        requests = sets.requests(measurement.tokenizer, measurement.prompt, chance=False, paraphrased=False)
        for name, rows in (("forget", sets.asked), ("neighbour", sets.neighbours), ("holdout", sets.holdout)):
            texts = [request.text for request in requests if request.key.startswith(f"{name}/")]
            known = mark_source(Rows(rows), sets.forget.fdiv_source) if name == "forget" else rows
            check_context(texts, known, name, limit)
        return sets.reports(requests)

    def say_unknown(self, measured: Measured) -> None:
        """Which rows the model does not look to know, and secrets that no answer holds, before anything is done."""
        if "secrets" in self.sets.origins:
            info(f"note: {self.sets.origins['secrets']}")
        line = unknown_rows_line(measured, self.sets.forget.fdiv_source, self.sets.asked)
        if line is not None:
            measured.notes["at_chance"] = line
            info(f"note: {line}")

    def measure_more(self, model: PreTrainedModel, measured: Measured, attacked: bool) -> None:
        """Sampled and greedy answers, and the attacks, where the profile has them."""
        self.measurement.speak(model, measured)
        if attacked:
            attacks = self.config.attack_specs(**self._attack_context())
            measured.attacks = self.measurement.attack(model, attacks, measured)

    def _attack_context(self) -> dict[str, Any]:
        rate = self.config.relearning_rate or getattr(self.context.training_args, "learning_rate", None)
        known = {"prompt": self.config.prompt(), "learning_rate": rate}
        return {name: value for name, value in known.items() if value is not None} | (
            {"neighbours": self.sets.retain} if self.sets.retain else {}
        )

    # ---------------------------------------------------------------- what is written, and read again
    def start(self) -> Measured | None:
        """What was measured before training, in this run; None where nothing was, or this is that."""
        if self.context.stage == "before":
            return None
        if self.every_epoch:
            step = self.context.extra["trainer"].state.global_step
            path = self.context.output_dir / "start.json"
            return None if step == 0 or not path.is_file() else _read(path)
        path = self.context.output_dir.parent / "before" / _RECORD
        return _read(path) if self.context.stage == "after" and path.is_file() else None

    def write(self, model: PreTrainedModel, measured: Measured, start: Measured | None) -> None:
        """The record of this stage and, after training, the report; call it on all processes."""
        reported = self.context.stage == "after" and start is not None and self.profile.report
        retrained = self.retrained(start, _weights_type(model)) if reported and start is not None else None
        if not is_main_process():
            return
        folder = self.context.output_dir
        if self.every_epoch:
            if start is None:
                write_record(folder / "start.json", measured.record())
            return
        write_record(folder / _RECORD, measured.record())
        if reported and start is not None:
            from fdiv.eval.unlearning.report import About, content_of, write_report

            about = About.of_run(self.config, self.sets, self.context)
            content = content_of(self.sets, start, measured, about, retrained)
            page = write_report(folder.parent.parent, content)
            info(f"erasure report: {page}")

    def retrained(self, start: Measured, dtype: str) -> Measured | None:
        """The same of the retrained model, where one is named; call it on all processes.

        Args:
            start: of the model before unlearning. dtype: of the models it stands beside (see `load_model`).
        """
        if self.config.retrained is None:
            return None
        from fdiv.models.loading import load_model

        model = load_model(self.config.retrained, dtype=dtype)
        measured = self.measurement.likelihoods(model, start.chance)
        self.measure_more(model, measured, attacked=True)
        return measured


def _weights_type(model: PreTrainedModel) -> str:
    """Number type of a model's weights; of one with an adapter that of the base, whose parameters come first."""
    return str(next(weights.dtype for weights in model.parameters() if weights.is_floating_point()))


def _read(path: Path) -> Measured:
    return Measured.of_record(read_record(path, "remove it, and run again"))


def unknown_rows_line(measured: Measured, source: Any, rows: Any) -> str | None:
    """A line on the rows that the model does not look to know; None where there are none."""
    unknown, count = measured.unknown, len(measured.rows)
    if not unknown:
        return None
    first = source.row(rows[unknown[0]].get("row", unknown[0]))
    every = len(unknown) == count
    what = f"none of the {count} forget rows looks" if every else f"{len(unknown)} of {count} forget rows do not look"
    return (
        f"{what} known to the model (first: {first}): probability and extraction strength of their answers are at "
        "chance, that is where the questions of other rows put them. There is nothing in such rows to unlearn; "
        "check that this is the model that was trained on them, and the prompt format it was trained with"
    )
