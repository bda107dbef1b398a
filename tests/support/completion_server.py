"""A stand-in for an OpenAI-compatible server: a completion is a function of prompt and seed; it fails where it is told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from typing import Any

from tests.support.json_handler import JsonHandler

Reply = int | dict[str, Any] | None
"""Instead of an answer: a status, other content, or None to answer as ever."""


class CompletionServer:
    """Runs on loopback between `__enter__` and `__exit__`.

    Args:
        model, owned_by, max_model_len: what `/v1/models` says. plan: (number of the request from 1, its body) → `Reply`.
        ids: give token ids, as vLLM does. key: answer 401 without it. first_waits: seconds the first request waits.
        reply: body → what the one choice holds.
    """

    def __init__(
        self,
        model: str,
        *,
        owned_by: str = "someone",
        max_model_len: int | None = None,
        plan: Callable[[int, dict[str, Any]], Reply] = lambda number, body: None,
        reply: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        key: str | None = None,
        first_waits: float = 0.0,
    ) -> None:
        self.entry = {"id": model, "owned_by": owned_by, "root": model}
        self.entry |= {} if max_model_len is None else {"max_model_len": max_model_len}
        self.plan, self.reply, self.key, self.first_waits = plan, reply or echo, key, first_waits
        self.asked: list[dict[str, Any]] = []
        self.answered: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def __enter__(self) -> CompletionServer:
        owner = self

        class Handler(JsonHandler):
            def do_GET(self):
                self.answer({"data": [owner.entry]})

            def do_POST(self):
                owner._post(self, self.read_json())

            def answer(self, content, status=200):
                owner.keys.add(self.headers.get("Authorization"))
                if owner.key is not None and self.headers.get("Authorization") != f"Bearer {owner.key}":
                    status, content = 401, {"error": "no key"}
                super().answer(content, status)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _post(self, handler: Any, body: dict[str, Any]) -> None:
        with self.lock:
            self.asked.append(body)
            number = len(self.asked)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if number == 1:
                time.sleep(self.first_waits)
            reply = self.plan(number, body)
            content = reply if isinstance(reply, int) else reply or {"choices": [{"index": 0, **self.reply(body)}]}
        finally:
            with self.lock:  # before the answer leaves: whoever has it may ask again at once
                self.at_once -= 1
        if content == 0:  # dies
            handler.connection.close()
        elif isinstance(content, int):
            handler.answer({"error": {"message": f"planned {content}"}}, content)
        else:
            with self.lock:
                self.answered.append(body)
            handler.answer(content)


def echo(body: dict[str, Any]) -> dict[str, Any]:
    """Text that tells prompt and seed; cut at the bound for every seed that 5 divides."""
    cut = body["seed"] % 5 == 0
    return {"text": f"{sum(body['prompt'])}:{body['seed']}", "finish_reason": "length" if cut else "stop"}
