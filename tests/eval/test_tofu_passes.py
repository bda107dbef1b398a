"""The scoring, gradient and generation passes: values against plain torch, and what they must not depend on."""

import pytest
import torch

from fdiv.errors import DataError
from fdiv.eval.metrics.gradient_norms import gradient_norms
from fdiv.inference.cache import ItemCache, fingerprint
from fdiv.inference.greedy import (
    GenerationRequest,
    VLLMSource,
    draft_from_scores,
    generate_texts,
    generate_with_vllm,
    generates_plain_argmax,
)
from fdiv.inference.label_logits import shares_prompts
from fdiv.inference.prompting import EncodedText, PromptFormat
from fdiv.inference.scoring import ScoringRequest, label_statistics, score_texts
from fdiv.models.fingerprints import weights_fingerprint
from fdiv.models.loading import load_model, load_tokenizer


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def loaded(request, tiny_model_dir, tiny_gpt2_dir):
    folder = str(tiny_model_dir if request.param == "llama" else tiny_gpt2_dir)
    return load_model(folder), load_tokenizer(folder)


def requests_of(tokenizer):
    """Two questions with three answers each of different lengths, one text without a prompt, one without labels."""
    prompt, requests = PromptFormat(), []
    for q, question in enumerate(("What is two plus two?", "Where is Paris, the capital?")):
        for a, answer in enumerate(("four", "I do not know the answer to that", "the quick brown fox jumps")):
            text = prompt.encode(tokenizer, question, answer)
            requests.append(ScoringRequest(f"q{q}/{a}", text, token_level=a == 0))
    ids = tuple(tokenizer("The capital of France is Paris.", add_special_tokens=False)["input_ids"])
    requests.append(ScoringRequest("bare", EncodedText(ids, 1), token_level=True))
    requests.append(ScoringRequest("empty", EncodedText(ids, len(ids)), token_level=True))
    return requests


@torch.no_grad()
def by_hand(model, text):
    ids = torch.tensor([text.input_ids])
    log_p = model(ids).logits[0].double().log_softmax(-1)[text.prompt_length - 1 : -1]
    labels = ids[0, text.prompt_length :]
    mean = (log_p.exp() * log_p).sum(-1)
    variance = (log_p.exp() * (log_p - mean[:, None]) ** 2).sum(-1)
    return log_p.gather(-1, labels[:, None])[:, 0], log_p.argmax(-1) == labels, mean, variance


def test_scores_equal_plain_torch(loaded):
    model, tokenizer = loaded
    requests = requests_of(tokenizer)
    found = score_texts(model, requests, pad_id=0, progress=False)
    for request in requests:
        record = found[request.key]
        log_p, hits, mean, variance = by_hand(model, request.text)
        assert record["labels"] == len(log_p)
        if request.key == "empty":
            assert record["avg_loss"] is None and record["log_probs"] == []
            continue
        assert record["avg_loss"] == pytest.approx(-log_p.mean().item(), abs=2e-6)
        if request.token_level:
            assert record["log_probs"] == pytest.approx(log_p.tolist(), abs=5e-6)
            assert record["is_top1"] == hits.int().tolist()
            assert record["mean"] == pytest.approx(mean.tolist(), abs=5e-6)
            assert record["variance"] == pytest.approx(variance.tolist(), rel=1e-4)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("batch_size, side", [(1, "right"), (3, "left"), (32, "left"), (32, "right")])
def test_scores_do_not_depend_on_batches_or_padding(loaded, batch_size, side, share):
    model, tokenizer = loaded
    requests = requests_of(tokenizer)
    reference = score_texts(model, requests, pad_id=0, batch_size=1, share_prompts=False, progress=False)
    found = score_texts(
        model,
        requests[::-1],
        pad_id=tokenizer.eos_token_id,
        batch_size=batch_size,
        padding_side=side,
        share_prompts=share,
        progress=False,
    )
    for key, record in reference.items():
        assert found[key]["labels"] == record["labels"]
        for name in ("avg_loss", "log_probs", "mean", "variance"):
            if record.get(name) is not None:
                assert found[key][name] == pytest.approx(record[name], abs=1e-5), (key, name)


@pytest.mark.parametrize("share", [True, False])
def test_the_head_multiplies_label_positions_only(loaded, share):
    """Beside the labels: one position per prompt that is run on its own, and nothing for padding."""
    model, _ = loaded
    texts = [EncodedText((5, 6, 7, 8, 9, 10), 3), EncodedText((5, 6, 7, 8), 3), EncodedText((9, 8, 7, 6, 5), 2)]
    requests = [ScoringRequest(f"a/{i}", text) for i, text in enumerate(texts)]
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _m, _i, logits: seen.append(logits.shape[:2]))
    try:
        score_texts(model, requests, pad_id=0, share_prompts=share, progress=False)
    finally:
        handle.remove()
    prompts = [(2, 1)] if share else []
    assert seen[: len(prompts)] == prompts
    assert sum(rows * positions for rows, positions in seen[len(prompts) :]) == 3 + 1 + 3


