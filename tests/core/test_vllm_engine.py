"""The one vLLM source that presampling and Pass@k share. No vLLM here: its documented interface is stood in for."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from fdiv.errors import DataError
from fdiv.eval.pass_at_k.sampling import SamplingSettings, sample_with_vllm
from fdiv.inference.backends import EngineSource, request_seed, vllm_engine
from fdiv.inference.cache import ItemCache
from fdiv.inference.greedy import VLLMSource
from fdiv.inference.sampling import SamplingRequest

SOURCE = VLLMSource("some/model", adapter="some/adapter", dtype="bfloat16", memory=0.3)
REQUESTS = [SamplingRequest(f"task/{number}", (5, 6 + number), 7, stream=(number, 0)) for number in range(5)]


@pytest.fixture
def engine(monkeypatch):
    """Engines started and calls made; the completion of a prompt is its last token, twice, and the end token 3."""
    seen = {"engines": [], "calls": []}

    class LLM:
        def __init__(self, **options):
            seen["engines"].append(options)

        def generate(self, prompts, parameters, lora_request=None, use_tqdm=True):
            seen["calls"].append((prompts, parameters, lora_request, use_tqdm))
            ids = [prompt["prompt_token_ids"][-1] for prompt in prompts]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[token, token, 3])]) for token in ids]

    vllm, lora, inner = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    vllm.LLM, vllm.SamplingParams = LLM, lambda **options: options
    inner.LoRARequest = lambda *args: args
    for name, module in (("vllm", vllm), ("vllm.lora", lora), ("vllm.lora.request", inner)):
        monkeypatch.setitem(sys.modules, name, module)
    vllm_engine.cache_clear()
    yield seen
    vllm_engine.cache_clear()


def test_pass_at_k_samples_in_chunks_from_one_engine(engine, tmp_path):
    settings = SamplingSettings(temperature=0.7, top_p=0.9, stop=("\n\n",), seed=11)
    cache = ItemCache(tmp_path, "samples", "a")
    found = sample_with_vllm(SOURCE, REQUESTS, settings, cache=cache, chunk=2, stop_token_ids={9, 3})
    assert found == {f"task/{number}": (6 + number, 6 + number, 3) for number in range(5)}
    assert engine["engines"] == [
        {"model": "some/model", "dtype": "bfloat16", "enable_lora": True, "gpu_memory_utilization": 0.3,
         "generation_config": "vllm"}
    ]  # fmt: skip
    assert [len(prompts) for prompts, *_ in engine["calls"]] == [2, 2, 1]
    _, parameters, lora, bar = engine["calls"][1]
    assert parameters[0] == {
        "temperature": 0.7, "top_p": 0.9, "max_tokens": 7, "seed": request_seed(11, (2, 0)), "stop_token_ids": [3, 9],
        "stop": ["\n\n"],
    }  # fmt: skip
    assert lora == ("adapter", 1, "some/adapter") and bar is False


def test_what_is_cached_is_not_sampled_again(engine, tmp_path):
    cache = ItemCache(tmp_path, "samples", "a")
    source = EngineSource(SOURCE, stop_token_ids=[3], temperature=1.0, top_p=1.0, seed=0, batch_size=8)
    first = source.draw(REQUESTS[:3], cache, "sampling")
    assert source.draw(REQUESTS, cache, "sampling") == first | {"task/3": (9, 9, 3), "task/4": (10, 10, 3)}
    assert [len(prompts) for prompts, *_ in engine["calls"]] == [3, 2]
    assert len(engine["engines"]) == 1


def test_without_vllm_the_remedy_is_named(monkeypatch, tmp_path):
    vllm_engine.cache_clear()
    monkeypatch.setitem(sys.modules, "vllm", None)
    source = EngineSource(SOURCE, stop_token_ids=[3], temperature=1.0, top_p=1.0, seed=0, batch_size=8)
    with pytest.raises(DataError, match="backend vllm: .*make setup-vllm"):
        source.draw(REQUESTS, ItemCache(tmp_path, "samples", "a"), "sampling")
