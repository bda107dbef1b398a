"""A teacher behind a server: a stand-in on loopback answers as vLLM does, from a model in memory, or not as it should."""

import math
import threading
from http.server import ThreadingHTTPServer

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fdiv.cli import main
from fdiv.distillation import FDistillConfig, topk_divergence
from fdiv.distillation.cache import TeacherCache
from fdiv.distillation.teach.config import TeachConfig
from fdiv.distillation.teach.run import teach
from fdiv.errors import DataError, RolloutError
from fdiv.inference.prompt_log_probs import PromptLogProbs
from fdiv.models.tiny import build_tiny_model
from fdiv.training.rollouts import RecordedRollouts
from tests.distillation.test_teach import encoded, log_probs_of, write_rows
from tests.support.json_handler import JsonHandler
from tests.support.runs.f_distill import make_teacher, make_trainer, rows


class StandIn(JsonHandler):
    """What `vllm serve --max-logprobs CAP` answers to a prompt of token ids with `prompt_logprobs`."""

    model = None
    root = "/models/teacher"
    cap = 64
    asked: list[dict] = []
    spoil = staticmethod(lambda places: places)  # changes an answer
    fails: dict[int, int | None] = {}  # number of the request → status, or None: the connection is closed

    def do_GET(self):
        self.answer({"data": [{"id": "served", "root": self.root}]})

    def do_POST(self):
        body = self.read_json()
        number = len(self.asked)
        self.asked.append(body)
        if number in self.fails:
            if self.fails[number] is None:
                self.connection.close()
                return
            self.answer({"message": "the engine is loading"}, self.fails[number])
            return
        k = body["prompt_logprobs"]
        if k > self.cap:
            self.answer(
                {"message": f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.cap}"}, 400
            )
            return
        places = self.spoil(self._places(body["prompt"], k))
        self.answer({"choices": [{"index": 0, "text": "", "prompt_logprobs": places}]})

    def _places(self, ids, k):
        with torch.no_grad():
            log_probs = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        places = [None]
        for place, token in enumerate(ids[1:]):
            top = log_probs[place].topk(k)
            known = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)) | {
                token: log_probs[place, token].item()
            }
            order = sorted(known, key=lambda number: -known[number])
            places.append({
                str(number): {"logprob": known[number], "rank": rank + 1, "decoded_token": "x"} for rank, number in enumerate(order)
            })  # fmt: skip
        return places


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def server(teacher_dir, monkeypatch):
    for name, value in (
        ("asked", []), ("fails", {}), ("model", AutoModelForCausalLM.from_pretrained(teacher_dir)), ("root", str(teacher_dir)),
    ):  # fmt: skip
        monkeypatch.setattr(StandIn, name, value)
    monkeypatch.setattr("time.sleep", lambda _: None)
    running = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def served(model_dir, data, output, url, **options):
    spec = {"name": "server", "url": url, "k": 9, **options.pop("spec", {})}
    return make_trainer(model_dir, None, data, output, teacher=spec, **options)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def expected(model_dir, teacher_dir, data, divergence, k):
    total, tokens = 0.0, 0
    for row in encoded(model_dir, data):
        top = log_probs_of(teacher_dir, row).topk(k)
        total += topk_divergence(log_probs_of(model_dir, row), (top.values, top.indices), divergence).sum().item()
        tokens += len(row.completion_ids)
    return total / tokens


