"""Pre-sampling from a vLLM server: what is asked of it, and what is refused. A stand-in answers on loopback."""

from __future__ import annotations

import threading
from http.server import ThreadingHTTPServer
from typing import ClassVar

import pytest

from fdiv.errors import RolloutError
from fdiv.inference.backends import ServerSource, request_seed
from fdiv.inference.cache import ItemCache
from fdiv.inference.sampling import SamplingRequest
from tests.support.json_handler import JsonHandler


class StandIn(JsonHandler):
    """Answers every prompt with its own seed's last digits as tokens; records the requests."""

    asked: list[dict] = []
    mode = "right"
    odd: ClassVar[dict] = {
        "nothing": None, "list": [1], "text": {"choices": ["x"]}, "word": {"choices": [{"token_ids": ["a"]}]},
        "null": {"choices": [{"token_ids": [3, None]}]}, "negative": {"choices": [{"token_ids": [-5]}]},
        "beyond": {"choices": [{"token_ids": [500]}]}, "long": {"choices": [{"token_ids": [3] * 21}]},
    }  # fmt: skip

    def do_GET(self):
        self.answer({"data": [{"id": "served", "root": "/models/reference"}]})

    def do_POST(self):
        body = self.read_json()
        self.asked.append(body)
        if self.mode == "dies":
            self.connection.close()
            return
        if self.mode == "busy" and len(self.asked) % 2:
            self.send_error(503)
            return
        if self.mode in self.odd:
            self.answer(self.odd[self.mode])
            return
        ids = {"right": [body["seed"] % 97, 2], "busy": [5, 2], "empty": [], "no_ids": None}[self.mode]
        self.answer({"choices": [{"index": 0, "text": "", **({} if ids is None else {"token_ids": ids})}]})


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(StandIn, "asked", [])
    running = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def source(url: str, model: str = "/models/reference", served: str | None = None) -> ServerSource:
    settings = {"temperature": 0.9, "top_p": 0.95, "seed": 5, "batch_size": 4, "vocabulary": 500, "first_wait": 0.01}
    return ServerSource(url, model, served, stop_token_ids=[2, 7], **settings)


def requests(count: int = 6) -> list[SamplingRequest]:
    return [SamplingRequest(f"{i}/0", (10 + i, 11), 20, stream=(i, 0)) for i in range(count)]


def test_each_sample_is_asked_for_with_its_own_seed(server):
    drawn = source(server).draw(requests(), ItemCache(None, "samples", ""), "sampling")
    assert drawn == {f"{i}/0": (request_seed(5, (i, 0)) % 97, 2) for i in range(6)}
    assert len({body["seed"] for body in StandIn.asked}) == 6
    body = next(body for body in StandIn.asked if body["prompt"] == [13, 11])
    assert body.pop("seed") == request_seed(5, (3, 0)) < 2**63
    assert body == {
        "model": "served", "prompt": [13, 11], "max_tokens": 20, "temperature": 0.9, "top_p": 0.95, "top_k": -1,
        "min_p": 0.0, "repetition_penalty": 1.0, "stop_token_ids": [2, 7], "return_token_ids": True,
    }  # fmt: skip


def test_a_server_with_another_model_is_refused(server):
    with pytest.raises(RolloutError, match="serves served, not /models/other: .*server_model"):
        source(server, "/models/other")
    assert source(server, "/models/other", "served").served == "served"
    with pytest.raises(RolloutError, match="serves served, not adapter"):
        source(server, served="adapter")


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("empty", "returned no tokens for sample 0/0"),
        ("no_ids", "returned no tokens for sample 0/0"),
        ("dies", "no vLLM server answers at .*correct server_url; asked 5 times"),
        ("nothing", "returned no tokens for sample 0/0"),
        ("list", "returned no tokens for sample 0/0"),
        ("text", "returned no tokens for sample 0/0"),
        ("word", "sample 0/0: 'a' in place of a token id of 500"),
        ("null", "sample 0/0: None in place of a token id"),
        ("negative", "sample 0/0: -5 in place of a token id"),
        ("beyond", "sample 0/0: 500 in place of a token id of 500: does it serve this model"),
        ("long", "sample 0/0: 21 tokens, and 20 at most were asked for"),
    ],
)
def test_answers_that_cannot_be_used(server, monkeypatch, mode, message):
    made = source(server)
    monkeypatch.setattr(StandIn, "mode", mode)
    with pytest.raises(RolloutError, match=message):
        made.draw(requests(1), ItemCache(None, "samples", ""), "sampling")


def test_what_was_answered_before_a_failure_is_not_asked_again(server, tmp_path, monkeypatch):
    made = source(server)
    made.draw(requests()[:4], ItemCache(tmp_path, "samples", "x"), "sampling")
    monkeypatch.setattr(StandIn, "mode", "dies")
    with pytest.raises(RolloutError):
        made.draw(requests(), ItemCache(tmp_path, "samples", "x"), "sampling")
    monkeypatch.setattr(StandIn, "mode", "right")
    StandIn.asked.clear()
    assert len(made.draw(requests(), ItemCache(tmp_path, "samples", "x"), "sampling")) == 6
    assert sorted(body["prompt"][0] for body in StandIn.asked) == [14, 15]


def test_a_busy_server_is_asked_again(server, monkeypatch):
    monkeypatch.setattr(StandIn, "mode", "busy")
    drawn = source(server).draw(requests(2), ItemCache(None, "samples", ""), "sampling")
    assert drawn == {"0/0": (5, 2), "1/0": (5, 2)} and len(StandIn.asked) == 4


def test_the_others_of_a_batch_that_fails_are_kept(server, tmp_path, monkeypatch):
    """One request of four is refused for good; three answers were thrown away with it."""
    made, real = source(server), ServerSource._one

    def one(self, request):
        if request.key == "2/0":
            raise RolloutError("no")
        return real(self, request)

    monkeypatch.setattr(ServerSource, "_one", one)
    with pytest.raises(RolloutError, match="no"):
        made.draw(requests(4), ItemCache(tmp_path, "samples", "x"), "sampling")
    monkeypatch.setattr(ServerSource, "_one", real)
    StandIn.asked.clear()
    assert len(made.draw(requests(4), ItemCache(tmp_path, "samples", "x"), "sampling")) == 4
    assert [body["prompt"][0] for body in StandIn.asked] == [12]


def test_the_server_is_absent():
    with pytest.raises(RolloutError, match="no vLLM server answers at http://127.0.0.1:9/v1/models"):
        source("http://127.0.0.1:9")
