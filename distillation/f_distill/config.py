"""The options of distillation under any divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trl import DistillationConfig

from fdiv.inference.encoding import Encoding
from fdiv.memory.step_shape import StepShape, rollout_tokens, sampled_at_once
from fdiv.training.config import DivergenceOptions, divergence_option, option, refuse
from fdiv.training.rollouts import RolloutConfig

__all__ = ["FDistillConfig"]

_REFUSED = {
    "beta": "set `divergence` instead: 1 is reverse_kl, 0 forward_kl, b is {name: skew_jensen_shannon, weight: 1 - b}",
    "max_tool_calling_iterations": "this trainer calls no tools",
}


@dataclass
class FDistillConfig(DivergenceOptions, RolloutConfig, DistillationConfig):
    """Configuration of `FDistillTrainer`: every key of TRL's `DistillationConfig`, `divergence`, `normalized`, the
    rollout keys of `RolloutConfig`, and those below. There is no factor T².

    Raises:
        ValueError: an unknown divergence, a value outside its range, or a TRL key that would change the loss.
    """

    divergence: dict[str, Any] | str | None = divergence_option(
        "reverse_kl", "The f of D_f(student‖teacher) of every next-token distribution"
    )
    on_policy_share: float = option(
        1.0,
        "λ, the share of rows whose completion the student samples itself; the others take the row's `completion`, "
        "by a rule of (seed, epoch, prompt) alone",
        least=0,
        most=1,
    )

    temperature: float = option(
        1.0, "What the logits of student and teacher are divided by in the loss, and those sampled from", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self, _REFUSED)

    def encoding(self) -> Encoding:
        """How rows are encoded: given completions follow the prompt that own ones are sampled from."""
        return Encoding(self.system_prompt, self.date_string, self.chat_template_kwargs, context="generation")

    def step_shape(self, *, peft: bool, processes: int, prompt_tokens: int | None = None) -> StepShape:
        """Rows of prompt and completion; the teacher, whose size the config does not say, comes on top."""
        tokens, note = rollout_tokens(self, prompt_tokens)
        rows = self.per_device_train_batch_size
        drawn = sampled_at_once(self, rows * self.gradient_accumulation_steps) if self.on_policy_share > 0 else 0
        note = f"{note}; the teacher's weights come on top"
        return StepShape(rows, tokens, note, sampled_rows=drawn, sampled_tokens=tokens)
