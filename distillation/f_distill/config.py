"""The options of distillation under any divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trl import DistillationConfig

from fdiv.distillation.f_distill.sinkhorn import SinkhornOptions
from fdiv.divergences import get_distance
from fdiv.errors import OptionError
from fdiv.inference.encoding import Encoding
from fdiv.memory.step_shape import StepShape, rollout_tokens, sampled_at_once
from fdiv.training.config import DivergenceOptions, divergence_option, option, refuse
from fdiv.training.rollouts import RolloutConfig

if TYPE_CHECKING:
    from fdiv.distillation.teachers.base import Teacher

__all__ = ["FDistillConfig"]

_REFUSED = {
    "beta": "set `divergence` instead: 1 is reverse_kl, 0 forward_kl, b is {name: skew_jensen_shannon, weight: 1 - b}",
    "max_tool_calling_iterations": "this trainer calls no tools",
}


@dataclass
class FDistillConfig(DivergenceOptions, SinkhornOptions, RolloutConfig, DistillationConfig):
    """Configuration of `FDistillTrainer`: every key of TRL's `DistillationConfig`, `divergence`, `normalized`, the
    rollout keys of `RolloutConfig`, `sinkhorn_*` (`SinkhornOptions`), and those below. There is no factor T².

    Raises:
        ValueError: an unknown divergence, a value outside its range, or a TRL key that would change the loss.
    """

    find_divergence = staticmethod(get_distance)

    divergence: dict[str, Any] | str | None = divergence_option(
        "reverse_kl",
        "The f of D_f(student‖teacher) of every next-token distribution, or a distance without an f: cauchy_schwarz, "
        "{name: gated, forward: …, reverse: …, gate: …}",
    )
    on_policy_share: float = option(
        1.0,
        "λ, the share of rows whose completion the student samples itself; the others take the row's `completion`, "
        "by a rule of (seed, epoch, prompt) alone",
        least=0,
        most=1,
    )

    teacher: dict[str, Any] | str | None = option(
        "local",
        "Where the teacher's distributions come from: local (teacher_model_name_or_path, in memory), start or "
        "{name: ema, decay: 0.999} (the student's own earlier weights), {name: cache, path: DIR} (`fdiv teach`), "
        "{name: server, url: http://host:port} (vLLM)",
    )

    temperature: float = option(
        1.0, "What the logits of student and teacher are divided by in the loss, and those sampled from", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, _REFUSED)
        teacher = self.make_teacher()
        teacher.check(self)
        if self.sinkhorn_weight > 0 and not teacher.in_memory:
            raise OptionError(
                f"sinkhorn_weight={self.sinkhorn_weight:g}: {teacher.title} says each token's top k at one "
                "temperature, and the term compares all distributions of student and teacher with each other at "
                "sinkhorn_temperature: take a teacher in memory (local, start, ema)",
                key="sinkhorn_weight",
            )

    def make_teacher(self) -> Teacher:
        """The teacher that `teacher` names, not attached yet.

        Raises:
            OptionError: an unknown one, or a key of it that is wrong.
        """
        from fdiv.distillation.teachers.base import build_teacher

        return build_teacher(self.teacher)

    def encoding(self) -> Encoding:
        """How rows are encoded: given completions follow the prompt that own ones are sampled from."""
        return Encoding(self.system_prompt, self.date_string, self.chat_template_kwargs, context="generation")

    def step_shape(self, *, peft: bool, processes: int, prompt_tokens: int | None = None) -> StepShape:
        """Rows of prompt and completion; a teacher in memory, whose size the config does not say, comes on top."""
        tokens, note = rollout_tokens(self, prompt_tokens)
        rows = self.per_device_train_batch_size
        drawn = sampled_at_once(self, rows * self.gradient_accumulation_steps) if self.on_policy_share > 0 else 0
        held = self.make_teacher().copies(peft)
        if held is None:
            note = f"{note}; the teacher's weights come on top"
        return StepShape(rows, tokens, note, references=held or 0, sampled_rows=drawn, sampled_tokens=tokens)
