"""Pass@k from OpenAI-compatible servers: what is asked, what fails, what is kept. Stand-ins answer on loopback."""

from __future__ import annotations

import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from fdiv.cli import main
from fdiv.errors import DataError, RolloutError
from fdiv.inference import servers as servers_module
from fdiv.inference.backends import request_seed
from fdiv.inference.cache import ItemCache
from fdiv.inference.sampling import SamplingRequest
from fdiv.inference.servers import CompletionServers, addresses
from tests.support.completion_server import CompletionServer, echo
from tests.support.json_handler import JsonHandler


def requests(tasks: int = 4, samples: int = 3) -> list[SamplingRequest]:
    return [
        SamplingRequest(f"t{task}#{sample:06d}", (10 + task, 11), 20, stream=(task, sample))
        for task in range(tasks)
        for sample in range(samples)
    ]


def asking(*servers: CompletionServer, **options) -> CompletionServers:
    given = {"count_tokens": len, "seed": 5, "concurrency": 2, "pause": 0.01, "timeout": 20.0} | options
    return CompletionServers([server.url for server in servers], "m", **given)


def expected(request: SamplingRequest, small: bool = True) -> str:
    seed = request_seed(5, request.stream)
    return echo({"prompt": request.prompt_ids, "seed": seed & (2**31 - 1) if small else seed})["text"]


def memory() -> ItemCache:
    return ItemCache(None, "samples", "")


# ---------------------------------------------------------------- what is asked
def test_a_plain_server_is_asked_in_openai_words_alone():
    with CompletionServer("m") as server:
        made = asking(server, stop=list("abcdef"), stop_token_ids=[2], temperature=0.7, top_p=0.9)
        found = made.draw(requests(1, 1), memory(), "sampling")
    (one,) = requests(1, 1)
    assert server.asked == [
        {
            "model": "m", "prompt": [10, 11], "max_tokens": 20, "temperature": 0.7, "top_p": 0.9, "n": 1,
            "seed": request_seed(5, (0, 0)) & (2**31 - 1), "stop": ["a", "b", "c", "d"],
        }
    ]  # fmt: skip
    assert found[one.key]["completion"] == expected(one)


def test_vllm_is_told_all_that_it_would_fill_in_and_gives_token_ids():
    reply = lambda body: {"text": "x", "token_ids": [body["seed"] % 97, 2], "finish_reason": "stop"}  # noqa: E731
    with CompletionServer("m", owned_by="vllm", reply=reply) as server:
        found = asking(server, stop=["e"], stop_token_ids=[7, 2]).draw(
            requests(1, 1), memory(), "sampling", temperature=0.0
        )
    seed = request_seed(5, (0, 0))
    assert found == {"t0#000000": {"key": "t0#000000", "ids": [seed % 97, 2]}}
    assert server.asked == [
        {
            "model": "m", "prompt": [10, 11], "max_tokens": 20, "temperature": 0.0, "top_p": 1.0, "n": 1, "seed": seed,
            "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True, "stop": ["e"],
            "stop_token_ids": [2, 7],
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "usage", "record"),
    [
        ({"text": "four", "finish_reason": "stop", "logprobs": None}, {"completion_tokens": 9}, ("four", 9, "stop")),
        ({"text": "four", "finish_reason": "length"}, None, ("four", 4, "length")),
        ({"text": "fo\nur", "finish_reason": "stop"}, None, ("fo", 5, "stop_text")),
        ({"text": "fo", "finish_reason": "stop", "stop_reason": "\n"}, None, ("fo", 2, "stop_text")),
        ({"text": "four"}, None, ("four", 4, "stop")),
        ({"text": "f" * 20}, None, ("f" * 20, 20, "length")),
        ({"text": "", "finish_reason": "stop", "token_ids": []}, {"completion_tokens": 1}, ("", 1, "stop")),
    ],
)
def test_what_an_answer_means(choice, usage, record):
    answer = {"choices": [choice]} | ({} if usage is None else {"usage": usage})
    with CompletionServer("m", plan=lambda number, body: answer) as server:
        (found,) = asking(server, stop=["\n"]).draw(requests(1, 1), memory(), "sampling").values()
    assert (found["completion"], found["tokens"], found["finish_reason"]) == record


