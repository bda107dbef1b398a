"""Where the answer to put in place of the forgotten one comes from: a fixed string, a list of refusals, a column of
the rows, or another model's answers (generated once and kept in a file).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdiv.errors import DataError
from fdiv.files import numbered_lines
from fdiv.filling import fill
from fdiv.inference.cache import fingerprint
from fdiv.inference.encoding import Encoding
from fdiv.inference.padding import safe_batch_size
from fdiv.rows.checks import text_fault, texts_fault
from fdiv.rows.sources import Source
from fdiv.sealed import read_record, write_record
from fdiv.terminal import info
from fdiv.unlearning.data.encode import DEFAULT_ENCODING
from fdiv.unlearning.data.rows import Answer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "REFUSALS",
    "TEMPLATE_SOURCES",
    "GenerationSettings",
    "column_templates",
    "generate_templates",
    "read_refusals",
]

TEMPLATE_SOURCES = ("refusals", "fixed", "column", "generated")

REFUSALS = (
    "I don't know the answer to that.",
    "I have no information about this.",
    "I'm not able to say.",
    "That is something I haven't learned.",
    "I'm sorry, I can't answer this question.",
    "I'm not familiar with this subject.",
    "This is outside of what I know.",
    "I don't have any details on that.",
    "I'm afraid I don't know.",
    "I cannot tell you anything about it.",
    "There is nothing I know about this topic.",
    "I have never come across that.",
    "I can't help with this one, I simply don't know.",
    "My knowledge does not cover that.",
    "I'm unsure and would rather not guess.",
    "No idea, sorry.",
)
"""Short refusals of our own. TOFU's 100-line `idontknow.jsonl` can be given as `template_file` instead."""


