"""Rollouts from a real vLLM server over HTTP: sampled log-probabilities equal the trainer's, after every hand-over."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback

from fdiv.errors import RolloutError
from fdiv.rl.presample.run import presample
from tests.support.runs import dph
from tests.support.runs.f_dpg import SOFT, flat, load, trainer
from tests.support.runs.presample import config, read_lines, write_rows

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def server_process(vllm_python, tiny_model_dir, tmp_path_factory):
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
        yield url, running
    finally:
        running.terminate()
        running.wait(30)


@pytest.fixture(scope="module")
def server(server_process):
    """URL of a running vLLM server; the last test of this file ends it."""
    return server_process[0]


def test_presample_over_http(server, tiny_model_dir, tmp_path):
    """Seeded draws come again; every token lies in the nucleus of the training engine. First: no weights were moved."""
    rows = write_rows(tmp_path / "rows.jsonl")
    settings = config(tiny_model_dir, rows, backend="server", server_url=server, num_samples=8, top_p=0.7)
    for name in ("one", "two"):
        presample(settings, tmp_path / name)
    one, two = (read_lines(tmp_path / name / "samples.jsonl") for name in ("one", "two"))
    assert one == two and len(one) == 80
    assert len({tuple(sample["completion_ids"]) for sample in one if sample["task_id"] == 0}) > 1
    model, tokenizer = load(tiny_model_dir), AutoTokenizer.from_pretrained(tiny_model_dir)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in read_lines(rows)]
    for sample in one:
        prompt, ids = prompts[sample["task_id"]], sample["completion_ids"]
        with torch.no_grad():
            probs = torch.softmax(model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double(), -1)
        drawn = probs[range(len(ids)), ids]
        more_likely = probs.masked_fill(probs <= drawn[:, None], 0.0).sum(-1)
        assert (more_likely < 0.7 + 1e-4).all()


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
    assert abs(history[-1]["kl_to_base"]) > 1e-3, "the weights that were passed had moved"
    assert sorted(path.name for path in (tmp_path / "vllm_weights").iterdir()) == ["version-3"]


def test_adaptive_proposal_stays_in_the_server(server, tiny_model_dir, tmp_path):
    """The server holds q: weights are passed at the start and when π replaces q, not after every step."""
    made = trainer(
        load(tiny_model_dir), tmp_path, SOFT, rollout_server_url=server, max_steps=4, proposal="adaptive",
        proposal_check_every=100, learning_rate=3e-3,
    )  # fmt: skip
    made.train()
    assert [path.name for path in (tmp_path / "vllm_weights").iterdir()] == ["version-0"]
    weights = [entry["importance_weight/max"] for entry in made.state.log_history[:-1]]
    assert weights[0] == pytest.approx(1.0, abs=1e-3) and weights[-1] > 1.001


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_dph_over_http(server, tiny_model_dir, tmp_path, lora):
    """Roll out, update, roll out again: engine and trainer agree on every sampled token before and after each update.

    The server still holds the weights of the test before; the first hand-over replaces them.
    """
    extra = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "learning_rate": 0.1} if lora else {}
    model = str(tiny_model_dir) if lora else load(tiny_model_dir)
    made = dph.trainer(
        model, tmp_path, rollout_server_url=server, max_steps=4, rehearsal=dph.cache(tiny_model_dir),
        rehearsal_batch_size=4, rehearsal_coefficient=0.5, divergence="forward_kl", **extra,
    )  # fmt: skip
    start = flat(made.model)
    made.train()
    history = made.state.log_history[:-1]
    assert len(history) == 4 and (flat(made.model) - start).abs().max() > 1e-3
    for entry in history:
        assert entry["sampling/sampling_logp_difference/max"] < 1e-5
    assert history[-1]["divergence/forward_kl"] > 1e-5, "the weights that were passed had moved"
    # With the first weights the engine would be off by as much as the policy has moved on its own samples.
    engine, log_probs = made._buffered_inputs[0], made._buffered_inputs[0]["sampling_per_token_logps"]
    with made.model.disable_adapter() if lora else restored(made.model, start):
        first = made._score(made.model, engine)
    assert ((first - log_probs).abs() * engine["completion_mask"]).max() > 1e-3
    assert sorted(path.name for path in (tmp_path / "vllm_weights").iterdir()) == ["version-3"]


@contextmanager
def restored(model, weights):
    """The model with `weights`, a vector of all its parameters, inside the block."""
    moved = flat(model)
    torch.nn.utils.vector_to_parameters(weights, model.parameters())
    try:
        yield
    finally:
        torch.nn.utils.vector_to_parameters(moved, model.parameters())


def test_dph_and_a_server_that_dies(server_process, tiny_model_dir, tmp_path):
    """Last in this file: it ends the server after the first step."""
    url, running = server_process

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            running.kill()
            running.wait(30)

    made = dph.trainer(
        load(tiny_model_dir), tmp_path, rollout_server_url=url, max_steps=3, rehearsal=dph.cache(tiny_model_dir),
        rehearsal_batch_size=4, callbacks=[Kill()],
    )  # fmt: skip
    with pytest.raises(RolloutError, match=f"no vLLM server answers at {url}/"):
        made.train()
    assert made.state.global_step == 1
