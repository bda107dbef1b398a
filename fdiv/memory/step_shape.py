"""What one micro-batch of a method holds: its rows, their length, the frozen models beside the policy.

A trainer says it from its config alone (`step_shape`), before model or data are loaded; `fdiv.memory.plan` turns it
into bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PROMPT_TOKENS", "StepShape", "rollout_tokens", "sampled_at_once"]

PROMPT_TOKENS = 512
"""Length assumed for the prompts of rollouts, which no key bounds and which are known from the data only."""


class StepShape(NamedTuple):
    """One micro-batch on one process, at its largest.

    Attributes:
        rows: sequences in the forward with gradient.
        tokens: length of the longest; None: no key bounds it, so the model's context does.
        tokens_from: where that number comes from, for the reader.
        references: frozen models of the policy's size that are held besides it.
        on_logits: what the loss makes of float32 logits `[rows · tokens, V]`, rows in the batch's order, where it
            looks at the whole distribution; None: it takes the fused head, which never forms them.
        sampled_rows: completions that transformers samples at once; 0 without sampling, or where vLLM does it.
        sampled_tokens: their longest length, prompt included.
    """

    rows: int
    tokens: int | None
    tokens_from: str
    references: int = 0
    on_logits: Callable[[Tensor], Any] | None = None
    sampled_rows: int = 0
    sampled_tokens: int = 0


def rollout_tokens(args: Any, prompt_tokens: int | None) -> tuple[int, str]:
    """Longest prompt plus completion under a `GRPOConfig`, and where the number comes from."""
    stated = "prompts of" if prompt_tokens is not None else "assumed prompts of"
    prompt = PROMPT_TOKENS if prompt_tokens is None else prompt_tokens
    completion = args.max_completion_length
    return prompt + completion, f"{stated} {prompt} tokens + max_completion_length={completion}"


def sampled_at_once(args: Any, rows: int) -> int:
    """`rows` where transformers samples on this process; 0 where a vLLM engine or server does."""
    return 0 if args.use_vllm or args.rollout_server_url is not None else rows