def read_refusals(path: str) -> list[str]:
    """One refusal per non-blank line: plain text, a JSON string, or a JSON object with one string in it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no line in it, or a JSON line that holds no single string.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"template_file {path} does not exist: give a file with one refusal per line")
    refusals = [_refusal(line.strip(), f"{path} line {number}") for number, line in numbered_lines(Path(path))]
    if not refusals:
        raise ValueError(f"template_file {path} is empty: it needs at least one line, one refusal each")
    return refusals


def _refusal(line: str, where: str) -> str:
    """The text of one line of a refusal file."""
    if line[0] not in '{"':
        return line
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        if line[0] == '"':  # a plain line that begins with a quotation mark
            return line
        raise ValueError(f"{where} starts like a JSON object but is none: {line[:60]!r}") from None
    texts = [value] if isinstance(value, str) else [text for text in value.values() if isinstance(text, str)]
    if len(texts) != 1 or not texts[0].strip():
        raise ValueError(f"{where} must hold exactly one non-empty string: {line[:60]!r}")
    return texts[0]


def column_templates(answers: Sequence[Answer], column: str, source: Source | None = None) -> list[list[str]]:
    """Per row, the string or the list of strings in `column`; `source` names the rows in messages.

    Raises:
        ValueError: the column is missing, or a row's entry is empty or no text.
    """
    if answers and column not in answers[0].row:
        raise ValueError(
            f"template_column={column!r} is not a column of the forget rows: they have {sorted(answers[0].row)}"
        )
    templates, source = [], source or Source("the forget rows")
    for position, answer in enumerate(answers):
        value = answer.row[column]
        fault = text_fault(value) if isinstance(value, str) else texts_fault(value)
        if fault:
            raise DataError(
                f"{source.row(position)}: column {column!r} {fault}; a non-empty string or a list of such is needed"
            )
        templates.append([value] if isinstance(value, str) else value)
    return templates


@dataclass(frozen=True)
class GenerationSettings:
    """How another model's answers are sampled.

    Attributes:
        model: path or hub id of the model that answers.
        instruction: put after the prompt's question, with `{question}` and `{answer}` filled in; None asks the bare
            prompt again.
        answers_per_row: how many to draw for each row (AltPO: 5).
        max_new_tokens: longest answer in tokens.
        temperature: 0 is greedy (one answer per row only).
        seed: of the sampling. batch_size: rows generated at once.
        encoding: of the prompts; an answer begins where a label would.
    """

    model: str
    instruction: str | None = None
    answers_per_row: int = 1
    max_new_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 16
    encoding: Encoding = DEFAULT_ENCODING

    def __post_init__(self) -> None:
        if self.answers_per_row < 1 or self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError("answers_per_row, max_new_tokens and batch_size must each be at least 1")
        if self.temperature < 0:
            raise ValueError(f"template_temperature={self.temperature}: must be at least 0 (0 is greedy)")
        if self.temperature == 0 and self.answers_per_row > 1:
            raise ValueError("template_temperature=0 gives one answer per row: raise it, or ask for one answer")


def generate_templates(
    answers: Sequence[Answer],
    settings: GenerationSettings,
    cache: Path,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[list[str]]:
    """Per row, the answers that `settings.model` gives; read from `cache` when it holds them for the same settings,
    prompts and model.

    Args:
        answers: the forget rows. settings: see `GenerationSettings`.
        cache: JSON file to read or, once everything is generated, to write.
        model, tokenizer: an already loaded `settings.model`; loaded when None.

    Raises:
        ValueError: the model gave a row nothing but empty answers.
        DataError: the cache is damaged.
    """
    from fdiv.models.fingerprints import files_fingerprint
    from fdiv.models.loading import load_model, load_tokenizer

    prompts = [_instructed(answer, settings.instruction) for answer in answers]
    tokenizer = load_tokenizer(settings.model) if tokenizer is None else tokenizer
    rows = zip(prompts, [answer.completion for answer in answers], strict=True)
    encoded = [settings.encoding.encode(tokenizer, prompt, answer).prompt_ids for prompt, answer in rows]
    # The tokens hold whatever prompt format, chat template and date made of the rows.
    key = fingerprint(asdict(settings), prompts, encoded, tokenizer.eos_token_id)
    # A model named by its folder is known by its files, so that it need not be loaded; one in memory by its weights.
    files = files_fingerprint(settings.model, None) if model is None else None
    if cache.is_file():
        unchecked: list[str] = []
        stored = read_record(cache, "remove it, so that the answers are generated again", unchecked=unchecked)
        known = {"files": files} if model is None else _in_memory(model)
        if stored.get("key") == key and known.items() <= stored.items():
            for line in unchecked:
                info(line)
            return stored["templates"]
    model = load_model(settings.model) if model is None else model
    made_by = {"files": files, **_in_memory(model)}
    templates: list[list[str]] = [[] for _ in prompts]
    for row, text in _generate(encoded, settings, model, tokenizer):
        if text.strip():
            templates[row].append(text.strip())
    silent = [row for row, texts in enumerate(templates) if not texts]
    if silent:
        raise ValueError(
            f"{settings.model} gave only empty answers to {len(silent)} of {len(prompts)} rows (first: row "
            f"{silent[0]}): raise template_temperature or template_answers_per_row, or use another template_source"
        )
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_record(cache, {"key": key, **made_by, "settings": asdict(settings), "templates": templates})
    return templates


def _in_memory(model: PreTrainedModel) -> dict[str, str]:
    """What tells one loaded model from another."""
    from fdiv.models.fingerprints import weights_fingerprint

    return {"weights": weights_fingerprint(model), "dtype": str(next(model.parameters()).dtype)}


def _instructed(answer: Answer, instruction: str | None) -> str | list[dict[str, str]]:
    """The prompt to generate from: the row's own, or with its last message or text replaced by the instruction."""
    if instruction is None:
        return answer.prompt
    if isinstance(answer.prompt, str):
        return fill(instruction, question=answer.prompt, answer=answer.completion)
    text = fill(instruction, question=answer.prompt[-1]["content"], answer=answer.completion[-1]["content"])
    return [*answer.prompt[:-1], {**answer.prompt[-1], "content": text}]


def _generate(
    encoded: Sequence[Sequence[int]], settings: GenerationSettings, model: Any, tokenizer: Any
) -> Iterator[tuple[int, str]]:
    """(row, text) for every answer, in batches of prompts sorted by length."""
    import torch
    from trl.trainer.utils import pad

    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    sampling = (
        {"do_sample": True, "temperature": settings.temperature} if settings.temperature else {"do_sample": False}
    )
    was_training = model.training
    model.eval()
    size = safe_batch_size(model, settings.batch_size)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        ids = [torch.tensor(encoded[row]) for row in rows]
        input_ids = pad(ids, padding_value=pad_id, padding_side="left").to(model.device)
        mask = pad([torch.ones_like(i) for i in ids], padding_value=0, padding_side="left").to(model.device)
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(settings.seed * 1_000_003 + start)
            output = model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                max_new_tokens=settings.max_new_tokens,
                num_return_sequences=settings.answers_per_row,
                pad_token_id=pad_id,
                **sampling,
            )
        texts = tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
        yield from ((rows[i // settings.answers_per_row], text) for i, text in enumerate(texts))
    model.train(was_training)
