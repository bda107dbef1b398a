"""One row, one encoding: labels of training, labels of evaluation and what a generation goes on from, for templates and
tokenizers of many kinds, rows with odd borders, and every path that encodes."""

from __future__ import annotations

import datetime

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import chat_template_utils
from trl.data_utils import common_prefix_length

from fdiv.alignment.d2o.data import prepare_negatives
from fdiv.errors import DataError
from fdiv.eval.pass_at_k.data import EvalTask
from fdiv.eval.pass_at_k.sampling import encode_task
from fdiv.inference.encoding import DATE_STRING, Encoding, encoding_stamp, template_without_clock
from fdiv.inference.prompting import PromptFormat
from fdiv.rl.presample.data import tokenize_prompts
from fdiv.training.data_checks import tokenize_preferences
from fdiv.unlearning.data import Answer, encode_answer, read_answers, render_chat
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


# ------------------------------------------------------------------------------------------------- every path that encodes


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_pairs_rollouts_and_samples_have_the_same_prompt(template, tokenizer):
    """f-DPO's pairs; D²O's negatives; the prompts of rollouts, pre-sampling and Pass@k, which know no answer."""
    spec, fast = TEMPLATES[template], tokenizer_with(template, tokenizer)
    prompt = messages("Where?", "Here.", "Where does Ana live?")
    answers = {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "Porto"), ("rejected", "Rome"))
    }
    rows = Dataset.from_list([{"prompt": prompt, **answers}])
    asked = fast(rendered(fast, prompt, add_generation_prompt=True), add_special_tokens=False)["input_ids"]

    (pair,) = tokenize_preferences(rows, fast)
    for name in answers:
        row = Encoding().encode(fast, prompt, answers[name])
        assert pair["prompt_ids"] + pair[f"{name}_ids"] == list(row.input_ids)
    assert len(pair["prompt_ids"]) == min(Encoding().encode(fast, prompt, a).prompt_length for a in answers.values())

    shown = _without_spaces if tokenizer == "sentencepiece-like" else str
    (negative,) = prepare_negatives(rows, fast, max_length=None, anchors=0, name="rows")
    assert negative["prompt_ids"] == asked
    assert shown(fast.decode(negative["rejected_ids"])).strip() == shown(spec.answer("Rome") + spec.end).strip()

    assert tokenize_prompts(fast, [prompt]) == [asked]
    assert list(encode_task(EvalTask("1", prompt, "Porto"), fast, PromptFormat(chat_template="never"))) == asked


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_plain_text_is_closed_by_one_end_token(tokenizer):
    """Also where the tokenizer writes one by itself; a prompt that ends in white space costs no answer token."""
    fast = tokenizer_with(None, tokenizer)
    for prompt, answer in (
        ("Q: Where?\nA:", " Porto"),
        ("Q: Where?\nA: ", "Porto"),
        ("Where?\n", "\nPorto "),
        ("a  ", "b"),
    ):
        row = Encoding().encode(fast, prompt, answer)
        trained = encode_answer(Answer(prompt, answer, {}), fast, None)
        assert (trained.prompt_ids, trained.answer_ids) == (list(row.prompt_ids), list(row.label_ids))
        assert row.label_ids[-1] == fast.eos_token_id and fast.eos_token_id not in row.label_ids[:-1]
        assert answer.strip() in fast.decode(row.label_ids)
        (pair,) = tokenize_preferences(
            Dataset.from_list([{"prompt": prompt, "chosen": answer, "rejected": " no"}]), fast
        )
        assert (*pair["prompt_ids"], *pair["chosen_ids"]) == row.input_ids
        (negative,) = prepare_negatives(
            Dataset.from_list([{"prompt": prompt, "rejected": answer}]), fast, max_length=None, anchors=0, name="rows"
        )
        assert [negative["prompt_ids"]] == tokenize_prompts(fast, [prompt])
        together = fast.decode([*negative["prompt_ids"], *negative["rejected_ids"]], skip_special_tokens=True)
        assert _without_spaces(together) == _without_spaces(prompt + answer)
        assert _without_spaces(answer.strip()) in _without_spaces(fast.decode(negative["rejected_ids"]))


