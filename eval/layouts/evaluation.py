"""The evaluation of a layout: TOFU's measures of questions, MUSE's of texts, lm-eval's of tasks, without code.

eval: {name: benchmark, data: my_folder}
eval: {name: benchmark, data: rwku, variables: {subject: Stephen King}}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fdiv.errors import DataError
from fdiv.eval.benchmark.evaluation import ModelEvaluation, evaluate_in_memory
from fdiv.eval.benchmark.settings import EvaluationSettings
from fdiv.eval.layouts.layout import SETTINGS, Layout, load_layout
from fdiv.eval.layouts.rows import layout_rows
from fdiv.eval.muse.evaluation import MuseEvalConfig, MuseEvaluation
from fdiv.eval.tofu.evaluation import TofuEvalConfig, TofuEvaluation
from fdiv.evaluation import EvalContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["BenchmarkEvalConfig"]

_UNSTATED = ("question_format", "answer_format", "chat_template", "end_token", "preset")


@dataclass
class BenchmarkEvalConfig(EvaluationSettings):
    """Settings of an evaluation of one's own benchmark; as `eval: {name: benchmark, …}` of a recipe it runs before and
    after training.

    Args:
        data: a folder with `benchmark.yaml` (or with files of rows alone), such a file, or the name of a packaged
            layout (`fdiv.eval.layouts`).
        source: a local folder, or another dataset of the hub, in place of the one that the layout names.
        variables: values of the layout's variables.
        max_length: tokens kept of each attacked or verbatim text; of texts alone.

    The other settings are those of `EvaluationSettings`; one that is not stated is that of the layout, else TOFU's or
    MUSE's. Attacks are by default `paraphrase` where the layout has paraphrases, else none.
    """

    source: str | None = None
    variables: dict[str, Any] | None = None
    max_length: int | None = None
    question_format: str | None = None  # type: ignore[assignment]
    answer_format: str | None = None  # type: ignore[assignment]
    chat_template: Literal["auto", "always", "never"] | None = None  # type: ignore[assignment]
    end_token: Literal["turn", "appended"] | None = None  # type: ignore[assignment]
    preset: str | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.layout = self._layout()
        kind = MuseEvalConfig if self.layout.kind == "texts" else TofuEvalConfig
        # Of the instance: what presets there are and which metrics come first depends on the kind.
        self.presets, self.summary_metrics = kind.presets, kind.summary_metrics  # type: ignore[misc]
        self.corpus = str(self.layout.variables.get("corpus", self.layout.name))
        chosen = {"attacks": ["paraphrase"]} if "paraphrase" in self.layout.sets else {}
        for name in SETTINGS:
            if getattr(self, name) is None:
                setattr(self, name, {**chosen, **self.layout.settings}.get(name))
        for name in (*_UNSTATED, *(("max_length",) if kind is MuseEvalConfig else ())):
            if getattr(self, name) is None:
                setattr(self, name, getattr(kind, name))
        super().__post_init__()

    def _layout(self) -> Layout:
        if not self.data:
            raise DataError("data is not set: name a folder with a benchmark.yaml, or a benchmark by name")
        if self.data.startswith("${"):  # of a dry run: what `prepare` will build is not there yet
            return Layout("benchmark", "questions", {})
        return load_layout(self.data).filled(self.variables)

    @property
    def evaluation_class(self) -> type[ModelEvaluation]:
        """What measures the sets."""
        return MuseEvaluation if self.layout.kind == "texts" else TofuEvaluation

    def rows(self) -> Any:
        """The rows of all sets, checked."""
        return layout_rows(self.layout, self.source)

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, datasets: Any, context: EvalContext
    ) -> dict[str, Any]:
        """Evaluate a model in memory (the recipe's `eval:` step): the sets as TOFU's or MUSE's evaluation does, whose
        log it writes, then the tasks.

        Returns the values by name, None where one is not defined, and under `notes` the reasons.
        """
        found: dict[str, Any] = {}
        if self.layout.sets:
            found = evaluate_in_memory(self.evaluation_class, self, model, tokenizer, context)
        return found | self.task_values(model, tokenizer)

    def task_values(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
        """Values of the layout's lm-eval tasks, by `task/metric`; empty where it has none."""
        if not self.layout.tasks:
            return {}
        from fdiv.eval.lm_eval.evaluation import task_values

        options = {"batch_size": self.batch_size, "limit": self.max_items, "seed": self.attack_seed}
        return task_values(model, tokenizer, list(self.layout.tasks), self.prompt().encoding, **options)
