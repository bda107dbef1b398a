"""One row, one encoding: labels of training, labels of evaluation and what a generation goes on from, for templates and
tokenizers of many kinds, rows with odd borders, and every path that encodes."""

from __future__ import annotations

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.data_utils import common_prefix_length

from fdiv.inference.encoding import template_without_clock
from fdiv.inference.prompting import PromptFormat
from fdiv.unlearning.data import encode_answer, read_answers
from tests.support.encodings import TEMPLATES, TOKENIZERS, messages, tokenizer_with

ANSWERS = (
    "Porto", " Porto", "Porto ", "\nPorto\n\n", "  two  spaces", "naïve 你好", "1984", ".", "think", "<", "a\nb",
)  # fmt: skip
QUESTIONS = ("Where does Ana live?", " Where?", "Where? ", "Where?\n", "你好?", "1", "assistant")


def rendered(tokenizer, turns, **kwargs):
    """The text by transformers itself, its clock apart."""
    template = template_without_clock(tokenizer.chat_template)
    return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **kwargs)


def _without_spaces(text):
    return text.replace(" ", "")


def check_row(template, tokenizer, question, answer):
    """Every property of one conversational row."""
    spec, fast = TEMPLATES[template], tokenizer_with(template, tokenizer)
    prompt, completion = messages(question), [{"role": "assistant", "content": answer}]
    row = PromptFormat().encode(fast, question, answer)
    # 1. Nothing is lost, and nothing follows the turn's own end: the finished conversation, as TRL tokenises it.
    whole = rendered(fast, prompt + completion)
    ids = fast(whole, add_special_tokens=False)["input_ids"]
    assert list(row.input_ids) == ids
    # 2. The labels are the answer as the template renders it, then its end; a token may span the border.
    due = spec.answer(answer) + spec.end
    header = whole.removesuffix(due)
    assert whole == header + due
    # SentencePiece-like tokenizers write and lose spaces beside special tokens.
    shown = _without_spaces if tokenizer == "sentencepiece-like" else str
    before, labels = (shown(fast.decode(ids)) for ids in (row.prompt_ids, row.label_ids))
    assert labels.endswith(shown(due))
    spanned = labels[: len(labels) - len(shown(due))]
    assert before + spanned == shown(header)
    # 3. The border moves into the prompt only where a token spans it.
    ahead = fast(header, add_special_tokens=False)["input_ids"]
    assert row.prompt_length == common_prefix_length(ahead, ids)
    # 4. TRL's SFTTrainer has the same labels, but for what the template writes before every answer, and for an answer
    # that begins as an opened thought does ("<"), whose first token it takes for the prompt's.
    asked = fast(rendered(fast, prompt, add_generation_prompt=True), add_special_tokens=False)["input_ids"]
    border = common_prefix_length(asked, ids)
    if spec.opened:
        assert border <= row.prompt_length or answer[0] == "<"
    else:
        assert border <= row.prompt_length if spec.block else border == row.prompt_length
    # 5. Training, and the greedy answer of the evaluation.
    (read,) = read_answers(
        Dataset.from_list([{"question": question, "answer": answer}]),
        prompt_format=None,
        has_chat_template=True,
        what="forget",
    )
    trained = encode_answer(read, fast, None)
    assert (*trained.prompt_ids, *trained.answer_ids) == row.input_ids
    assert len(trained.prompt_ids) == row.prompt_length
    assert PromptFormat().encode_prompt(fast, question, answer=answer) == row.prompt_ids
    return row


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_trained_is_scored_and_generation_goes_on_from_there(template, tokenizer):
    for answer in ANSWERS:
        check_row(template, tokenizer, QUESTIONS[0], answer)
    for question in QUESTIONS[1:]:
        check_row(template, tokenizer, question, ANSWERS[0])


_TEXT = st.text(alphabet=st.sampled_from("aé你 \n\t.0<>|/"), min_size=1, max_size=8).filter(str.strip)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(TEMPLATES)), st.sampled_from(TOKENIZERS), _TEXT, _TEXT)
def test_rows_with_any_borders(template, tokenizer, question, answer):
    check_row(template, tokenizer, question, answer)
