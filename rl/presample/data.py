"""What pre-sampling reads: the prompts with their columns, their tokens, and the reward."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fdiv.errors import DataError
from fdiv.inference.encoding import Encoding
from fdiv.models.fingerprints import data_fingerprint
from fdiv.models.loading import check_fits, context_length
from fdiv.rows.loading import named_dataset
from fdiv.rows.sources import source_of
from fdiv.training.data_checks import check_prompts, gold_checks

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from fdiv.rl.presample.config import PresampleConfig

__all__ = ["check_room", "data_fingerprint", "load_prompts", "load_reward", "tokenize_prompts"]

DEFAULT_ENCODING = Encoding()


def load_prompts(config: PresampleConfig, reward: Any = None) -> Dataset:
    """The rows of the split, with their columns.

    Args:
        config: names them. reward: what will score completions; the golds it compares with must be there.

    Raises:
        DataError: no such data or split, no rows, no column `prompt`, a prompt that is neither text nor messages, a
            gold that is missing.
    """
    found = named_dataset(config.dataset)
    splits = found if hasattr(found, "keys") else {"train": found}
    if config.split not in splits:
        raise DataError(f"{config.dataset} has no split {config.split!r}; it has: {', '.join(map(str, splits))}")
    rows = splits[config.split]
    name = f"{config.dataset}, split {config.split!r}"
    check_prompts(rows, name, "pre-sampling", more=gold_checks(reward))
    if config.kind is not None and config.kind not in rows.column_names:
        raise DataError(
            f"{config.dataset} has no column {config.kind!r} (kind); it has: {', '.join(rows.column_names)}"
        )
    return rows


def check_room(rows: Dataset, prompt_ids: Sequence[Sequence[int]], model: Any, config: PresampleConfig) -> None:
    """Refuse prompts that leave no room for a completion in the model's context.

    Raises:
        DataError: names the first such row, and how many there are.
    """
    limit, room = context_length(model), config.max_completion_length
    long = [number for number, ids in enumerate(prompt_ids) if limit is not None and len(ids) + room > limit]
    if long:
        check_fits(
            len(prompt_ids[long[0]]) + room,
            model,
            f"{source_of(rows, config.dataset).row(long[0])}: the prompt with max_completion_length={room}",
            f"{len(long)} of {len(rows)} prompts are too long; shorten them or leave them out, or lower "
            "max_completion_length",
        )


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], encoding: Encoding = DEFAULT_ENCODING
) -> list[list[int]]:
    """Prompt tokens as the trainers on rollouts make them: chat template with generation prompt, or the text.

    Raises:
        DataError: messages without a chat template; a prompt without tokens.
    """
    if not isinstance(prompts[0], str) and not tokenizer.chat_template:
        raise DataError("the prompts are messages, and the tokenizer has no chat template: give texts")
    ids = [encoding.encode_prompt(tokenizer, prompt) for prompt in prompts]
    for index, row in enumerate(ids):
        if not row:
            raise DataError(f"row {index}: the prompt {prompts[index]!r} has no tokens")
    return ids


def load_reward(spec: Any) -> Any:
    """The reward function of a spec (see `fdiv.rl.rewards.build_reward`), with its faults named; `close()` ends its
    worker processes, where it has any, and `scorer` is the function itself.

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
    checked.scorer = reward
    checked.close = reward.close if hasattr(reward, "close") else lambda: None
    return checked
