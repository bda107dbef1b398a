"""Rollouts from a real vLLM server over HTTP: sampled log-probabilities equal the trainer's, after every hand-over."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
from peft import LoraConfig

from tests.alignment.f_dpg_runs import SOFT, load, trainer

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(vllm_python, tiny_model_dir, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    environment = {
        **os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1", "VLLM_DO_NOT_TRACK": "1",
    }  # fmt: skip
    command = [
        str(vllm_python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_model_dir), "--port",
        str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "128",
        "--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1",
    ]  # fmt: skip
    with log.open("w") as output:
        # Not in the repository: a folder named like a package on its path would shadow it.
        running = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=log.parent)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 500
        while True:
            assert running.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(2)
        yield url
    finally:
        running.terminate()
        running.wait(30)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_f_dpg_over_http(server, tiny_model_dir, tmp_path, lora):
    """π/q stays 1: the server samples from the weights of the step before, merged with the adapter."""
    extra = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "learning_rate": 0.1} if lora else {}
    model = str(tiny_model_dir) if lora else load(tiny_model_dir)
    made = trainer(model, tmp_path, SOFT, rollout_server_url=server, max_steps=4, **extra)
    made.train()
    history = made.state.log_history[:-1]
    assert len(history) == 4
    for entry in history:
        assert entry["importance_weight/mean"] == pytest.approx(1.0, abs=1e-4)
        assert entry["importance_weight/max"] == pytest.approx(1.0, abs=1e-3)
    assert abs(history[-1]["kl_to_base"]) > 1e-3, "the weights that were handed over had moved"
    assert sorted(path.name for path in (tmp_path / "vllm_weights").iterdir()) == ["version-3"]


def test_adaptive_proposal_stays_in_the_server(server, tiny_model_dir, tmp_path):
    """The server holds q: weights are handed over at the start and when π replaces q, not after every step."""
    made = trainer(
        load(tiny_model_dir), tmp_path, SOFT, rollout_server_url=server, max_steps=4, proposal="adaptive",
        proposal_check_every=100, learning_rate=3e-3,
    )  # fmt: skip
    made.train()
    assert [path.name for path in (tmp_path / "vllm_weights").iterdir()] == ["version-0"]
    weights = [entry["importance_weight/max"] for entry in made.state.log_history[:-1]]
    assert weights[0] == pytest.approx(1.0, abs=1e-3) and weights[-1] > 1.001
