"""Forget and retain rows: TOFU, MUSE or one's own, from the hub or from files, tokenised and paired for training.

Three row formats are read, told apart by their columns:

* `prompt`, `completion`: TRL's prompt-completion type, plain strings or lists of messages;
* `question`, `answer`: TOFU. Rendered with the tokenizer's chat template, or with `prompt_format`;
* `text`: MUSE's raw corpora. Cut into chunks of `max_length` tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import Dataset as TorchDataset

from fdiv.unlearning.pairing import draw_index

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Answer",
    "EncodedAnswer",
    "ForgetDataset",
    "UnlearningCollator",
    "check_disjoint",
    "encode_answer",
    "encode_text",
    "load_rows",
    "read_answers",
    "render_chat",
]

logger = logging.getLogger(__name__)

Text = str | list[dict[str, str]]
_FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


class Answer(NamedTuple):
    """A prompt and an answer to it, both plain strings or both lists of messages; `row` keeps the other columns."""

    prompt: Text
    completion: Text
    row: Mapping[str, Any]

    def with_completion(self, text: str) -> Answer:
        """The same prompt with `text` as the answer, in the format of the present one (role, leading white space)."""
        if isinstance(self.completion, list):
            return self._replace(completion=[{"role": "assistant", "content": text}])
        space = " " if self.completion[:1].isspace() and not text[:1].isspace() else ""
        return self._replace(completion=space + text)


class EncodedAnswer(NamedTuple):
    """Token ids of a prompt and of the answer that is scored; neither is padded."""

    prompt_ids: list[int]
    answer_ids: list[int]


def load_rows(name: str, config: str | None = None, split: str = "train") -> Dataset:
    """A dataset from the hub by name, or from a local file (json, jsonl, parquet, csv, txt) or directory.

    Args:
        name: hub id (`locuslab/TOFU`, `muse-bench/MUSE-News`) or path.
        config: the hub's configuration (TOFU: `forget10`, `retain90`; MUSE: `raw`, `scal`, `sust`).
        split: its split (TOFU: `train`; MUSE: `forget`, `retain1`).

    Raises:
        FileNotFoundError: `name` looks like a path and does not exist.
        ValueError: a file type that is not read, or no rows.
    """
    from datasets import load_dataset

    path = Path(name)
    if path.is_file():
        if path.suffix not in _FILE_FORMATS:
            raise ValueError(
                f"{name}: cannot read {path.suffix!r} files, use one of {', '.join(sorted(_FILE_FORMATS))}"
            )
        rows = load_dataset(_FILE_FORMATS[path.suffix], data_files={split: str(path)}, split=split)
    elif not path.exists() and (path.is_absolute() or name.startswith(".") or path.suffix in _FILE_FORMATS):
        raise FileNotFoundError(f"{name} does not exist: give the path of a file or directory, or a hub dataset id")
    else:
        rows = load_dataset(name, config, split=split)
    if len(rows) == 0:
        raise ValueError(f"{name} (config {config}, split {split}) has no rows")
    return rows


def read_answers(rows: Dataset, *, prompt_format: str | None, has_chat_template: bool, what: str) -> list[Answer]:
    """Bring prompt-completion or TOFU rows into one form.

    Args:
        rows: with columns `prompt`, `completion` or `question`, `answer`.
        prompt_format: for TOFU rows, a format string with `{question}` (the answer follows after a space); None
            makes messages of them, for the tokenizer's chat template.
        has_chat_template: whether the tokenizer has one.
        what: how error messages name the rows ("forget", "retain").

    Raises:
        ValueError: missing columns, an empty prompt or answer, messages without a chat template.
    """
    columns = set(rows.column_names)
    if {"prompt", "completion"} <= columns:
        answers = [Answer(row["prompt"], row["completion"], row) for row in rows]
    elif {"question", "answer"} <= columns and prompt_format is not None:
        answers = [Answer(prompt_format.format(question=r["question"]), " " + r["answer"], r) for r in rows]
    elif {"question", "answer"} <= columns:
        answers = [
            Answer(
                [{"role": "user", "content": row["question"]}], [{"role": "assistant", "content": row["answer"]}], row
            )
            for row in rows
        ]
    else:
        raise ValueError(
            f"the {what} rows have the columns {sorted(columns)}: `prompt` and `completion`, `question` and `answer` "
            "(TOFU), or `text` (MUSE) are needed"
        )
    for position, answer in enumerate(answers):
        if not answer.prompt or not _content(answer.completion).strip():
            raise ValueError(f"{what} row {position} has an empty prompt or answer: fill it in or leave the row out")
        if isinstance(answer.prompt, list) and not has_chat_template:
            raise ValueError(
                f"the {what} rows are questions or messages and the tokenizer has no chat template: set "
                "`prompt_format`, for example 'Question: {question}\\nAnswer:'"
            )
    return answers


def _content(text: Text) -> str:
    """The plain text of a string or of messages."""
    return text if isinstance(text, str) else " ".join(message["content"] for message in text)


def encode_answer(answer: Answer, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> EncodedAnswer:
    """Tokenise prompt and answer together and cut where the tokenised prompt ends.

    Plain text gets the end-of-sequence token, as TRL does; messages go through the chat template. The sequence is cut
    to `max_length` tokens at its end.

    Raises:
        ValueError: no answer token is left (the prompt alone fills `max_length`).
    """
    if isinstance(answer.prompt, list):
        prompt_ids = render_chat(tokenizer, answer.prompt, add_generation_prompt=True)
        ids = render_chat(tokenizer, answer.prompt + answer.completion, add_generation_prompt=False)
    else:
        eos = tokenizer.eos_token or ""
        prompt_ids = tokenizer(answer.prompt)["input_ids"]
        ids = tokenizer(answer.prompt + answer.completion.removesuffix(eos) + eos)["input_ids"]
    start = next((i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b), len(prompt_ids))
    ids = ids[:max_length]
    if start >= len(ids):
        raise ValueError(
            f"no answer token is left after truncation to max_length={max_length}: the prompt has {start} tokens "
            f"({_content(answer.prompt)[:60]!r} …); raise max_length or leave the row out"
        )
    return EncodedAnswer(ids[:start], ids[start:])


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **kwargs: Any) -> list[int]:
    """Token ids of messages under the tokenizer's chat template."""
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)["input_ids"]