def test_an_answer_that_brings_its_thoughts_keeps_them():
    """Nothing of it is taken for the template's own empty thought."""
    thought = "<think>\nwell\n</think>\n\nPorto"
    for template in ("qwen 3", "qwen 3, always thinking", "chatml"):
        fast = tokenizer_with(template)
        row = PromptFormat().encode(fast, "Where?", thought)
        assert fast.decode(row.input_ids).endswith(thought + "<|im_end|>\n")
        opened = "<think>\n" if template == "qwen 3, always thinking" else ""
        assert opened + fast.decode(row.label_ids) == thought + "<|im_end|>\n"
    pair = {"prompt": messages("Where?"), "chosen": messages("", thought)[1:], "rejected": messages("", "Rome")[1:]}
    (both,) = tokenize_preferences(Dataset.from_list([pair]), tokenizer_with("qwen 3"))
    assert tokenizer_with("qwen 3").decode(both["prompt_ids"]).endswith("<|im_start|>assistant\n")


def test_thinking_switched_off_is_one_context_for_all():
    """With `enable_thinking: false` the generation prompt is what labels follow."""
    fast, off = tokenizer_with("qwen 3"), Encoding(chat_template_kwargs={"enable_thinking": False})
    row = off.encode(fast, messages("Where?"), messages("", "Porto")[1:])
    assert list(row.prompt_ids) == off.encode_prompt(fast, messages("Where?"))
    assert fast.decode(row.prompt_ids).endswith("<think>\n\n</think>\n\n")
    assert off.encode_prompt(fast, messages("Where?")) != Encoding().encode_prompt(fast, messages("Where?"))


@pytest.mark.parametrize(
    ("template", "appended"),
    [
        ("chatml", "Porto<|im_end|>\n<|im_end|>"),
        ("gemma", "Porto<end_of_turn>\n<eos>"),
        ("r1", "Porto<|end|>"),
        ("llama 3, a date of its own", "Porto<|eot|>"),
        ("nothing but the contents", "Porto</s>"),
    ],
)
def test_open_unlearnings_end_token_is_a_switch(template, appended):
    """It appends the eos token where a text does not end in one, in training and evaluation."""
    fast = tokenizer_with(template)
    row = PromptFormat(end_token="appended").encode(fast, "Where?", "Porto")
    assert fast.decode(row.label_ids) == appended
    answer = Answer(messages("Where?"), messages("", "Porto")[1:], {})
    assert encode_answer(answer, fast, None, encoding=Encoding(end_token="appended")).answer_ids == list(row.label_ids)
    with pytest.raises(DataError, match="end_token='eos': choose turn or appended"):
        PromptFormat(end_token="eos")


def test_the_system_turn():
    """Before conversations without one; "" is an empty turn; text has none, and some templates refuse it."""
    fast = tokenizer_with("a default system prompt")
    text = {
        system: fast.decode(Encoding(system).encode_prompt(fast, messages("Hi"))) for system in (None, "", "Be kind.")
    }
    assert [text[system].partition("<|im_end|>")[0] for system in text] == [
        "<|im_start|>system\nYou are a helpful assistant.", "<|im_start|>system\n", "<|im_start|>system\nBe kind.",
    ]  # fmt: skip
    own = messages("Hi", system="Mine.")
    assert Encoding("Be kind.").encode_prompt(fast, own) == Encoding().encode_prompt(fast, own)
    with pytest.raises(DataError, match="belongs to conversations"):
        Encoding("Be kind.").encode(fast, "Hi", " you")
    with pytest.raises(DataError, match=r"roles \['system', 'user'\]: no system role"):
        Encoding("Be kind.").encode(tokenizer_with("gemma"), messages("Hi"), messages("", "you")[1:])
    with pytest.raises(DataError, match="never"):
        PromptFormat(chat_template="never", system_prompt="Be kind.")


# ---------------------------------------------------------------------------------------------------------- the clock


@pytest.fixture
def on_a_day(monkeypatch):
    """`on_a_day("2026-12-01")` sets the clock that templates read."""

    def set_clock(day):
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls.fromisoformat(day)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return set_clock