def test_forwards_on_a_cpu_hold_few_tokens_of_like_length():
    from fdiv.inference.scoring import _forwards

    lengths = {f"{i:03d}": n for i, n in enumerate([200, 200, 190, 170, 100, 99, 20, 2])}
    requests = [ScoringRequest(key, EncodedText(tuple(range(n)), 1)) for key, n in lengths.items()]
    cut = [[lengths[r.key] for r in part] for part in _forwards(requests, lengths, 32, on_cpu=True)]
    assert cut == [[200, 200], [190], [170], [100, 99], [20], [2]]
    assert [[lengths[r.key] for r in part] for part in _forwards(requests, lengths, 32, on_cpu=False)] == [
        [200, 200, 190, 170],
        [100, 99],
        [20],
        [2],
    ]


def test_sharing_prompts_is_refused_where_the_cache_cannot(loaded):
    model, _ = loaded
    assert shares_prompts(model)
    layers = model.config.layer_types if hasattr(model.config, "layer_types") else None
    model.config.layer_types = ["sliding_attention"]
    try:
        assert not shares_prompts(model)
    finally:
        if layers is None:
            del model.config.layer_types
        else:
            model.config.layer_types = layers


def test_moments_of_a_known_distribution():
    # p = (1/2, 1/4, 1/4): E log p = -1.5 log 2, Var = E(log p)^2 - mean^2 = (.5 + 2) log2^2 - 2.25 log2^2
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    found = label_statistics(logits, torch.tensor([1]))
    log2 = torch.tensor(2.0).log().item()
    assert found.log_prob.item() == pytest.approx(-2 * log2, rel=1e-6)
    assert not found.is_top1.item()
    assert found.mean.item() == pytest.approx(-1.5 * log2, rel=1e-6)
    assert found.variance.item() == pytest.approx(0.25 * log2**2, rel=1e-5)
    certain = label_statistics(torch.tensor([[0.0, float("-inf")]]), torch.tensor([0]))
    assert certain.mean.item() == 0.0 and certain.variance.item() == 0.0


def test_half_precision_logits_are_reduced_in_float32():
    logits = torch.randn(5, 50).to(torch.bfloat16)
    found = label_statistics(logits, torch.arange(5))
    exact = logits.double().log_softmax(-1).gather(-1, torch.arange(5)[:, None])[:, 0]
    assert found.log_prob.tolist() == pytest.approx(exact.tolist(), abs=2e-6)


def test_nan_and_overlong_texts_are_named(loaded):
    model, tokenizer = loaded
    long = EncodedText(tuple([5] * (model.config.max_position_embeddings + 1)), 1)
    with pytest.raises(DataError, match="story has .* tokens, the model's context is"):
        score_texts(model, [ScoringRequest("story", long)], pad_id=0, progress=False)
    norm = model.get_input_embeddings().weight
    kept = norm.data.clone()
    norm.data.fill_(float("nan"))
    try:
        with pytest.raises(DataError, match="NaN log-probabilities on q"):
            score_texts(model, requests_of(tokenizer)[:2], pad_id=0, progress=False)
    finally:
        norm.data.copy_(kept)


def test_gradient_norm_equals_autograd(loaded):
    model, tokenizer = loaded
    request = requests_of(tokenizer)[1]
    found = gradient_norms(model, [request], progress=False)["q0/1"]["score"]
    ids, start = torch.tensor([request.text.input_ids]), request.text.prompt_length
    model.zero_grad()
    log_p = model(ids).logits[0].log_softmax(-1)[start - 1 : -2]  # the end token is left out
    (-log_p.gather(-1, ids[0, start:-1, None]).mean()).backward()
    norms = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    assert found == pytest.approx(sum(norms) / len(norms), rel=1e-4)
    assert all(p.grad is None for p in model.parameters())


def generation_requests(tokenizer):
    prompts = ("The quick", "I do not know the answer to that question, sorry. The capital of Italy", "0 1 2 3")
    ids = [tuple(tokenizer(p, add_special_tokens=False)["input_ids"]) for p in prompts]
    return [GenerationRequest(f"g/{i}", p, 12 - 4 * i) for i, p in enumerate(ids)]