def encode_text(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, prompt_tokens: int = 0
) -> list[EncodedAnswer]:
    """Cut raw texts (MUSE) into chunks of at most `max_length` tokens, the beginning-of-sequence token included.

    The first `prompt_tokens` tokens of a chunk are its prompt, the others are scored; a chunk too short to score a
    token is left out.

    Raises:
        ValueError: `prompt_tokens` leaves nothing to score, or no chunk is left.
    """
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    unscored = max(1, len(head) + prompt_tokens)  # the first token of a sequence has no context and is never scored
    if unscored >= max_length:
        raise ValueError(f"text_prompt_tokens={prompt_tokens} leaves no token to score within max_length={max_length}")
    chunks, width = [], max_length - len(head)
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = [head + ids[start : start + width] for start in range(0, len(ids), width)]
        chunks += [EncodedAnswer(piece[:unscored], piece[unscored:]) for piece in pieces if len(piece) > unscored]
    if not chunks:
        raise ValueError(f"no text has more than {unscored} tokens: lower text_prompt_tokens or give longer texts")
    return chunks


def check_disjoint(forget: Sequence[EncodedAnswer], retain: Sequence[EncodedAnswer]) -> None:
    """Refuse forget rows that also stand in the retain set, prompt and answer alike.

    Raises:
        ValueError: with their number.
    """
    kept = {(tuple(row.prompt_ids), tuple(row.answer_ids)) for row in retain}
    both = [i for i, row in enumerate(forget) if (tuple(row.prompt_ids), tuple(row.answer_ids)) in kept]
    if both:
        raise ValueError(
            f"{len(both)} of {len(forget)} forget rows also stand in the retain set (first: forget row {both[0]}): "
            "forgetting and retaining the same row is contradictory; use the retain split that leaves them out"
        )


@dataclass
class ForgetDataset(TorchDataset):
    """Forget rows with their partners, addressed by `epoch * len(self) + index` (see `EpochSampler`).

    A plain index is epoch 0, so evaluation always meets the same partners.

    Args:
        forget: encoded forget answers.
        retain: encoded retain answers to draw from; empty for none.
        templates: per forget row, what its template is drawn from (`templates[i]` is asked for one draw only); None
            for methods without a template.
        answers: the rows before encoding, needed to put a template in the answer's place.
        tokenizer, max_length: for the templates.
        seed: of the draws.
        raw_text: the rows are chunks of raw text.
    """

    forget: Sequence[EncodedAnswer]
    retain: Sequence[EncodedAnswer] = ()
    templates: Sequence[Sequence[str]] | None = None
    answers: Sequence[Answer] = ()
    tokenizer: PreTrainedTokenizerBase | None = None
    max_length: int | None = None
    seed: int = 0
    raw_text: bool = False

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, address: int) -> dict[str, Any]:
        """`index`, `forget` and, where there are any, `retain` and `template`, each an `EncodedAnswer`."""
        epoch, index = divmod(address, len(self.forget))
        item: dict[str, Any] = {"index": index, "forget": self.forget[index]}
        if self.retain:
            item["retain"] = self.retain[draw_index(self.seed, epoch, index, "retain", len(self.retain))]
        if self.templates is not None:
            choices = self.templates[index]
            text = choices[draw_index(self.seed, epoch, index, "template", len(choices))]
            item["template"] = self._encode_template(index, text)
        return item

    def _encode_template(self, index: int, text: str) -> EncodedAnswer:
        """`text` in place of row `index`'s answer; a chunk of raw text is continued by it."""
        answer = self.answers[index].with_completion(text)
        if not self.raw_text:
            return encode_answer(answer, self.tokenizer, self.max_length)
        # The chunk's own tokens are the prompt: decoding and tokenising them again need not give them back.
        prompt_ids = self.forget[index].prompt_ids
        ids = self.tokenizer(answer.completion, add_special_tokens=False)["input_ids"]
        ids = ids if self.tokenizer.eos_token_id is None else [*ids, self.tokenizer.eos_token_id]
        return EncodedAnswer(prompt_ids, ids[: self.max_length - len(prompt_ids)])


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
