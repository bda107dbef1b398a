"""Rollout back ends: recorded sampling log-probabilities, position ids, checks, replay, and the HTTP client."""

import http.server
import json
import threading
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fdiv.errors import RolloutError
from fdiv.inference.vllm_server import VLLMServerRollouts, merged_state_dict
from fdiv.models.logprobs import token_scores
from fdiv.training.rollouts import RecordedRollouts, RolloutMixin, check_completions, record_log_probs
from tests.support.json_handler import JsonHandler

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("folder", ["tiny_model_dir", "tiny_gpt2_dir"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_log_probs_are_those_of_the_model(folder, temperature, request):
    path = request.getfixturevalue(folder)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    batch = tokenizer(["The quick brown fox", "0 1", "I do not know"], return_tensors="pt", padding=True)
    with record_log_probs(model, temperature) as recorded:
        output = model.generate(**batch, do_sample=True, temperature=temperature, top_k=0, max_new_tokens=12)
    width = batch["input_ids"].size(1)
    lengths = [12, 5, 1]
    completions = [row[width : width + n].tolist() for row, n in zip(output, lengths, strict=True)]
    log_probs = recorded.of(completions)
    attention = torch.cat([batch["attention_mask"], torch.ones_like(output[:, width:])], 1)
    mask = torch.zeros_like(output)
    mask[:, width:] = 1
    exact = token_scores(model, output, attention, mask, fused=False, temperature=temperature).log_probs[
        :, width - 1 :
    ]
    for row, n in enumerate(lengths):
        assert log_probs[row] == pytest.approx(exact[row, :n].tolist(), abs=2e-5)


def test_completions_are_checked():
    check_completions([[1], [2, 3]], [[-0.1], [-0.2, -0.3]], 2, "x")
    with pytest.raises(RolloutError, match="x returned 1 completions for 2 prompts"):
        check_completions([[1]], None, 2, "x")
    with pytest.raises(RolloutError, match="x returned an empty completion for prompt 1"):
        check_completions([[1], []], None, 2, "x")
    with pytest.raises(RolloutError, match="x returned 1 log-probabilities for the 2 tokens of completion 0"):
        check_completions([[1, 2]], [[-0.1]], 1, "x")


def test_private_hooks_have_the_signatures_we_rely_on():
    import inspect

    from trl import GRPOTrainer

    def parameters(name):
        return list(inspect.signature(getattr(GRPOTrainer, name)).parameters)

    assert parameters("_get_per_token_logps_and_entropies")[:5] == [
        "self", "model", "input_ids", "attention_mask", "logits_to_keep",
    ]  # fmt: skip
    assert parameters("_generate_single_turn")[:5] == [
        "self", "prompt_ids", "images", "multimodal_fields", "num_generations",
    ]  # fmt: skip
    assert parameters("_tokenize_prompts") == ["self", "prompts"]


def single_process(**attributes):
    return SimpleNamespace(accelerator=SimpleNamespace(process_index=0, is_main_process=True), **attributes)


def test_recorded_rollouts_are_found_by_prompt_and_sample(tmp_path):
    records = [
        {"prompt": "a", "sample": n, "prompt_ids": [1], "completion_ids": [10 + n], "logprobs": [-float(n)]}
        for n in range(3)
    ]
    chat = [{"role": "user", "content": "hi"}]
    records.append({"prompt": chat, "sample": 0, "prompt_ids": [2], "completion_ids": [7], "logprobs": [-0.5]})
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    rollouts = RecordedRollouts(path)
    first = rollouts(["a", chat, "a"], single_process())
    assert first["completion_ids"] == [[10], [7], [11]]
    assert first["logprobs"] == [[0.0], [-0.5], [-1.0]]
    assert rollouts(["a"], single_process())["completion_ids"] == [[12]]
    with pytest.raises(RolloutError, match="sample 3 of prompt a was not recorded"):
        rollouts(["a"], single_process())


# ---------------------------------------------------------------- HTTP, against a stand-in for the server
class Server(JsonHandler):
    seen: list = []
    refuse_reload = False

    def do_GET(self):
        self.answer({"data": [{"id": "served-model"}]})

    def do_POST(self):
        body = self.read_json()
        self.seen.append((self.path, body))
        if self.path == "/collective_rpc" and self.refuse_reload:
            self.send_error(404)
        elif self.path == "/v1/completions":
            choices = [
                {"index": n, "token_ids": [n, 3], "logprobs": {"token_logprobs": [-0.25, -n / 2]}}
                for n in range(len(body["prompt"]))
            ]
            self.answer({"choices": choices[::-1]})
        else:
            self.answer({})


@pytest.fixture
def server():
    Server.seen, Server.refuse_reload = [], False
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def fake_trainer(model, step=0):
    accelerator = SimpleNamespace(
        process_index=0,
        is_main_process=True,
        get_state_dict=lambda wrapped: wrapped.state_dict(),
        unwrap_model=lambda wrapped: wrapped,
        wait_for_everyone=lambda: None,
    )
    return SimpleNamespace(
        accelerator=accelerator, model=model, model_wrapped=model, state=SimpleNamespace(global_step=step),
        max_completion_length=4, temperature=0.9, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0,
        eos_token_ids=[3], args=SimpleNamespace(generation_kwargs=None),
        _tokenize_prompts=lambda prompts: ([[len(prompt)] for prompt in prompts], None, {}),
    )  # fmt: skip


def test_http_rollouts_hand_over_weights_once_per_version(server, tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    rollouts = VLLMServerRollouts(server, tmp_path / "sync")
    trainer = fake_trainer(model)
    output = rollouts(["ab", "c"], trainer)
    assert output == {
        "prompt_ids": [[2], [1]],
        "completion_ids": [[0, 3], [1, 3]],
        "logprobs": [[-0.25, -0.0], [-0.25, -0.5]],
    }
    rollouts(["ab"], trainer)
    paths = [path for path, _ in Server.seen]
    assert paths == ["/collective_rpc", "/reset_prefix_cache", "/v1/completions", "/v1/completions"]
    request = Server.seen[2][1]
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("served-model", 4, 0.9)
    assert request["stop_token_ids"] == [3] and "seed" not in request
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    trainer.state.global_step = 1
    rollouts(["ab"], trainer)
    target = Server.seen[4][1]["kwargs"]["weights_path"]
    assert target == str((tmp_path / "sync" / "version-1").resolve())
    assert [path.name for path in (tmp_path / "sync").iterdir()] == ["version-1"], "the old hand-over is removed"
    reloaded = AutoModelForCausalLM.from_pretrained(target)
    torch.testing.assert_close(reloaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_merged_lora_weights_score_like_the_adapter(tiny_model_dir, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = merged_state_dict(model, model.state_dict())
    model.get_base_model().save_pretrained(tmp_path / "merged", state_dict=state)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    with model.disable_adapter():
        assert (merged(ids).logits - model(ids).logits).abs().max() > 1e-2
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_http_errors_say_what_to_do(server, tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with pytest.raises(ValueError, match="rollout_server_url='localhost:8000': it must start with http"):
        VLLMServerRollouts("localhost:8000", tmp_path)
    Server.refuse_reload = True
    with pytest.raises(RolloutError, match=r"answered 404.*VLLM_SERVER_DEV_MODE=1"):
        VLLMServerRollouts(server, tmp_path / "sync")(["a"], fake_trainer(model))
    with pytest.raises(RolloutError, match="no vLLM server answers at http://127.0.0.1:9/collective_rpc"):
        VLLMServerRollouts("http://127.0.0.1:9", tmp_path / "sync")(["a"], fake_trainer(model))


def test_mixin_passes_position_ids(tiny_gpt2_dir):
    """Left padding must not change what a model with learned positions scores; TRL alone gets it wrong."""

    class Base:
        def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep):
            return model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -logits_to_keep:]

    class Trainer(RolloutMixin, Base):
        def __init__(self):
            pass

    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2_dir).eval()
    ids = torch.arange(10, 16)[None]
    padded = torch.nn.functional.pad(ids, (4, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
    exact = model(ids).logits[:, -3:]
    ours = Trainer()._get_per_token_logps_and_entropies(model, padded, mask, 3)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-5)
    theirs = Base()._get_per_token_logps_and_entropies(model, padded, mask, 3)
    assert (theirs - exact).abs().max() > 1e-2


def _said(**parts):
    return {"choices": [{"index": 0, "token_ids": [5], "logprobs": {"token_logprobs": [-0.1]}, **parts}]}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "returned no completions for 1 prompts"),
        ([1], "returned no completions"),
        ({"choices": ["x"]}, "returned 1 completions for 1 prompts, or not one for each"),
        (_said(token_ids=None), "completion 0: None in place of a token id"),
        (_said(token_ids=["a"]), "completion 0: 'a' in place of a token id"),
        (_said(token_ids=[5] * 5), "5 tokens, and 4 at most were asked for"),
        (_said(logprobs=None), "completion 0: no log-probabilities"),
        (_said(logprobs={"token_logprobs": [None]}), "completion 0: no log-probabilities"),
    ],
)
def test_answers_of_a_rollout_server_that_are_none(answer, message, tiny_model_dir, tmp_path, monkeypatch):
    trainer = fake_trainer(AutoModelForCausalLM.from_pretrained(tiny_model_dir))
    rollouts = VLLMServerRollouts("http://127.0.0.1:9", tmp_path)
    rollouts._model, rollouts._version = "m", 0
    monkeypatch.setattr(rollouts, "post", lambda path, body: answer)
    with pytest.raises(RolloutError, match=message):
        rollouts(["a"], trainer)
