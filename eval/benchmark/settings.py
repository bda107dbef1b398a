"""Settings that TOFU's and MUSE's evaluations share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fdiv.errors import DataError
from fdiv.eval.benchmark.presets import PRESETS, get_preset
from fdiv.eval.unlearning.attacks.build import NamedAttack, build_attacks
from fdiv.inference.prompting import PromptFormat
from fdiv.named import is_path
from fdiv.training.config import RowOptions

__all__ = ["EvaluationSettings", "PromptSettings"]


@dataclass
class PromptSettings(RowOptions):
    """How the rows of an evaluation become prompts.

    Args:
        chat_template, question_format, answer_format: see `PromptFormat`.
        system_prompt, date_string, chat_template_kwargs, end_token: see `fdiv.inference.encoding.Encoding`.
    """

    chat_template: Literal["auto", "always", "never"] = "auto"
    question_format: str = PromptFormat.question_format
    answer_format: str = PromptFormat.answer_format
    system_prompt: str | None = None
    date_string: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    end_token: Literal["turn", "appended"] = "turn"

    def __post_init__(self):
        super().__post_init__()
        self.prompt()

    def prompt(self) -> PromptFormat:
        """The prompt format these settings describe."""
        return PromptFormat(
            chat_template=self.chat_template,
            question_format=self.question_format,
            answer_format=self.answer_format,
            system_prompt=self.system_prompt,
            date_string=self.date_string,
            chat_template_kwargs=self.chat_template_kwargs,
            end_token=self.end_token,
        )


@dataclass
class EvaluationSettings(PromptSettings):
    """Shared settings of a benchmark evaluation.

    Args:
        data: hub dataset or local folder.
        preset: the metric definitions, one of the class's `presets`, or `module:attribute` of your own.
        retain_logs: `*_EVAL.json` of the retain model: forget quality and PrivLeak compare with it.
        retain_model: a retain model to evaluate instead of a log.
        reference_model: model of the Reference attack; by default the retain model.
        batch_size: rows of a scoring forward.
        generation_batch_size: prompts generated at once.
        padding_side: of the scoring batches; the numbers do not depend on it.
        max_items: keep this many evenly spaced rows of every set (None: all): a cheap subset to select epochs by.
        generate: False skips the generation pass, and with it every ROUGE.
        gradnorm: False skips the GradNorm attack, which needs one backward per text.
        fluency_classifier: `auto`, a path or hub name, or `none` (see `fdiv.eval.metrics.gibberish`).
        attacks: what tries to bring the forgotten rows back, after training and not before: names of
            `fdiv.catalog.ATTACKS`, or mappings with their parameters; `module:attribute` for one of your own. Each is
            measured on all forget rows, or on `max_items` of them where it says so.
        attack_seed: of everything random in them.
        chat_template, question_format, answer_format: see `PromptFormat`.
        system_prompt, date_string, chat_template_kwargs, end_token: see `fdiv.inference.encoding.Encoding`.
        min_used_fraction: smallest share of each set's rows that must be left, with labels and within the model's
            context.
    """

    presets: ClassVar[tuple[str, ...]] = tuple(PRESETS)

    data: str | None = None
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
    attacks: list[Any] | None = None
    attack_seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        get_preset(self.preset)
        if self.preset not in self.presets and not is_path(self.preset):
            raise DataError(f"preset {self.preset} does not define these metrics; choose {', '.join(self.presets)}")
        if self.retain_logs and self.retain_model:
            raise DataError("give retain_logs or retain_model, not both")
        if self.max_items is not None and self.max_items < 1:
            raise DataError(f"max_items={self.max_items}: must be at least 1")
        if self.padding_side not in ("right", "left"):
            raise DataError(f"padding_side={self.padding_side!r}: choose right or left")
        if self.attack_seed < 0:
            raise DataError(f"attack_seed={self.attack_seed}: must be at least 0")
        self.build_attacks()

    def build_attacks(self, **context: Any) -> list[NamedAttack]:
        """The attacks these settings describe; `context` as of `fdiv.eval.unlearning.attacks.build_attack`."""
        return build_attacks(self.attacks or [], **context)