def test_tasks_stay_together_and_requests_are_bounded():
    # Each answer takes a while, so that more requests than allowed would meet.
    one, two = (CompletionServer("m", plan=lambda number, body: time.sleep(0.02)) for _ in range(2))
    with one, two:
        found = asking(one, two, concurrency=3).draw(requests(20, 4), memory(), "sampling")
    assert {key: record["completion"] for key, record in found.items()} == {
        r.key: expected(r) for r in requests(20, 4)
    }
    assert len(one.asked) + len(two.asked) == 80 and one.asked and two.asked
    assert 1 <= one.most_at_once <= 3 and 1 <= two.most_at_once <= 3
    split = {body["prompt"][0] for body in one.asked} & {body["prompt"][0] for body in two.asked}
    assert len(split) <= 4  # but for the last ones, where the server that is ready helps the other


def test_answers_out_of_order_are_each_its_own_samples():
    with CompletionServer("m", first_waits=0.3) as server:
        found = asking(server, concurrency=4).draw(requests(2, 4), memory(), "sampling")
    assert {key: record["completion"] for key, record in found.items()} == {r.key: expected(r) for r in requests(2, 4)}


# ---------------------------------------------------------------- what fails
@pytest.mark.parametrize("status", [429, 500, 503, 0])
def test_a_server_that_cannot_just_now_is_asked_again(status):
    with CompletionServer("m", plan=lambda number, body: status if number in (1, 2, 5) else None) as server:
        found = asking(server).draw(requests(), memory(), "sampling")
    assert len(found) == 12 and len(server.asked) == 15 and len(server.answered) == 12


def test_a_timeout_is_asked_again():
    with CompletionServer("m", first_waits=8.0) as server:
        assert len(asking(server, timeout=2.0).draw(requests(1, 2), memory(), "sampling")) == 2


def test_what_a_dead_server_had_goes_to_the_others(capsys):
    one = CompletionServer("m", plan=lambda number, body: 0 if number > 5 else None)
    two = CompletionServer("m")
    with one, two:
        made = asking(one, two)
        found = made.draw(requests(10, 4), memory(), "sampling")
    assert {key: record["completion"] for key, record in found.items()} == {
        r.key: expected(r) for r in requests(10, 4)
    }
    assert len(one.answered) == 5 and len(two.answered) == 35
    assert made.living() == [1]
    assert capsys.readouterr().err.count("goes on without a server, its tasks go to the others") == 1


def test_all_dead_keeps_what_came_and_asks_the_rest_again(tmp_path):
    cache = lambda: ItemCache(tmp_path, "samples", "x")  # noqa: E731
    with CompletionServer("m", plan=lambda number, body: 503 if number > 7 else None) as server:
        with pytest.raises(
            RolloutError, match=r"no server answers any more \(.*503.*\): 7 of 12 samples are kept; start"
        ):
            asking(server).draw(requests(), cache(), "sampling")
    first = Counter((body["prompt"][0], body["seed"]) for body in server.answered)
    with CompletionServer("m") as server:
        found = asking(server).draw(requests(), cache(), "sampling")
    second = Counter((body["prompt"][0], body["seed"]) for body in server.answered)
    assert len(first) == 7 and len(second) == 5 and not first & second
    assert {key: record["completion"] for key, record in found.items()} == {r.key: expected(r) for r in requests()}


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (400, "answered 400: .*planned 400"),
        ({"choices": []}, "gave no completion for sample t0#00000.: the server must have OpenAI's"),
        ({"choices": [{"text": None}]}, "gave no completion"),
        ({"nothing": 1}, "gave no completion"),
        ({"choices": [{"text": "x", "token_ids": ["a"]}]}, "sample t0#00000.: 'a' in place of a token id of 500"),
        ({"choices": [{"text": "x", "token_ids": [4, None]}]}, "None in place of a token id"),
        ({"choices": [{"text": "x", "token_ids": [-5]}]}, "-5 in place of a token id"),
        ({"choices": [{"text": "x", "token_ids": [500]}]}, "500 in place of a token id of 500"),
        ({"choices": [{"text": "x", "token_ids": [4] * 21}]}, "21 tokens, and 20 at most were asked for"),
    ],
)
def test_answers_that_cannot_be_used_end_the_run(reply, message):
    with CompletionServer("m", plan=lambda number, body: reply) as server, pytest.raises(RolloutError, match=message):
        asking(server, vocabulary=500).draw(requests(), memory(), "sampling")


