"""From datasets and a config to the paired rows of `ForgetDataset`: reading, encoding, templates, checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdiv.errors import DataError
from fdiv.rows.checks import any_text_fault, check_one_format, check_rows
from fdiv.rows.report import RowReport
from fdiv.rows.sources import Source, source_of
from fdiv.unlearning.config import TemplateConfig, UnlearningConfig
from fdiv.unlearning.data.encode import EncodedAnswer, check_disjoint, encode_answer, encode_text
from fdiv.unlearning.data.pairing import ForgetDataset
from fdiv.unlearning.data.rows import Answer, load_rows, read_answers
from fdiv.unlearning.data.templates import REFUSALS, column_templates, generate_templates, read_refusals

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["build_forget_dataset", "read_retain_rows"]


def read_retain_rows(
    rows: Dataset | None,
    args: UnlearningConfig,
    tokenizer: PreTrainedTokenizerBase,
    report: Callable[[RowReport], None] = RowReport.show,
    numbers: list[int] | None = None,
) -> list[EncodedAnswer]:
    """Encode the retain rows, given or named by the config; [] when there are none and none are needed.

    What became of them is passed to `report`; the row number of each is appended to `numbers`.

    Raises:
        ValueError: the retain term needs rows and there are none; both a dataset and a name are given.
    """
    if rows is not None and args.retain_dataset_name is not None:
        raise ValueError(
            f"retain_dataset is given and retain_dataset_name={args.retain_dataset_name!r} too: drop one of the two"
        )
    if rows is None and args.retain_dataset_name is not None:
        rows = load_rows(args.retain_dataset_name, args.retain_dataset_config, args.retain_dataset_split)
    if rows is None or len(rows) == 0:
        if args.retain_term != "none":
            raise ValueError(
                f"retain_term={args.retain_term!r} needs retain rows and there are none: set retain_dataset_name "
                "(TOFU: locuslab/TOFU with retain_dataset_config retain90), or retain_term none where that is valid"
            )
        return []
    encoded, _, origins = _encode(rows, args, tokenizer, "retain", report)
    if numbers is not None:
        numbers += origins
    return encoded


def _encode(
    rows: Dataset,
    args: UnlearningConfig,
    tokenizer: PreTrainedTokenizerBase,
    what: str,
    report: Callable[[RowReport], None],
) -> tuple[list[EncodedAnswer], list[Answer], list[int]]:
    """Encoded rows, the rows themselves and their numbers; of chunks of raw text the decoded prompt and continuation,
    and the number of the text."""
    source = source_of(rows, f"the {what} rows")
    if "text" in rows.column_names:
        check_one_format([*rows.column_names], source, ("text",))
        for name in ("prompt", "completion", "question", "answer"):
            if name in rows.column_names:
                raise DataError(f"{source} has `text` beside `{name}`: it is unclear which is meant; remove one")
        check_rows(rows.select_columns(["text"]), source, {"text": any_text_fault})
        return _encode_texts(rows["text"], args, tokenizer, what, report)
    answers = read_answers(
        rows, prompt_format=args.prompt_format, has_chat_template=tokenizer.chat_template is not None, what=what
    )
    encoded: list[EncodedAnswer] = []
    lengths: list[int] = []
    for position, answer in enumerate(answers):
        try:
            encoded.append(encode_answer(answer, tokenizer, args.max_length, lengths, args.encoding()))
        except ValueError as error:
            raise DataError(f"{source.row(position)}: {error}") from None
    report(_length_report(f"{what} rows", lengths, args.max_length))
    return encoded, answers, list(range(len(answers)))


def _length_report(name: str, lengths: Sequence[int], max_length: int | None) -> RowReport:
    cut = sum(max_length is not None and length > max_length for length in lengths)
    return RowReport(name, len(lengths), max_length=max_length, cut=cut, longest=max(lengths, default=0))


def _encode_texts(
    texts: Sequence[str],
    args: UnlearningConfig,
    tokenizer: PreTrainedTokenizerBase,
    what: str,
    report: Callable[[RowReport], None],
) -> tuple[list[EncodedAnswer], list[Answer], list[int]]:
    """Chunks of raw text. Blank texts, such as the blank lines of a text file, are no rows."""
    numbers, short, origins = [number for number, text in enumerate(texts) if text.strip()], [], []
    texts = [texts[number] for number in numbers]
    encoded = encode_text(texts, tokenizer, args.max_length, args.text_prompt_tokens, short, origins)
    prompts, continued = (
        tokenizer.batch_decode([row[part] for row in encoded], skip_special_tokens=True) for part in (0, 1)
    )
    report(RowReport(f"{what} texts", len(texts), dropped={"too short to score a token": len(short)}))
    answers = [Answer(prompt, text, {}) for prompt, text in zip(prompts, continued, strict=True)]
    return encoded, answers, [numbers[origin] for origin in origins]


def build_forget_dataset(
    rows: Dataset,
    retain: Sequence[EncodedAnswer],
    args: UnlearningConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: Any = None,
    model_name: str = "",
    *,
    name: str = "forget",
    report: Callable[[RowReport], None] = RowReport.show,
    retain_numbers: Sequence[int] = (),
) -> ForgetDataset:
    """Encode the forget rows and pair them with `retain` rows and, for a `TemplateConfig`, with template answers.

    Args:
        rows: forget rows. retain: encoded retain rows to draw from, or none. args: the method's config.
        tokenizer: of the model to be trained.
        model, model_name: that model (an object, or a path) and its path, for `template_source: generated`.
        name: what messages call the rows. report: is told what became of them.
        retain_numbers: the row number of each of `retain`.

    Raises:
        ValueError: see `read_answers`, `encode_answer`, `check_disjoint` and the template sources.
    """
    source = source_of(rows, f"the {name} rows")
    forget, answers, numbers = _encode(rows, args, tokenizer, name, report)
    raw_text = "text" in rows.column_names
    check_disjoint(forget, retain, tokenizer, Source(f"the chunks of {source}") if raw_text else source)
    seed = args.seed if args.data_seed is None else args.data_seed
    templates = None
    if isinstance(args, TemplateConfig):
        if raw_text and args.text_prompt_tokens == 0:
            raise ValueError(
                "a template answer needs a prompt to answer, and raw text rows have none: set text_prompt_tokens"
            )
        templates = _templates(answers, args, tokenizer, model, model_name, source)
        if not raw_text:
            report(_template_report(answers, templates, args, tokenizer, source))
    return ForgetDataset(
        forget, retain, templates, answers, tokenizer, args.max_length, seed, raw_text, args.encoding(),
        numbers, retain_numbers,
    )  # fmt: skip


def _template_report(
    answers: Sequence[Answer],
    templates: Sequence[Sequence[str]],
    args: TemplateConfig,
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
) -> RowReport:
    """What `max_length` does to each row's longest template answer."""
    lengths: list[int] = []
    for position, (answer, texts) in enumerate(zip(answers, templates, strict=True)):
        try:
            encode_answer(
                answer.with_completion(max(texts, key=len)), tokenizer, args.max_length, lengths, args.encoding()
            )
        except ValueError as error:
            raise DataError(f"{source.row(position)}, template answer: {error}") from None
    return _length_report("template rows", lengths, args.max_length)


def _templates(
    answers: Sequence[Answer],
    args: TemplateConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    model_name: str,
    source: Source,
) -> Sequence[Sequence[str]]:
    """Per forget row, the texts its template is sampled from."""
    if args.template_source == "fixed":
        return [(args.template_text,)] * len(answers)
    if args.template_source == "refusals":
        return [REFUSALS if args.template_file is None else read_refusals(args.template_file)] * len(answers)
    if args.template_source == "column":
        return column_templates(answers, args.template_column, source)
    settings = args.generation_settings(model_name or "the model to be trained")
    cache = Path(args.template_cache or Path(args.output_dir) / "templates.json")
    own = args.template_model is None and model is not None and not isinstance(model, str)
    with args.main_process_first(desc="generating template answers"):
        return generate_templates(answers, settings, cache, *((model, tokenizer) if own else ()))
