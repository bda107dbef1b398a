"""TOFU evaluation of one model: one scoring pass, one generation pass, every metric.

evaluation = TofuEvaluation(TofuEvalConfig(split="forget10", data="path/to/tofu"), tokenizer)
values = evaluation.aggregate(evaluation.run(model)).values
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from fdiv.errors import DataError
from fdiv.eval.benchmark.aggregation import Aggregates
from fdiv.eval.benchmark.evaluation import ModelEvaluation, Records, evaluate_in_memory
from fdiv.eval.benchmark.log import EvalLog
from fdiv.eval.benchmark.rows import set_reports
from fdiv.eval.benchmark.settings import EvaluationSettings
from fdiv.eval.tofu.aggregate import aggregate_tofu
from fdiv.eval.tofu.data import HUB_DATASET, TofuRows, load_tofu_rows
from fdiv.eval.tofu.plan import TofuPlan, build_metrics, plan_tofu
from fdiv.eval.tofu.rows import as_read, checked_rows
from fdiv.evaluation import EvalContext
from fdiv.models.loading import context_length
from fdiv.named import lookup
from fdiv.rows.report import RowReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["TofuEvalConfig", "TofuEvaluation"]

_HUB_SPLITS = ("forget01", "forget05", "forget10")


@dataclass
class TofuEvalConfig(EvaluationSettings):
    """Settings of a TOFU evaluation; as `eval: {name: tofu, …}` of a recipe it runs before and after training.

    Args:
        split: forget split, `forget01`, `forget05`, `forget10`, or any NAME with a set `NAME_perturbed` or `NAME`; a
            file of rows is a split of its own.
        holdout: holdout set or file for the membership attacks; by default the split's own.
        retain_data: retain set or file; by default `retain_perturbed`, else `retain`.
        data: hub dataset (default `locuslab/TOFU`), local folder, or a file of forget rows; see
            `fdiv.eval.tofu.data`.

    The other settings are those of `EvaluationSettings`.
    """

    presets: ClassVar[tuple[str, ...]] = ("open_unlearning", "tofu_paper", "tofu_2024")
    summary_metrics: ClassVar[tuple[str, ...]] = (
        *("forget_quality", "model_utility", "forget_truth_ratio", "forget_Q_A_ROUGE", "retain_Q_A_ROUGE"),
        *("extraction_strength", "privleak", "forget_ngram_entropy"),
    )

    data: str | None = HUB_DATASET
    split: str = "forget10"
    holdout: str | None = None
    retain_data: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data == HUB_DATASET:
            lookup(dict.fromkeys(_HUB_SPLITS), self.split, f"split of {HUB_DATASET}", error=DataError)
        elif not self.split:
            raise DataError("split is empty: name a forget set of the data")

    def rows(self) -> TofuRows:
        """The rows of all sets, checked."""
        return load_tofu_rows(self.split, self.data, self.holdout, self.retain_data)

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, datasets: Any, context: EvalContext
    ) -> dict[str, Any]:
        """Evaluate a model in memory (the recipe's `eval:` step); also writes `tofu_STAGE/TOFU_EVAL.json`.

        Returns the values by name, None where one is not defined, and under `notes` the reasons.

        `datasets` is not used: TOFU's rows come from `data`. A reference model in the context serves the Reference
        attack when no `reference_model` is named.
        """
        return evaluate_in_memory(TofuEvaluation, self, model, tokenizer, context)


class TofuEvaluation(ModelEvaluation):
    """A TOFU evaluation; see `ModelEvaluation`."""

    benchmark = "tofu"
    attacked_metrics = (
        *("forget_Q_A_Prob", "forget_Q_A_PARA_Prob", "forget_Q_A_PERT_Prob", "forget_Q_A_ROUGE"),
        *("extraction_strength", "exact_memorization", "retain_Q_A_Prob"),
    )
    fluency = ("forget_Q_A_ROUGE", "forget_Q_A_gibberish", 32)
    config: TofuEvalConfig
    plan: TofuPlan
    rows: TofuRows

    def _prepare(self) -> None:
        config = self.config
        self.rows = config.rows()
        self.missing = self.rows.missing
        self.plan = plan_tofu(self.rows, self.tokenizer, config.prompt(), self.preset, config.max_items)
        self.retain_metric = self.plan.forget_metric

    def row_stamp(self) -> dict[str, Any]:
        """Split and fingerprint of the forget rows."""
        return {"split": self.rows.split, "forget_rows": self.rows.forget_digest()}

    def row_reports(self, model: PreTrainedModel) -> list[RowReport]:
        """Of the forget, retain, real-author, world-fact and holdout rows."""
        rows = {name: len(getattr(self.rows, name)) for name in ("forget", "retain", "ra", "wf", "holdout")}
        sets = {name: (f"tofu {name} rows", count) for name, count in rows.items()}
        return set_reports(sets, self.plan.scoring, self.plan.generation, context_length(model))

    def build_metrics(
        self, records: Records, generations: Records | None, reference: Records | None, gradnorms: Records | None
    ) -> dict[str, dict[str, Any]]:
        """The metric tree of per-item values from the passes' results."""
        return build_metrics(self.plan, records, generations, reference, gradnorms)

    def attack_rows(self) -> list[dict[str, Any]]:
        """The forget rows."""
        return [as_read(row) for row in self.rows.forget]

    def attack_context(self) -> dict[str, Any]:
        """The prompt format; the retain rows as neighbours, where there are any."""
        neighbours = {"neighbours": [as_read(row) for row in self.rows.retain]} if self.rows.retain else {}
        return {"prompt": self.config.prompt(), **neighbours}

    def attack_row(self, key: str) -> int | None:
        """The number in a key of the forget rows."""
        return int(key.split("/")[1]) if key.startswith("forget_") else None

    def under_attack(self, rows: Sequence[Mapping[str, Any]], chosen: Sequence[int], weights: bool) -> TofuEvaluation:
        """With the attacked forget rows, and as many retain rows, scored alone, where the weights were attacked."""
        view, source = copy.copy(self), "forget rows under attack"
        forget, _ = checked_rows([dict(row) for row in rows], source, "forget")
        retain = self.rows.retain if weights else []
        view.rows = replace(self.rows, forget=forget, retain=retain, ra=[], wf=[], holdout=[])
        view.plan = plan_tofu(view.rows, self.tokenizer, self.config.prompt(), self.preset, len(chosen), chosen)
        view.plan.scoring = [
            r for r in view.plan.scoring if not r.key.startswith(("retain_Q_A_PARA", "retain_Q_A_PE"))
        ]
        view.plan.generation = [r for r in view.plan.generation if r.key.startswith("forget_")]
        return view

    def aggregate(self, log: EvalLog) -> Aggregates:
        """Aggregates of a log of this evaluation against its retain log."""
        return aggregate_tofu(log, self.preset, self._retain)
