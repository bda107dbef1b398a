"""The rows that a teacher reads, encoded as `FDistillTrainer` encodes them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fdiv.distillation.cache import row_digest
from fdiv.distillation.f_distill.data import TEACHER_PROMPT, check_rows, completion_tokens
from fdiv.distillation.teachers.base import Encoded
from fdiv.errors import DataError
from fdiv.rows.loading import named_dataset
from fdiv.rows.report import RowReport
from fdiv.rows.sources import source_of
from fdiv.training.data_checks import row_variables

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fdiv.distillation.teach.config import TeachConfig

__all__ = ["Taught", "load_rows"]


@dataclass
class Taught:
    """Rows, each once, in the order of the splits; `students`: what the student reads of each, for the share."""

    rows: list[Encoded] = field(default_factory=list)
    students: list[Encoded] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    reports: list[RowReport] = field(default_factory=list)
    is_text: bool = True

    @property
    def digest(self) -> str:
        """Of all token ids, in order."""
        return hashlib.sha256(b"".join(map(row_digest, self.rows))).hexdigest()[:24]

    def name_of(self, number: int) -> str:
        """A row in messages."""
        return self.names[number]


def load_rows(config: TeachConfig, tokenizer: PreTrainedTokenizerBase) -> Taught:
    """The rows of all splits; one that is there twice is read once.

    Raises:
        DataError: no such data or split, rows that cannot be used, too few of them.
    """
    found = named_dataset(config.dataset)
    splits = found if hasattr(found, "keys") else {"train": found}
    taught, seen = Taught(), set()
    ends = _end_ids(config.student or config.model, tokenizer)
    for split in config.splits:
        if split not in splits:
            raise DataError(f"{config.dataset} has no split {split!r}; it has: {', '.join(map(str, splits))}")
        rows = check_rows(splits[split], f"{config.dataset}, split {split!r}", given=True)
        lengths, again, empty = [], 0, 0
        source = source_of(rows, f"{config.dataset}, split {split!r}")
        for number, row in enumerate(rows):
            one, student = _encoded(config, tokenizer, row, ends)
            lengths.append(len(student[1]))
            kept = Encoded(one.prompt_ids, one.completion_ids[: config.max_completion_length])
            digest = row_digest(kept)
            if not kept.completion_ids or digest in seen:
                again, empty = again + (digest in seen), empty + (not kept.completion_ids)
                continue
            seen.add(digest)
            taught.rows.append(kept)
            taught.students.append(Encoded(student[0], kept.completion_ids))
            taught.names.append(str(source.row(number)))
            taught.is_text = taught.is_text and isinstance(row["prompt"], str)
        report = RowReport(
            f"rows of {split}",
            len(rows),
            dropped={"the same tokens as a row before": again},
            max_length=config.max_completion_length,
            cut=sum(length > config.max_completion_length for length in lengths),
            longest=max(lengths, default=0),
            without_signal={"without an answer token": empty},
        )
        taught.reports.append(report)
        report.show()
        if again < len(rows):  # a row that is there twice counts once
            replace(report, read=len(rows) - again, dropped={}).check(config.min_used_fraction)
    if not taught.rows:
        raise DataError(f"{config.dataset} ({', '.join(config.splits)}) has no row with an answer token")
    return taught


def _encoded(
    config: TeachConfig, tokenizer: Any, row: Any, ends: list[int]
) -> tuple[Encoded, tuple[list[int], list[int]]]:
    """What the teacher reads, and what the student does, both with the whole completion."""
    encoding = config.encoding()
    prompt, completion = completion_tokens(tokenizer, row, encoding, ends)
    own = prompt
    if row.get(TEACHER_PROMPT) is not None:
        own = encoding.encode_prompt(tokenizer, row[TEACHER_PROMPT], **row_variables(row))
    return Encoded(own, completion), (prompt, completion)


def _end_ids(model: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: those of the model's generation config, and the tokenizer's."""
    from transformers import GenerationConfig

    from fdiv.models.adapters import base_and_adapter
    from fdiv.models.fetch import find_model

    try:
        named = GenerationConfig.from_pretrained(find_model(base_and_adapter(model)[0])).eos_token_id
    except (OSError, ValueError):
        named = None
    ids = named if isinstance(named, list) else [] if named is None else [named]
    return ids if tokenizer.eos_token_id in ids else [tokenizer.eos_token_id, *ids]
