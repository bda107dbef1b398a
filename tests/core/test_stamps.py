"""What results were made with is compared before they are used together: every kind of record × every key."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from fdiv.alignment.d2o.anchors import Anchor, AnchorCache
from fdiv.cli.command import main
from fdiv.errors import DataError
from fdiv.eval.benchmark.aggregation import check_retain_log
from fdiv.eval.benchmark.log import EvalLog, read_eval_log, write_eval_log
from fdiv.eval.benchmark.presets import get_preset
from fdiv.eval.muse.aggregate import aggregate_muse
from fdiv.eval.pass_at_k.data import EvalTask, LoadedTasks
from fdiv.eval.pass_at_k.evaluation import PassKEvalConfig, write_samples
from fdiv.eval.pass_at_k.records import compare_made_with, read_counts
from fdiv.eval.tofu.aggregate import aggregate_tofu
from fdiv.inference.cache import ItemCache
from fdiv.inference.encoding import Encoding, encoding_stamp
from fdiv.inference.greedy import GenerationRequest, generate_texts
from fdiv.inference.prompting import PromptFormat
from fdiv.models.loading import load_tokenizer
from fdiv.report.records import RunRecord, encoding_notes
from fdiv.rl.dph.rehearsal import RehearsalCache, RehearsalHeader, RehearsalRow
from fdiv.rl.presample.output import enter_directory
from fdiv.stamps import NOTED, compare_stamps
from fdiv.unlearning.data import templates
from fdiv.unlearning.data.rows import Answer

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


# ---------------------------------------------------------------- base samples
SAMPLES = [{"task_id": "a", "sample": 0, "completion": "x", "correct": True}]


def sampled_with(tokenizer, **settings) -> dict:
    """The stamp of samples of one task."""
    loaded = LoadedTasks([EvalTask("a", "Count:", "1")], "exact", ("\n\n",), settings.pop("chat", "auto"))
    config = PassKEvalConfig(n=1, k=[1], **settings)
    return config.made_with(loaded, tokenizer, {2}, seed=0, dtype="torch.float32")


def changed_keys(stamp: dict) -> list[str]:
    assert stamp.keys() <= OTHER.keys(), stamp.keys() - OTHER.keys()
    return list(stamp)


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_base_samples_by_every_key(kind, tokenizers, tmp_path):
    ours = sampled_with(tokenizers[kind])
    keys = changed_keys(ours)
    assert {"template", "temperature", "top_p", "max_new_tokens", "stop", "scorer", "end_tokens", "dtype"} < {*keys}
    path = tmp_path / "samples.jsonl"
    write_samples(path, SAMPLES, ours)
    assert compare_made_with(ours, read_counts(path), str(path)) == []
    for key in keys:
        write_samples(path, SAMPLES, ours | {key: OTHER[key]})
        if key in NOTED:
            (note,) = compare_made_with(ours, read_counts(path), str(path))
            assert f"{path} was made with {key}={OTHER[key]!r}, now it is {ours[key]!r}" in note
        else:
            with pytest.raises(DataError, match=f"{path} was made with {key}=.*, now it is .*: sample the base again"):
                compare_made_with(ours, read_counts(path), str(path))


def test_what_a_stamp_of_samples_follows(tokenizers):
    """Settings of the evaluation and of the tokenizer, and only those that have an effect."""
    plain, chat = tokenizers["plain"], tokenizers["chat"]
    usual = sampled_with(chat)
    assert sampled_with(chat, system_prompt="Be brief.") == usual | {"system_prompt": "Be brief."}
    assert sampled_with(chat, temperature=0.5) == usual | {"temperature": 0.5}
    assert sampled_with(chat, question_format="Q: {question}") == usual  # the template makes the prompt
    assert sampled_with(plain, question_format="Q: {question}")["question_format"] == "Q: {question}"
    assert sampled_with(chat, chat="never")["template"] is None


def test_pass_at_k_of_the_command_line_compares_and_says(tokenizers, tmp_path, capsys):
    ours = sampled_with(tokenizers["chat"])
    write_samples(tmp_path / "ours.jsonl", SAMPLES, ours)

    def compared(base: dict | None) -> int:
        write_samples(tmp_path / "base.jsonl", SAMPLES, base)
        words = ["eval", "passk", "--from_samples", str(tmp_path / "ours.jsonl"), "--base_samples"]
        return main([*words, str(tmp_path / "base.jsonl"), "--k", "1", "--output", str(tmp_path / "out.json")])

    assert compared(ours) == 0
    assert json.loads((tmp_path / "out.json").read_text())["notes"] == {}
    assert compared(ours | {"temperature": 0.5}) == 1
    assert "was made with temperature=0.5, now it is 1.0" in capsys.readouterr().err
    assert compared(ours | {"dtype": "torch.bfloat16"}) == 0
    assert "dtype='torch.bfloat16'" in json.loads((tmp_path / "out.json").read_text())["notes"]["base_samples"]
    assert compared(None) == 0
    assert "does not say" in json.loads((tmp_path / "out.json").read_text())["notes"]["base_samples"]


# ---------------------------------------------------------------- caches of training
@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_presampled_folders_by_every_key(kind, tokenizers, tmp_path):
    encoding = encoding_stamp(tokenizers[kind], Encoding(), chat=True) | {"end_tokens": [2]}
    drawing = {"seed": 0, "encoding": encoding}
    assert enter_directory(tmp_path / "out", drawing, {}, False) is None
    for key in changed_keys(encoding):
        changed = {"seed": 0, "encoding": encoding | {key: OTHER[key]}}
        if key in NOTED:
            assert enter_directory(tmp_path / "out", changed, {}, False) is None
            enter_directory(tmp_path / "out", drawing, {}, False)
            continue
        with pytest.raises(DataError, match=f"{tmp_path / 'out'} was made with {key}=.*, now it is .*: restore the"):
            enter_directory(tmp_path / "out", changed, {}, False)


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_rehearsal_caches_by_every_key(kind, tokenizers, tmp_path):
    ours = encoding_stamp(tokenizers[kind], Encoding(), chat=True)
    settings = {"encoding": ours | {"end_tokens": [2]}, "dtype": "torch.float32"}
    cache = RehearsalCache(RehearsalHeader("t", "m", 1.0, settings=settings), [RehearsalRow("p", [1], [2], [-1.0], 0)])
    cache.save(tmp_path / "c.safetensors")
    loaded = RehearsalCache.load(tmp_path / "c.safetensors")
    now = ours | {"dtype": "torch.float32"}
    assert loaded.check(made_with=now) == []
    for key in changed_keys(now):
        if key in NOTED:
            (note,) = loaded.check(made_with=now | {key: OTHER[key]})
            assert f"made with {key}={now[key]!r}, now it is {OTHER[key]!r}" in note
        else:
            with pytest.raises(DataError, match=f"c.safetensors was made with {key}=.*: restore the setting, or run"):
                loaded.check(made_with=now | {key: OTHER[key]})
    (note,) = RehearsalCache(RehearsalHeader("t", "m", 1.0), cache.rows).check(made_with=now)
    assert "does not say how its prompts were encoded" in note


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_anchors_by_every_key(kind, tokenizers, tmp_path):
    ours = encoding_stamp(tokenizers[kind], Encoding(context="generation"), chat=True)
    ours |= {"dtype": "torch.float32", "tokenizer": "a" * 24, "temperature": 1.0, "top_p": 1.0}
    path = tmp_path / "anchors.jsonl"
    AnchorCache(path, ours).add({"a": [Anchor([1, 2])]})
    assert AnchorCache(path, ours).notes == []
    for key in changed_keys(ours):
        changed = ours | {key: "answer" if key == "context" else OTHER[key]}
        if key in NOTED:
            assert key in AnchorCache(path, changed).notes[0]
        else:
            with pytest.raises(DataError, match=f"{path} was made with {key}=.*: remove the file, set another"):
                AnchorCache(path, changed)


def test_generated_answers_are_made_again_for_other_prompts(tiny_model_dir, tokenizers, tmp_path, monkeypatch):
    """Another chat template, system prompt, format, number type or end token, or other weights."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    calls = []
    monkeypatch.setattr(templates, "_generate", lambda encoded, *_: calls.append(encoded) or [(0, "An answer")])
    ask = [{"role": "user", "content": "Who?"}]
    answers = [Answer(ask, [{"role": "assistant", "content": "She."}], {})]
    other_template = load_tokenizer(str(tiny_model_dir))
    other_template.chat_template = CHAT.replace("</s>", "</s>\n")
    half = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    moved = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        moved.lm_head.weight.mul_(2.0)
    usual = (answers, {}, model, tokenizers["chat"])
    changes = [
        (answers, {"encoding": Encoding(system_prompt="Be brief.")}, model, tokenizers["chat"]),
        (answers, {"encoding": Encoding(date_string="1 Jan 2020")}, model, tokenizers["chat"]),
        (answers, {"temperature": 0.5}, model, tokenizers["chat"]),
        (answers, {}, model, other_template),
        (answers, {}, half, tokenizers["chat"]),
        (answers, {}, moved, tokenizers["chat"]),
        ([Answer("Who?", " She.", {})], {}, model, tokenizers["chat"]),
    ]
    for rows, settings, network, tokenizer in changes:
        for answer, options, used, encoder in (usual, usual, (rows, settings, network, tokenizer)):
            made = templates.GenerationSettings("m", **options)
            assert templates.generate_templates(answer, made, tmp_path / "t.json", used, encoder) == [["An answer"]]
        assert len(calls) == 2, settings  # the second usual one was read
        calls.clear()


