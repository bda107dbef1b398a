"""What pre-sampling reads: the prompts with their columns, their tokens, and the reward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fdiv.errors import DataError
from fdiv.models.fingerprints import data_fingerprint

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from fdiv.rl.presample.config import PresampleConfig

__all__ = ["data_fingerprint", "load_prompts", "load_reward", "tokenize_prompts"]


def load_prompts(config: PresampleConfig) -> Dataset:
    """The rows of the split, with their columns.

    Raises:
        DataError: no such data or split, no rows, no column `prompt`, a prompt that is neither text nor messages.
    """
    from fdiv.run.data import named_dataset

    found = named_dataset(config.dataset)
    splits = found if hasattr(found, "keys") else {"train": found}
    if config.split not in splits:
        raise DataError(f"{config.dataset} has no split {config.split!r}; it has: {', '.join(map(str, splits))}")
    rows = splits[config.split]
    if "prompt" not in rows.column_names:
        raise DataError(f"{config.dataset} has no column 'prompt'; it has: {', '.join(rows.column_names)}")
    if config.kind is not None and config.kind not in rows.column_names:
        raise DataError(
            f"{config.dataset} has no column {config.kind!r} (kind); it has: {', '.join(rows.column_names)}"
        )
    if len(rows) == 0:
        raise DataError(f"{config.dataset}, split {config.split!r}, is empty")
    kind = type(rows[0]["prompt"])
    for index, prompt in enumerate(rows["prompt"]):
        if type(prompt) is not kind or not (isinstance(prompt, str) or _is_messages(prompt)):
            raise DataError(
                f"{config.dataset}, row {index}: prompt is {prompt!r:.80}; every row needs a text, or every row a "
                "list of {role, content} messages"
            )
    return rows


def _is_messages(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, Mapping) and "role" in m for m in prompt)


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[list[int]]:
    """Prompt tokens exactly as TRL's `GRPOTrainer` makes them: chat template with generation prompt, or the text.

    Raises:
        DataError: messages without a chat template; a prompt without tokens.
    """
    prompts = list(prompts)
    if isinstance(prompts[0], str):
        ids = tokenizer(text=prompts)["input_ids"]
    else:
        if tokenizer.chat_template is None:
            raise DataError("the prompts are messages, and the tokenizer has no chat template: give texts")
        ids = tokenizer.apply_chat_template(
            conversation=prompts,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **(chat_template_kwargs or {}),
        )["input_ids"]
    for index, row in enumerate(ids):
        if not row:
            raise DataError(f"row {index}: the prompt {prompts[index]!r} has no tokens")
    return [list(row) for row in ids]


def load_reward(spec: Any) -> Any:
    """The reward function of a spec (see `fdiv.rl.rewards.build_reward`), with its faults named; `close()` ends its
    worker processes, where it has any.

    Raises:
        DataError: no spec; an unknown reward, an argument it refuses, or an asynchronous function.
    """
    from fdiv.alignment.scorers import checked_scorer
    from fdiv.rl.rewards import build_reward

    if spec is None:
        raise DataError("no reward: say what scores a completion, by name, as {name: …}, or as module:function")
    try:
        reward = build_reward(spec)
    except (ValueError, TypeError) as error:
        raise DataError(f"reward: {error}") from error
    if inspect.iscoroutinefunction(reward):
        raise DataError(f"reward {spec}: pre-sampling calls plain functions only, and this one is asynchronous")
    checked = checked_scorer(reward, finite=False)
    checked.close = reward.close if hasattr(reward, "close") else lambda: None
    return checked
