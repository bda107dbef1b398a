"""From text to tokens: rows as prompt and answer ids, raw text as chunks, and all roles of a step as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fdiv.errors import DataError
from fdiv.files import folded
from fdiv.inference.encoding import Encoding
from fdiv.rows.sources import Source
from fdiv.training.data_checks import row_variables
from fdiv.unlearning.data.rows import Answer, plain_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["EncodedAnswer", "UnlearningCollator", "check_disjoint", "encode_answer", "encode_text", "render_chat"]

DEFAULT_ENCODING = Encoding()


class EncodedAnswer(NamedTuple):
    """Token ids of a prompt and of the answer that is scored; neither is padded."""

    prompt_ids: list[int]
    answer_ids: list[int]


def encode_answer(
    answer: Answer,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    lengths: list[int] | None = None,
    encoding: Encoding = DEFAULT_ENCODING,
) -> EncodedAnswer:
    """Prompt and answer as token ids (see `fdiv.inference.encoding`), cut to `max_length` tokens at their end.

    The length before that is appended to `lengths`. Columns `chat_template_kwargs` and `tools` of the row are passed
    to the chat template.

    Raises:
        ValueError: no answer token is left (the prompt alone fills `max_length`).
    """
    encoded = encoding.encode(tokenizer, answer.prompt, answer.completion, **row_variables(answer.row))
    if lengths is not None:
        lengths.append(len(encoded.input_ids))
    start, ids = encoded.prompt_length, list(encoded.input_ids[:max_length])
    if start >= len(ids):
        raise ValueError(
            f"no answer token is left after truncation to max_length={max_length}: the prompt has {start} tokens "
            f"({plain_text(answer.prompt)[:60]!r} …); raise max_length or leave the row out"
        )
    return EncodedAnswer(ids[:start], ids[start:])


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    encoding: Encoding = DEFAULT_ENCODING,
    **kwargs: Any,
) -> list[int]:
    """Token ids of messages under the tokenizer's chat template, whose clock is stopped.

    Args:
        tokenizer: with a chat template. messages: roles and contents.
        encoding: system prompt, date and keywords of the template.
    """
    return tokenizer(encoding.render(tokenizer, messages, **kwargs), add_special_tokens=False)["input_ids"]


def encode_text(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    prompt_tokens: int = 0,
    short: list[int] | None = None,
    origins: list[int] | None = None,
) -> list[EncodedAnswer]:
    """Cut raw texts (MUSE) into chunks of at most `max_length` tokens.

    A chunk begins as a text does: with the beginning-of-sequence token where the tokenizer writes one. The first
    `prompt_tokens` tokens of a chunk are its prompt, the others are scored; a chunk too short to score a token is left
    out. The numbers of texts without any chunk are appended to `short`, that of each chunk's text to `origins`.

    Raises:
        ValueError: `prompt_tokens` leaves nothing to score, or no chunk is left.
    """
    head = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id]
    unscored = max(1, len(head) + prompt_tokens)  # the first token of a sequence has no context and is never scored
    if unscored >= max_length:
        raise ValueError(f"text_prompt_tokens={prompt_tokens} leaves no token to score within max_length={max_length}")
    chunks, width = [], max_length - len(head)
    for number, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = [head + ids[start : start + width] for start in range(0, len(ids), width)]
        own = [EncodedAnswer(piece[:unscored], piece[unscored:]) for piece in pieces if len(piece) > unscored]
        chunks += own
        if origins is not None:
            origins += [number] * len(own)
        if short is not None and not own:
            short.append(number)
    if not chunks:
        raise ValueError(f"no text has more than {unscored} tokens: lower text_prompt_tokens or give longer texts")
    return chunks


def check_disjoint(
    forget: Sequence[EncodedAnswer],
    retain: Sequence[EncodedAnswer],
    tokenizer: PreTrainedTokenizerBase | None = None,
    source: Source | None = None,
) -> None:
    """Refuse forget rows that also stand in the retain set, prompt and answer alike.

    Args:
        forget, retain: encoded rows.
        tokenizer: decodes them, so that rows count as one where only their Unicode form, case or white space differs;
            None: the same tokens alone do.
        source: names the forget rows in the message.

    Raises:
        DataError: (a ValueError) with their number.
    """

    def keys(rows: Sequence[EncodedAnswer]) -> list[tuple[Any, Any]]:
        if tokenizer is None:
            return [(tuple(row.prompt_ids), tuple(row.answer_ids)) for row in rows]
        sides = (tokenizer.batch_decode([row[side] for row in rows], skip_special_tokens=True) for side in (0, 1))
        return [(folded(prompt), folded(answer)) for prompt, answer in zip(*sides, strict=True)]

    kept, source = set(keys(retain)), source or Source("the forget rows")
    both = [i for i, key in enumerate(keys(forget)) if key in kept]
    if both:
        raise DataError(
            f"{len(both)} of {len(forget)} forget rows also stand in the retain set (first: {source.row(both[0])}): "
            "forgetting and retaining the same row is contradictory; use the retain split that leaves them out"
        )


@dataclass
class UnlearningCollator:
    """Pads rows of all roles into one batch, role after role: the first B rows are of the first role, and so on.

    Args:
        pad_token_id: fills `input_ids` on the right; no mask depends on its value, so it may be the eos token.
        roles: the order of the roles; one that the items lack is left out.
        pattern: token ids repeated over a forget answer's positions as `target_ids` (JensUn); None for none.
        pad_to_multiple_of: round the padded length up.
    """

    pad_token_id: int
    roles: tuple[str, ...] = ("template", "forget", "retain")
    pattern: Sequence[int] | None = None
    pad_to_multiple_of: int | None = None

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`index[B]` and, for R = roles × B rows, `input_ids`, `attention_mask`, `completion_mask` `[R, T]`.

        With a `pattern`, also `target_ids[R, T]`: the pattern on forget answers, the row's own tokens elsewhere.
        """
        rows = [(role, item[role]) for role in self.roles if role in items[0] for item in items]
        width = max(len(row.prompt_ids) + len(row.answer_ids) for _, row in rows)
        multiple = self.pad_to_multiple_of or 1
        shape = (len(rows), -(-width // multiple) * multiple)
        ids = torch.full(shape, self.pad_token_id)
        attention, completion = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for position, (_, row) in enumerate(rows):
            start, end = len(row.prompt_ids), len(row.prompt_ids) + len(row.answer_ids)
            ids[position, :end] = torch.tensor([*row.prompt_ids, *row.answer_ids])
            attention[position, :end] = 1
            completion[position, start:end] = 1
        # `index` stands first: Trainer takes the batch size of an evaluation step from the first tensor.
        batch = {"index": torch.tensor([item["index"] for item in items])}
        batch |= {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}
        if self.pattern is not None:
            batch["target_ids"] = ids.clone()
            for position, (role, row) in enumerate(rows):
                if role == "forget":
                    start, length = len(row.prompt_ids), len(row.answer_ids)
                    repeated = [self.pattern[i % len(self.pattern)] for i in range(length)]
                    batch["target_ids"][position, start : start + length] = torch.tensor(repeated)
        return batch