@pytest.mark.parametrize("template", [name for name in TEMPLATES if "date" in name or "clock" in name])
def test_no_input_depends_on_the_clock(template, on_a_day):
    fast, prompt = tokenizer_with(template), messages("Hi")
    pairs = Dataset.from_list([{"prompt": prompt, "chosen": messages("", "a")[1:], "rejected": messages("", "b")[1:]}])

    def everything(encoding):
        return [
            render_chat(fast, prompt, encoding),
            encode_answer(Answer(prompt, messages("", "you")[1:], {}), fast, None, encoding=encoding),
            tokenize_prompts(fast, [prompt], encoding),
            encode_task(EvalTask("1", prompt, ""), fast, PromptFormat(), encoding),
            tokenize_preferences(pairs, fast, encoding=encoding).to_list(),
        ]

    seen = []
    for day in ("2026-12-01", "2027-01-02"):
        on_a_day(day)
        seen.append([everything(Encoding()), everything(Encoding(date_string="10 Apr 2025"))])
    assert seen[0] == seen[1] and seen[0][0] != seen[0][1]
    dates = [fast.decode(ids[0]) for ids in seen[0]]
    assert ("26 Jul 2024" in dates[0] and "10 Apr 2025" in dates[1]) or (
        "July 26, 2024" in dates[0] and "April 10, 2025" in dates[1]
    )


@pytest.mark.parametrize("form", ["%d %b %Y", "%A, %-d %B %Y", "%Y-%m-%d %H:%M", "%d/%m/%y", "%j", "%B %d, %Y"])
@pytest.mark.parametrize("date", [None, "2025-04-10", "10 April 2025", "April 10, 2025"])
def test_every_form_of_a_date_is_that_of_the_fixed_day(form, date):
    fast = tokenizer_with("chatml")
    day = datetime.datetime(2024, 7, 26) if date is None else datetime.datetime(2025, 4, 10)
    template = template_without_clock("{% for m in messages %}{{ strftime_now('" + form + "') }}{% endfor %}", date)
    assert fast.apply_chat_template(messages("Hi"), chat_template=template, tokenize=False) == day.strftime(form)


def test_a_date_that_is_none_is_printed_as_it_stands():
    fast = tokenizer_with("granite, the clock")
    text = fast.decode(Encoding(date_string='the "third" day').encode_prompt(fast, messages("Hi")))
    assert 'Today is the "third" day<|im_end|>' in text
    for lead in ("\n", "  ", "{# a #}\n"):  # the template's own first characters stay
        plain = lead + "{% for m in messages %}{{ m.content }}{% endfor %}{# strftime_now #}"
        made = [
            fast.apply_chat_template(messages("Hi"), chat_template=t, tokenize=False)
            for t in (plain, template_without_clock(plain))
        ]
        assert made[0] == made[1]


# ---------------------------------------------------------------------------------------------------------- the stamp


def test_the_stamp_holds_what_changes_tokens_and_nothing_else():
    chat, dated = tokenizer_with("chatml"), tokenizer_with("granite, the clock")
    assert encoding_stamp(chat, Encoding()) != encoding_stamp(dated, Encoding())
    assert encoding_stamp(dated, Encoding())["date_string"] == DATE_STRING
    assert encoding_stamp(chat, Encoding(date_string="1 Jan 2020")) == encoding_stamp(
        chat, Encoding()
    )  # it prints none
    different = [
        {"system_prompt": "a"}, {"system_prompt": ""}, {"chat_template_kwargs": {"a": 1}}, {"end_token": "appended"},
        {"chat_template": "never"}, {"chat_template": "never", "question_format": "{question}?"},
        {"chat_template": "never", "answer_format": "{answer}"}, {"chat_template": "never", "end_token": "appended"},
    ]  # fmt: skip
    stamps = [PromptFormat(**keys).stamp(dated) for keys in [{}, {"date_string": "1 Jan 2020"}, *different]]
    assert all(stamps.count(stamp) == 1 for stamp in stamps)
    assert PromptFormat(question_format="{question}?").stamp(chat) == PromptFormat().stamp(chat)