def test_generation_does_not_depend_on_batches(loaded):
    model, tokenizer = loaded
    requests = generation_requests(tokenizer)
    together = generate_texts(model, tokenizer, requests, batch_size=3, progress=False)
    alone = generate_texts(model, tokenizer, requests[::-1], batch_size=1, progress=False)
    assert together == alone
    for request in requests:
        output = model.generate(
            torch.tensor([request.prompt_ids]),
            do_sample=False,
            max_new_tokens=request.max_new_tokens,
            pad_token_id=0,
            eos_token_id=tokenizer.eos_token_id,
        )[0, len(request.prompt_ids) :]
        assert together[request.key]["generation"] == tokenizer.decode(output, skip_special_tokens=True)
        assert together[request.key]["tokens"] <= request.max_new_tokens


def greedy_answers(model, requests):
    """Greedy token ids of every request, by transformers alone."""
    return {
        r.key: model.generate(torch.tensor([r.prompt_ids]), do_sample=False, max_new_tokens=r.max_new_tokens)[
            0, len(r.prompt_ids) :
        ].tolist()
        for r in requests
    }


def test_scoring_the_true_answer_tells_how_generation_begins(loaded, monkeypatch):
    """A true answer that follows the model for n tokens gives a draft of n, and the same text as without."""
    model, tokenizer = loaded
    requests = generation_requests(tokenizer)
    plain = generate_texts(model, tokenizer, requests, progress=False)
    followed, drafted = {"g/0": 5, "g/1": 0, "g/2": 4}, []
    for request, answer in zip(requests, greedy_answers(model, requests).values(), strict=True):
        n = followed[request.key]
        wrong = [(token + 1) % len(tokenizer) for token in answer[n:]]
        text = EncodedText((*request.prompt_ids, *answer[:n], *wrong), len(request.prompt_ids))
        for token_level in (False, True):  # a scored neighbour with per-token values changes the path, not the hits
            asked = [ScoringRequest("a", text, hits=True), ScoringRequest("b", text, token_level=token_level)]
            hits = score_texts(model, asked, pad_id=0, progress=False)["a"]["is_top1"]
            assert hits[:n] == [1] * n and (n == len(answer) or hits[n] == 0)
        drafted.append(draft_from_scores(request, text, hits))
        assert drafted[-1].draft == tuple(answer[:n])
        other = EncodedText((1, *request.prompt_ids, *answer), len(request.prompt_ids) + 1)
        assert draft_from_scores(request, other, hits) is request  # the answer to another prompt tells nothing
    assert generate_texts(model, tokenizer, drafted, batch_size=2, progress=False) == plain
    monkeypatch.setattr(type(model), "generate", None)  # the whole of g/2 is known: nothing is left to generate
    assert generate_texts(model, tokenizer, drafted[2:], progress=False) == {"g/2": plain["g/2"]}


def test_a_known_end_ends_the_generation(loaded):
    model, tokenizer = loaded
    hello = tokenizer("Paris", add_special_tokens=False)["input_ids"]
    request = GenerationRequest("g", (5, 6), 50, draft=(*hello, tokenizer.eos_token_id))
    found = generate_texts(model, tokenizer, [request], progress=False)
    assert found == {"g": {"key": "g", "generation": "Paris", "tokens": len(hello)}}


def test_models_with_a_generation_rule_of_their_own_get_no_draft(loaded):
    model, _ = loaded
    assert generates_plain_argmax(model)
    model.generation_config.no_repeat_ngram_size = 3
    try:
        assert not generates_plain_argmax(model)
    finally:
        model.generation_config.no_repeat_ngram_size = None
    assert generates_plain_argmax(model)


def test_generation_bounds(loaded):
    model, tokenizer = loaded
    none = generate_texts(model, tokenizer, [GenerationRequest("none", (5, 6), 0)], progress=False)
    assert none["none"] == {"key": "none", "generation": "", "tokens": 0}
    with pytest.raises(DataError, match="exceed the model's context"):
        generate_texts(model, tokenizer, [GenerationRequest("far", (5, 6), 10_000)], progress=False)


