"""Pre-sampling from a vLLM server: what is asked of it, and what is refused. A stand-in answers on loopback."""

from __future__ import annotations

import threading
from http.server import ThreadingHTTPServer

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

    def do_GET(self):
        self.answer({"data": [{"id": "served", "root": "/models/reference"}]})

    def do_POST(self):
        body = self.read_json()
        self.asked.append(body)
        if self.mode == "dies":
            self.connection.close()
            return
        ids = {"right": [body["seed"] % 97, 2], "empty": [], "no_ids": None}[self.mode]
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
    return ServerSource(url, model, served, stop_token_ids=[2, 7], temperature=0.9, top_p=0.95, seed=5, batch_size=4)


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
        ("dies", "no vLLM server answers at .*correct server_url"),
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


def test_the_server_is_absent():
    with pytest.raises(RolloutError, match="no vLLM server answers at http://127.0.0.1:9/v1/models"):
        source("http://127.0.0.1:9")