# ---------------------------------------------------------------- what is asked and what is made of it
def test_the_top_tokens_of_a_completion(server, teacher_dir, tiny_model_dir):
    data = encoded(tiny_model_dir, rows(3))
    vocabulary = StandIn.model.config.vocab_size
    said = PromptLogProbs(server, None, 5, setting="x").ask(data, vocabulary)
    for row, found in zip(data, said, strict=True):
        log_q = log_probs_of(teacher_dir, row)
        top = log_q.topk(5)
        assert torch.equal(found.ids, top.indices)
        near = {"rtol": 0, "atol": 1e-5, "check_dtype": False}
        torch.testing.assert_close(found.log_probs, top.values, **near)
        torch.testing.assert_close(found.log_tail, (-top.values.exp().sum(-1)).log1p(), **near)
        torch.testing.assert_close(found.own, log_q.gather(1, torch.tensor(row.completion_ids)[:, None])[:, 0], **near)
    body = next(body for body in StandIn.asked if body["prompt"] == [*data[0].prompt_ids, *data[0].completion_ids])
    assert body == {
        "model": "served", "prompt": body["prompt"], "max_tokens": 1, "temperature": 1.0, "seed": 0, "n": 1, "prompt_logprobs": 5,
    }  # fmt: skip


def test_tokens_beyond_the_vocabulary_are_masked(server, tiny_model_dir):
    """What is left is a distribution again; −9999 is no mass."""
    rows_ = [([1], [2])]

    def spoiled(places):
        return [
            None,
            {
                "2": {"logprob": math.log(0.3)},
                "900": {"logprob": math.log(0.4)},
                "3": {"logprob": math.log(0.2)},
                "4": {"logprob": -9999.0},
            },
        ]

    StandIn.spoil = staticmethod(spoiled)
    try:
        (found,) = PromptLogProbs(server, None, 4, setting="x").ask(rows_, 500)
    finally:
        StandIn.spoil = staticmethod(lambda places: places)
    assert found.ids.tolist() == [[2, 3, -1, -1]]
    assert found.log_probs[0, :2].exp().tolist() == pytest.approx([0.5, 1 / 3])
    assert found.log_tail.exp().item() == pytest.approx(1 / 6) and found.own.exp().item() == pytest.approx(0.5)


@pytest.mark.parametrize("spec", ["jensen_shannon", "reverse_kl"])
def test_loss_is_that_of_the_cells(spec, server, tiny_model_dir, teacher_dir, tmp_path):
    trainer = served(tiny_model_dir, rows(4), tmp_path, server, divergence=spec, max_steps=2)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected(tiny_model_dir, teacher_dir, rows(4), spec, 9), rel=1e-3)
    entry = trainer.state.log_history[0]
    assert "log_ratio/tokens_p50" in entry and "teacher_entropy" not in entry
    assert "a lower bound of the divergence" in trainer.notes["teacher"] and trainer.teacher_model is None
    assert trainer.teacher.identity() == [str(teacher_dir), "top 9"]


