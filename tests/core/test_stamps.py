"""What results were made with is compared before they are used together: every kind of record × every key."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fdiv.errors import DataError
from fdiv.eval.benchmark.aggregation import check_retain_log
from fdiv.eval.benchmark.log import EvalLog, read_eval_log, write_eval_log
from fdiv.eval.benchmark.presets import get_preset
from fdiv.eval.muse.aggregate import aggregate_muse
from fdiv.eval.tofu.aggregate import aggregate_tofu
from fdiv.inference.prompting import PromptFormat
from fdiv.models.loading import load_tokenizer
from fdiv.stamps import NOTED, compare_stamps

OTHER = {
    "template": "0" * 16,
    "system_prompt": "Be brief.",
    "date_string": "1 Jan 2020",
    "chat_template_kwargs": {"enable_thinking": False},
    "end_token": "appended",
    "context": "generation",
    "question_format": "### Human: {question}\n### Assistant:",
    "answer_format": "\n{answer}",
    "example_separator": "\n",
    "dtype": "torch.bfloat16",
    "tokenizer": "1" * 24,
    "backend": "vllm",
    "temperature": 0.2,
    "top_p": 0.5,
    "max_new_tokens": 3,
    "stop": ["\n"],
    "scorer": "math",
    "end_tokens": [7],
    "seed": 9,
}
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{{ date_string }}"


@pytest.fixture(scope="module")
def tokenizers(tiny_model_dir):
    """Without and with a chat template."""
    plain, chat = load_tokenizer(str(tiny_model_dir)), load_tokenizer(str(tiny_model_dir))
    plain.chat_template, chat.chat_template = None, CHAT
    return {"plain": plain, "chat": chat}


def stamps(tokenizers) -> dict[str, dict]:
    """The stamps that evaluations write, of either kind of prompt."""
    found = {}
    for name, tokenizer in tokenizers.items():
        found[name] = PromptFormat().stamp(tokenizer) | {"dtype": "torch.float32", "tokenizer": "a" * 24}
    return found


def tofu_log(stamp: dict, source: str) -> EvalLog:
    rows = {"value_by_index": {str(i): {"prob": 0.5, "avg_loss": 0.7} for i in range(4)}}
    return EvalLog({"forget_Q_A_PARA_Prob": rows}, "tofu", "open_unlearning", source, split_stamp(stamp))


def muse_log(stamp: dict, source: str) -> EvalLog:
    scores = {"value_by_index": {str(i): {"score": float(i)} for i in range(4)}}
    return EvalLog(
        {"mia_min_k": {"forget": scores, "holdout": scores}}, "muse", "open_unlearning", source, split_stamp(stamp)
    )


def split_stamp(stamp: dict) -> dict:
    outside = {name: stamp[name] for name in ("dtype", "tokenizer", "backend") if name in stamp}
    return {"prompt": {k: v for k, v in stamp.items() if k not in outside}, **outside}


AGGREGATES = {
    "tofu": (tofu_log, lambda log, retain: aggregate_tofu(log, get_preset("open_unlearning"), retain)),
    "muse": (muse_log, lambda log, retain: aggregate_muse(log, get_preset("open_unlearning"), retain)),
}


@pytest.mark.parametrize("benchmark", AGGREGATES)
@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_retain_logs_by_every_key_of_their_stamps(benchmark, kind, tokenizers, tmp_path):
    """Refused by key, both values and remedy; the number type and the tokenizer are said in the notes."""
    make, aggregate = AGGREGATES[benchmark]
    ours = stamps(tokenizers)[kind]
    path = tmp_path / "retain.json"
    write_eval_log(path, make(ours, "x"))
    assert "retain_log" not in aggregate(make(ours, "own"), read_eval_log(path)).notes
    keys = [key for key in OTHER if key in ours] + ["context"]
    assert {"template", "end_token", "dtype"} < {*keys} and len(keys) >= 7
    for key in keys:
        changed = ours | {key: OTHER[key]}
        write_eval_log(path, make(changed, "x"))
        if key in NOTED:
            note = aggregate(make(ours, "own"), read_eval_log(path)).notes["retain_log"]
            assert f"made with {key}={OTHER[key]!r}, now it is {ours[key]!r}" in note
            continue
        with pytest.raises(DataError) as caught:
            aggregate(make(ours, "own"), read_eval_log(path))
        message = str(caught.value)
        assert f"{path} was made with {key}=" in message and "evaluate the retain model with these settings" in message
        assert repr(OTHER[key]) in message and (key not in ours or repr(ours[key]) in message)
        assert len(message.splitlines()) == 1


def test_a_missing_key_is_a_difference_between_whole_stamps(tokenizers):
    ours = stamps(tokenizers)["chat"]
    for key in ours:
        theirs = {name: value for name, value in ours.items() if name != key}
        if key == "template":  # a stamp of before: it does not say everything
            assert compare_stamps(ours, theirs, "it", "do") == ["it says nothing of template: not compared"]
        elif key in NOTED:
            assert compare_stamps(ours, theirs, "it", "do") == []
        else:
            with pytest.raises(DataError, match=f"made with {key}=.not set., now it is"):
                compare_stamps(ours, theirs, "it", "do")


def test_logs_without_a_stamp_are_accepted_with_a_note(tokenizers):
    ours = tofu_log(stamps(tokenizers)["chat"], "own")
    published = dataclasses.replace(tofu_log({}, "published.json"), stamp={}, checked=False)
    notes = check_retain_log(ours, published, "forget_Q_A_PARA_Prob")
    assert "published.json does not say how its prompts were encoded" in notes[0]
    assert notes[1] == "retain log published.json: no digest: not checked"
    result = aggregate_tofu(ours, get_preset("open_unlearning"), published)
    assert result.notes["retain_log"] == "; ".join(notes)


def test_stamps_of_before_are_compared_as_far_as_they_go():
    """0.2 wrote the fields of the prompt format."""
    before = {"chat_template": "auto", "question_format": "Q: {question}", "answer_format": " {answer}"}
    now = {"template": None, "end_token": "turn", "question_format": "Q: {question}", "answer_format": " {answer}"}
    (note,) = compare_stamps(now, before, "the log", "do it again")
    assert note == "the log says nothing of template, end_token, chat_template: not compared"
    with pytest.raises(DataError, match="the log was made with question_format='A', now it is 'Q: {question}'"):
        compare_stamps(now, before | {"question_format": "A"}, "the log", "do it again")


def test_long_values_are_cut():
    ours, theirs = {"template": None, "x": "a" * 5000}, {"template": None, "x": "b" * 5000}
    with pytest.raises(DataError) as caught:
        compare_stamps(ours, theirs, "it", "do")
    assert len(str(caught.value)) < 500


def test_the_stamp_in_a_file_is_that_of_the_run(tokenizers, tmp_path):
    log = tofu_log(stamps(tokenizers)["plain"], "x")
    write_eval_log(tmp_path / "log.json", log)
    assert read_eval_log(tmp_path / "log.json").made_with() == log.made_with()
    assert json.loads((tmp_path / "log.json").read_text())["fdiv"]["prompt"]["end_token"] == "turn"