def test_vllm_backend_calls_the_engine_greedily(loaded, monkeypatch, tmp_path):
    """No vLLM here: its documented interface is stood in for, and what reaches it is checked."""
    import sys
    from types import ModuleType, SimpleNamespace

    _, tokenizer = loaded
    requests, seen = generation_requests(tokenizer), {}

    class LLM:
        def __init__(self, **options):
            seen["engine"] = options

        def generate(self, prompts, parameters, lora_request=None):
            seen["prompts"], seen["parameters"], seen["lora"] = prompts, parameters, lora_request
            answer = [*tokenizer("Paris", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id, 7]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=answer)]) for _ in prompts]

    vllm, lora, inner = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    vllm.LLM, vllm.SamplingParams = LLM, lambda **options: options
    inner.LoRARequest = lambda *args: args
    for name, module in (("vllm", vllm), ("vllm.lora", lora), ("vllm.lora.request", inner)):
        monkeypatch.setitem(sys.modules, name, module)
    source = VLLMSource("some/model", adapter="some/adapter", dtype="bfloat16", memory=0.3)
    found = generate_with_vllm(source, tokenizer, requests, cache_dir=tmp_path, model_digest="a")
    assert seen["engine"] == {
        "model": "some/model",
        "dtype": "bfloat16",
        "enable_lora": True,
        "gpu_memory_utilization": 0.3,
    }
    assert seen["prompts"][0] == {"prompt_token_ids": list(requests[0].prompt_ids)}
    assert seen["parameters"][1] == {"temperature": 0.0, "max_tokens": 8}
    assert seen["lora"] == ("adapter", 1, "some/adapter")
    assert found["g/0"]["generation"] == "Paris"
    seen.clear()
    assert generate_with_vllm(source, tokenizer, requests, cache_dir=tmp_path, model_digest="a") == found
    assert not seen, "finished items start no engine"


def test_vllm_missing_is_one_clear_error(loaded, monkeypatch):
    import sys

    _, tokenizer = loaded
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(DataError, match="--backend vllm"):
        generate_with_vllm(VLLMSource("some/model"), tokenizer, generation_requests(tokenizer))


def test_item_cache_survives_a_cut_line(tmp_path):
    cache = ItemCache(tmp_path, "scores", "abc")
    cache.add([{"key": "a", "x": 0.1}, {"key": "b", "x": 1 / 3}])
    file = tmp_path / "scores-abc" / "rank0.jsonl"
    file.write_bytes(file.read_bytes() + b'{"key": "c", "x"')
    again = ItemCache(tmp_path, "scores", "abc")
    assert again.items == {"a": {"key": "a", "x": 0.1}, "b": {"key": "b", "x": 1 / 3}}
    again.add([{"key": "c", "x": 2}])
    other_rank = ItemCache(tmp_path, "scores", "abc", rank=1)
    assert set(other_rank.items) == {"a", "b", "c"}
    assert ItemCache(tmp_path, "scores", "other").items == {}
    file.write_text("nonsense\n")
    with pytest.raises(DataError, match="line 1 is damaged"):
        ItemCache(tmp_path, "scores", "abc")


def test_fingerprints_follow_the_weights(loaded):
    model, _ = loaded
    before = weights_fingerprint(model)
    parameter = next(model.parameters())
    parameter.data[0, 0] += 1e-3
    after = weights_fingerprint(model)
    parameter.data[0, 0] -= 1e-3
    assert before != after
    assert fingerprint({"b": 1, "a": 2}) == fingerprint({"a": 2, "b": 1})


def test_a_generation_goes_on_from_where_the_labels_begin(tiny_model_dir):
    """A prompt that ends in a space: the tokenizer joins the space with the answer's first word, which is a label."""
    tokenizer = load_tokenizer(str(tiny_model_dir))
    prompt = PromptFormat(chat_template="never", question_format="{question} Answer: ", answer_format="{answer}")
    question = "what is the capital of France?"
    whole = prompt.encode(tokenizer, question, "the capital")
    assert tokenizer.decode(whole.label_ids) == " the capital<|im_end|>", "this tokenizer no longer shows the case"
    ids = prompt.encode_prompt(tokenizer, question, answer="the capital")
    assert ids == whole.prompt_ids and tokenizer.decode(ids) == "what is the capital of France? Answer:"


def test_prompt_formats(tiny_model_dir):
    tokenizer = load_tokenizer(str(tiny_model_dir))
    chat = PromptFormat().encode(tokenizer, "Who?", "me")
    assert tokenizer.decode(chat.input_ids[: chat.prompt_length]) == (
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(chat.label_ids) == "me<|im_end|>\n"  # as trained: no second end token
    appended = PromptFormat(end_token="appended").encode(tokenizer, "Who?", "me")  # open-unlearning's way
    assert tokenizer.decode(appended.label_ids) == "me<|im_end|>\n<|im_end|>"
    plain = PromptFormat(chat_template="never").encode(tokenizer, "Who?", "me", [("When?", "now")])
    whole = tokenizer.decode(plain.input_ids)
    assert whole == "Question: When?\nAnswer: now\n\nQuestion: Who?\nAnswer: me<|im_end|>"
    assert tokenizer.decode(plain.input_ids[plain.prompt_length :]) == " me<|im_end|>"
    with pytest.raises(DataError, match="does not contain {question}"):
        PromptFormat(question_format="Q:")
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        PromptFormat(chat_template="always").encode(tokenizer, "Who?", "me")