@pytest.mark.parametrize("reset", [True, False])
def test_an_error_whose_text_does_not_come_is_asked_again(reset):
    """The head of a 500, and then a broken connection or nothing: it ended the run as `Connection reset by peer`."""
    seen = []

    class Broken(JsonHandler):
        def do_GET(self):
            self.answer({"data": [{"id": "m"}]})

        def do_POST(self):
            self.read_json()
            seen.append(1)
            if len(seen) > 1:
                self.answer({"choices": [{"text": "x", "finish_reason": "stop"}]})
                return
            self.wfile.write(b"HTTP/1.1 500 X\r\nContent-Length: 1000\r\n\r\nab")
            self.wfile.flush()
            if reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            else:
                time.sleep(1.5)

    running = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        made = CompletionServers(
            [f"http://127.0.0.1:{running.server_port}"], "m", count_tokens=len, pause=0.01, timeout=0.5
        )
        found = made.draw(requests(1, 1), memory(), "sampling")
    finally:
        running.shutdown()
        running.server_close()
    assert len(seen) == 2 and [record["completion"] for record in found.values()] == ["x"]


def test_a_server_with_another_model_and_one_that_is_absent(capsys):
    with CompletionServer("m") as server:
        with pytest.raises(RolloutError, match=r"serves m, not other: start it with this model, .* --server_model"):
            CompletionServers([server.url], "other", count_tokens=len)
        assert CompletionServers([server.url], "other", "m", count_tokens=len).names == ["m"]
        made = CompletionServers([server.url, "http://127.0.0.1:9"], "m", count_tokens=len)
        assert made.living() == [0] and "goes on without a server" in capsys.readouterr().err
    with pytest.raises(RolloutError, match=r"no vLLM server answers at http://127.0.0.1:9/v1/models .*--server_url"):
        CompletionServers(["http://127.0.0.1:9"], "m", count_tokens=len)


def test_a_prompt_beyond_the_servers_context():
    with (
        CompletionServer("m", max_model_len=21) as server,
        pytest.raises(DataError, match="the server's context of 21"),
    ):
        asking(server).draw(requests(), memory(), "sampling")


def test_addresses(capsys):
    same = ["http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"]
    assert addresses([*same, "https://b/x"]) == ["http://a:1", "https://b/x"]
    assert "5 addresses, of which 2 are different" in capsys.readouterr().err
    with pytest.raises(DataError, match="http:// or https://"):
        addresses(["a:1"])
    with pytest.raises(DataError, match="FDIV_API_KEY") as caught:
        addresses(["http://me:hunter22@a:1"])
    assert "hunter22" not in str(caught.value)


def test_the_key_comes_from_the_environment(monkeypatch):
    with CompletionServer("m", key="sesame-7781") as server:
        with pytest.raises(RolloutError, match="answered 401: .*FDIV_API_KEY holds the key"):
            asking(server)
        monkeypatch.setenv("FDIV_API_KEY", "sesame-7781")
        assert len(asking(server).draw(requests(1, 1), memory(), "sampling")) == 1
        monkeypatch.setenv("FDIV_API_KEY", " sesame-7781\n")
        asking(server)
        monkeypatch.setenv("FDIV_API_KEY", "sesame\n7781")
        with pytest.raises(DataError, match="FDIV_API_KEY holds characters that no key has") as caught:
            asking(server)
    assert "Bearer sesame-7781" in server.keys and "7781" not in str(caught.value)