def test_samples_of_the_student_are_asked_for(server, tiny_model_dir, teacher_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    recorded = [
        {"prompt": row["prompt"], "sample": n, "logprobs": None, "prompt_ids": tokenizer(row["prompt"])["input_ids"],
         "completion_ids": [*tokenizer(f" said {n}")["input_ids"], tokenizer.eos_token_id]}
        for row in rows(4) for n in range(9)
    ]  # fmt: skip
    trainer = served(
        tiny_model_dir,
        rows(4),
        tmp_path,
        server,
        on_policy_share=1.0,
        max_steps=1,
        rollout_func=RecordedRollouts(recorded),
    )
    trainer.train()
    same = [{"prompt": row["prompt"], "completion": " said 0"} for row in rows(4)]
    assert losses(trainer)[0] == pytest.approx(expected(tiny_model_dir, teacher_dir, same, "reverse_kl", 9), rel=1e-3)


# ---------------------------------------------------------------- a server that fails
def test_a_server_that_comes_back(server, tiny_model_dir, teacher_dir, tmp_path):
    """503, 429 and a closed connection are asked again; nothing changes."""
    StandIn.fails |= {1: 503, 2: None, 5: 429}
    trainer = served(tiny_model_dir, rows(4), tmp_path, server, max_steps=1)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(
        expected(tiny_model_dir, teacher_dir, rows(4), "reverse_kl", 9), rel=1e-3
    )
    assert len(StandIn.asked) == 4 + 3


def test_a_server_that_dies_ends_the_run_in_one_line_and_it_goes_on(server, tiny_model_dir, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "divergence": "le_cam"}
    whole = served(tiny_model_dir, rows(), tmp_path / "whole", server, **settings)
    whole.train()
    asked = len(StandIn.asked)
    StandIn.fails |= dict.fromkeys(range(asked + asked // 2, asked * 9))
    dying = served(tiny_model_dir, rows(), tmp_path / "out", server, **settings, spec={"retries": 2})
    with pytest.raises(RolloutError) as raised:
        dying.train()
    message = str(raised.value)
    assert "\n" not in message and "asked 3 times" in message and "correct teacher.url" in message
    assert "checkpoint-" in message and "resume" in message
    assert 0 < dying.state.global_step < 4
    StandIn.fails.clear()
    again = served(tiny_model_dir, rows(), tmp_path / "out", server, **settings)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == pytest.approx(losses(whole), rel=1e-6)


def test_teaching_goes_on_where_the_server_died(server, teacher_dir, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", rows())
    options = {
        "model": str(teacher_dir), "dataset": str(data), "k": 9, "max_completion_length": 24, "batch_size": 2, "part_tokens": 30,
    }  # fmt: skip
    StandIn.fails |= dict.fromkeys(range(7, 100), 500)
    with pytest.raises(RolloutError, match="answered 500: .*asked 5 times"):
        teach(TeachConfig(**options, server_url=server), tmp_path / "served")
    kept = len(list((tmp_path / "served").glob("part-*.safetensors")))
    assert kept > 0
    StandIn.fails.clear()
    StandIn.asked.clear()
    content = teach(TeachConfig(**options, server_url=server), tmp_path / "served")
    assert 0 < len(StandIn.asked) < 12 and content["share"] is None
    teach(TeachConfig(**options), tmp_path / "local")
    every = encoded(teacher_dir, rows())
    one, other = (TeacherCache(tmp_path / name).read(every) for name in ("served", "local"))
    assert torch.equal(one.top.ids, other.top.ids) and one.entropy is None
    torch.testing.assert_close(one.top.log_probs, other.top.log_probs, rtol=0, atol=2e-5)
    torch.testing.assert_close(one.top.log_tail, other.top.log_tail, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- answers that no teacher can have given
def edit(change):
    """Spoil the last place of every answer."""

    def spoil(places):
        change(places[-1])
        return places

    return spoil


def set_first(value):
    return edit(lambda place: place[next(iter(place))].update(logprob=value))


def twice(places):
    places[-1]["0" + next(iter(places[-1]))] = {"logprob": -3.0}
    return places


BAD = {
    "NaN": (set_first(math.nan), "the log-probability of token .* is nan: a number of at most 0 is due"),
    "+inf": (set_first(math.inf), "is inf: a number of at most 0"),
    "positive": (set_first(0.7), "is 0.7: a number of at most 0"),
    "text": (set_first("-1"), "is -1: a number of at most 0"),
    "true": (set_first(True), "is True: a number"),
    "none": (set_first(None), "is None: a number"),
    "too much mass": (edit(lambda place: [entry.update(logprob=-0.1) for entry in place.values()]), "a mass of .*, more than 1"),
    "an id twice": (twice, "the token [0-9]+ stands twice"),
    "no id": (edit(lambda place: place.update({"<s>": {"logprob": -4.0}})), "'<s>' is no token id"),
    "an empty place": (edit(lambda place: place.clear()), "in place of log-probabilities"),
    "null": (lambda places: [*places[:-1], None], "None in place of log-probabilities"),
    "few": (edit(lambda place: [place.pop(key) for key in list(place)[1:-1]]), "start the server with --max-logprobs 9, or lower k"),
    "short": (lambda places: places[1:], "entries as prompt_logprobs for"),
    "no field": (lambda places: None, "gave nothing as prompt_logprobs"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_an_answer_that_cannot_be(case, server, tiny_model_dir, monkeypatch):
    spoil, message = BAD[case]
    monkeypatch.setattr(StandIn, "spoil", staticmethod(spoil))
    asked = PromptLogProbs(server, None, 9, setting="x")
    with pytest.raises(RolloutError, match=message) as raised:
        asked.ask(encoded(tiny_model_dir, rows(1)), StandIn.model.config.vocab_size)
    assert "\n" not in str(raised.value) and len(StandIn.asked) == 1


def test_the_own_token_must_be_there(server, tiny_model_dir, monkeypatch):
    row = encoded(tiny_model_dir, rows(1))[0]
    token = str(row.completion_ids[-1])
    monkeypatch.setattr(StandIn, "spoil", staticmethod(edit(lambda place: place.pop(token, None))))
    with pytest.raises(RolloutError, match=f"no log-probability of the token {token} itself"):
        PromptLogProbs(server, None, 9, setting="x").ask([row], StandIn.model.config.vocab_size)


def test_bytes_that_are_no_json_or_say_a_name_twice(server, tiny_model_dir, monkeypatch):
    asked = PromptLogProbs(server, None, 9, setting="x")
    for content, message in ((b'{"choices": [], "choices": []}', "'choices' stands twice"), (b"<html>", "is no JSON")):
        monkeypatch.setattr(StandIn, "do_POST", lambda self, content=content: self.answer(content))
        with pytest.raises(RolloutError, match=message):
            asked.ask(encoded(tiny_model_dir, rows(1)), 500)


# ---------------------------------------------------------------- what does not fit
def test_a_server_that_does_not_fit(server, tiny_model_dir, teacher_dir, tmp_path, monkeypatch):
    def refused(message, error=DataError, data=None, **options):
        with pytest.raises(error, match=message):
            served(
                options.pop("model_dir", tiny_model_dir),
                data or rows(2),
                tmp_path,
                options.pop("url", server),
                **options,
            )

    refused(
        "serves served, not elsewhere: start the server with the teacher", RolloutError, spec={"model": "elsewhere"}
    )
    refused(r"teacher.k=9999: the teacher served at .* has [0-9]+ tokens", spec={"k": 9999})
    refused("no vLLM server answers at http://127.0.0.1:9/v1/models .*correct teacher.url; asked 1 times", RolloutError,
            url="http://127.0.0.1:9", spec={"retries": 0})  # fmt: skip
    other = build_tiny_model(tmp_path / "other", vocab_texts=["quite other words, and no others"], vocab_size=300)
    refused(r"the teacher served at .*different vocabularies: token \d+ is", model_dir=other)
    monkeypatch.setattr(StandIn, "root", "a-name-of-nothing")
    refused("no tokenizer can be read from 'a-name-of-nothing'.* set teacher.tokenizer")
    trainer = served(tiny_model_dir, rows(4), tmp_path, server, spec={"tokenizer": str(teacher_dir)})
    assert trainer.teacher.vocabulary == StandIn.model.config.vocab_size
    monkeypatch.setattr(StandIn, "cap", 5)
    with pytest.raises(RolloutError, match="greater than max allowed: 5"):
        trainer.train()


def test_options_of_the_server(tmp_path):
    machine = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    spec = {"name": "server", "url": "http://localhost:8000"}
    for options, message in (
        ({"teacher": "server"}, "teacher.url='': it must start with http"),
        ({"teacher": {**spec, "k": 0}}, "k=0: must be at least 1"),
        ({"teacher": {**spec, "retries": -1}}, "retries=-1"),
        ({"teacher": spec, "temperature": 0.7}, "temperature=0.7: a vLLM server gives .* at temperature 1"),
        ({"teacher": spec, "divergence": "cauchy_schwarz"}, "only an f-divergence bounds the whole"),
    ):
        with pytest.raises(ValueError, match=message):
            FDistillConfig(**machine, **options)


def test_the_verb_with_a_server_that_is_absent(teacher_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    data = write_rows(tmp_path / "rows.jsonl", rows(2))
    words = ["teach", "--model", str(teacher_dir), "--dataset", str(data), "--server_url", "http://127.0.0.1:9"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("fdiv: no vLLM server answers at http://127.0.0.1:9") and "server_url" in lines[-1]