def test_cached_generations_follow_the_end_tokens(tiny_model_dir, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    tokenizer = load_tokenizer(str(tiny_model_dir))
    requests = [GenerationRequest("a", tuple(tokenizer("The capital")["input_ids"]), 3)]
    added = []
    add = ItemCache.add
    monkeypatch.setattr(ItemCache, "add", lambda self, items: added.append(1) or add(self, items))
    for expected in (1, 1):
        generate_texts(model, tokenizer, requests, cache_dir=tmp_path, model_digest="m", progress=False)
        assert len(added) == expected
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    generate_texts(model, tokenizer, requests, cache_dir=tmp_path, model_digest="m", progress=False)
    assert len(added) == 2


# ---------------------------------------------------------------- reports
def test_a_report_says_where_runs_were_encoded_otherwise(tokenizers, tmp_path):
    ours = encoding_stamp(tokenizers["chat"], Encoding(), chat=True)

    def run(name: str, encoding: dict | None) -> RunRecord:
        return RunRecord(name, tmp_path, {} if encoding is None else {"encoding": encoding}, {}, [], "")

    assert encoding_notes([run("a", ours), run("b", ours), run("c", None)]) == []
    for key in changed_keys(ours):
        ((name, line),) = encoding_notes([run("old", None), run("a", ours), run("b", ours | {key: OTHER[key]})])
        assert name == "b" and line == f"it was made with {key}={OTHER[key]!r}, a with {ours[key]!r}"