# ---------------------------------------------------------------- the command
@pytest.fixture
def tasks(tmp_path):
    path = tmp_path / "tasks.jsonl"
    rows = [{"task_id": f"t{i}", "prompt": f"Count {i}:", "answer": str(i)} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def passk(tiny_model_dir, tasks, tmp_path, monkeypatch, capsys):
    """Run the command on servers; (exit code, stderr)."""
    monkeypatch.setattr(servers_module, "_LONGEST_WAIT", 0.01)

    def run(urls, *words, output="out", n=4):
        urls = [urls] if isinstance(urls, str) else urls
        fixed = [
            "--model",
            str(tiny_model_dir),
            "--dataset",
            str(tasks),
            "--n",
            str(n),
            "--k",
            "1,2",
            "--max_new_tokens",
            "9",
        ]
        fixed += ["--server_url", *urls, "--batch_size", "2", "--output", str(tmp_path / output)]
        capsys.readouterr()
        return main(["eval", "passk", *fixed, *map(str, words)]), capsys.readouterr().err

    return run


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_run_and_resume_ask_no_sample_twice(passk, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("FDIV_API_KEY", "sesame-7781")
    with CompletionServer(str(tiny_model_dir), key="sesame-7781") as server:
        code, _ = passk([f"{server.url}/v1/", server.url], "--greedy")
        assert code == 0 and len(server.asked) == 25
        rows = lines(tmp_path / "out" / "samples.jsonl")
        assert [(row["task_id"], row["sample"]) for row in rows] == [(f"t{i}", s) for i in range(5) for s in range(4)]
        out = json.loads((tmp_path / "out" / "out.json").read_text())
        reasons = Counter(row["finish_reason"] for row in (*rows, *lines(tmp_path / "out" / "greedy.jsonl")))
        assert out["finish_reasons"] == dict(sorted(reasons.items())) and reasons["length"] > 0
        assert out["servers"] == [server.url] and out["served_model"] == [str(tiny_model_dir)]
        made = json.loads((tmp_path / "out" / "settings.json").read_text())["made_with"]
        assert (made["backend"], made["temperature"], made["seed"]) == ("server", 1.0, 0)
        whole = (tmp_path / "out" / "samples.jsonl").read_bytes()

        (cache,) = (tmp_path / "out" / "cache").glob("samples-*/rank0.jsonl")
        kept = cache.read_text().splitlines(keepends=True)
        cache.write_text("".join(kept[:12]) + kept[12][:30])  # killed while writing the thirteenth
        server.asked.clear()
        assert passk(server.url, "--greedy")[0] == 0 and len(server.asked) == 8
        assert (tmp_path / "out" / "samples.jsonl").read_bytes() == whole

        server.asked.clear()
        assert passk(server.url, n=6)[0] == 0 and len(server.asked) == 10  # two more of each of five problems
        assert len(lines(tmp_path / "out" / "samples.jsonl")) == 30
        code, said = passk(server.url, "--seed", "1")
        assert code == 1 and "holds samples made with seed: 0, not 1" in said
        code, said = passk(server.url, "--server_model", "other")
        assert code == 1 and "not other" in said
    for file in (tmp_path / "out").rglob("*"):
        assert not file.is_file() or b"sesame-7781" not in file.read_bytes(), file


def test_a_key_is_not_in_an_error(passk, tiny_model_dir, monkeypatch):
    monkeypatch.setenv("FDIV_API_KEY", "sesame-7781")
    plan = lambda number, body: {"choices": [], "echo": "sesame-7781"}  # noqa: E731
    with CompletionServer(str(tiny_model_dir), plan=plan) as server:
        code, said = passk(server.url)
    assert code == 1 and "gave no completion" in said and "sesame" not in said


def test_all_servers_die_half_way_and_the_run_goes_on_later(passk, tiny_model_dir, tmp_path):
    dying = CompletionServer(str(tiny_model_dir), plan=lambda number, body: 500 if number > 6 else None)
    with dying:
        code, said = passk(dying.url)
    assert code == 1 and "6 of 20 samples are kept; start one, and run the same command again" in said.splitlines()[-1]
    assert not (tmp_path / "out" / "samples.jsonl").exists()
    with CompletionServer(str(tiny_model_dir)) as server:
        assert passk(server.url)[0] == 0 and len(server.asked) == 14
        assert passk(server.url, output="whole")[0] == 0
    for name in ("samples.jsonl",):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "whole" / name).read_text()


def _kept(output: Path) -> int:
    """Whole lines in the cache of samples."""
    return sum(file.read_text().count("\n") for file in output.glob("cache/samples-*/rank*.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_killed_and_resumed(passk, tiny_model_dir, tasks, tmp_path, number, code):
    """What was answered before the kill and kept is not asked again; at most what was under way is."""
    ended = threading.Event()

    def slowly(asked: int, body: dict) -> None:
        if 9 < asked < 12:  # both threads wait, with nine answers kept, until the process has ended
            ended.wait(300)

    with CompletionServer(str(tiny_model_dir), plan=slowly) as server:
        words = ["--model", tiny_model_dir, "--dataset", tasks, "--n", "4", "--k", "1,2", "--max_new_tokens", "9"]
        words += ["--server_url", server.url, "--batch_size", "2", "--output", tmp_path / "out"]
        command = [sys.executable, "-m", "fdiv", "eval", "passk", *map(str, words)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        stop = time.monotonic() + 240
        while (len(server.asked), _kept(tmp_path / "out")) != (11, 9):
            assert time.monotonic() < stop and process.poll() is None, (
                len(server.asked),
                process.communicate(timeout=60),
            )
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        ended.set()
        assert process.returncode == code
        assert ("fdiv: terminated (SIGTERM): run the same command again" in said) == (code == 143)
        before = len(server.asked)
        assert 9 < before < 20
        assert passk(server.url)[0] == 0
        assert 20 <= len(server.asked) <= 22  # two were under way
        assert passk(server.url, output="whole")[0] == 0
    assert (tmp_path / "out" / "samples.jsonl").read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend", "vllm"], "leave one of them out"),
        (["--adapter", "a"], "--adapter does not go with --server_url"),
        (["--server_timeout", "0"], "--server_timeout 0.0: must be above 0"),
        (["--decode", "contrastive", "--stripped_prompt", "{question}"], "a server samples each prompt by itself"),
        (["--accelerate", "cpu_ddp"], "one process asks the servers"),
    ],
)
def test_what_does_not_go_with_servers(passk, words, message):
    code, said = passk("http://127.0.0.1:9", *words)
    assert code in (1, 2) and message in said and said.count("\n") == 1


def test_the_probe_asks_each_problem_once_and_keeps_nothing(passk, tiny_model_dir, tmp_path, capsys):
    with CompletionServer(str(tiny_model_dir)) as server:
        assert passk(server.url, "--dry_run")[0] == 0 and server.asked == []
        assert main(
            ["eval", "passk", "--model", str(tiny_model_dir), "--dataset", str(tmp_path / "tasks.jsonl"), "--dry_run",
             "--probe", "3", "--server_url", server.url, "--n", "4", "--k", "1"]
        ) == 0  # fmt: skip
        assert len({tuple(body["prompt"]) for body in server.asked}) == len(server.asked) == 3
    shown = capsys.readouterr().out
    assert "20 requests to 1 server, 64 at once each" in shown and "3 requests at once" in shown
    assert not (tmp_path / "out").exists()


def test_work_waits_for_what_may_come_back():
    work = servers_module._Work(requests(1, 2), 2)
    first, second = work.take(0), work.take(1)
    assert (first.key, second.key) == ("t0#000000", "t0#000001")
    got: list = []
    waiting = threading.Thread(target=lambda: got.append(work.take(1)))
    waiting.start()
    work.done()
    work.give_back(0, first)
    waiting.join(10)
    assert got == [first]
