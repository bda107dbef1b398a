"""Models that are loaded beside a sharded training have their weights on every process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as distributed
from safetensors.torch import load_file
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled, is_fsdp_enabled
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from fdiv.inference.processes import alone, process_state, whole_models
from fdiv.models.loading import load_model

EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture
def second_of_fsdp(monkeypatch):
    """The second process of an FSDP run with efficient loading, to which the first would send its weights."""
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("LOCAL_RANK", "1")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    assert is_fsdp_enabled()
    yield
    distributed.destroy_process_group()


@pytest.fixture
def zero3():
    kept = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # held weakly: it lives as long as `kept`
    assert is_deepspeed_zero3_enabled()
    yield kept
    unset_hf_deepspeed_config()


@pytest.fixture
def stored(tiny_model_dir):
    return load_file(f"{tiny_model_dir}/model.safetensors")[EMBEDDINGS].float()


def embeddings(model):
    return dict(model.named_parameters())[EMBEDDINGS].detach().float()


def test_under_fsdp_nothing_is_left_to_the_first_process(second_of_fsdp, stored, tiny_model_dir):
    assert torch.equal(embeddings(load_model(str(tiny_model_dir))), stored)
    with pytest.raises(KeyError), whole_models():
        assert not is_fsdp_enabled()
        raise KeyError
    assert is_fsdp_enabled()


def test_under_zero3_they_are_whole_and_the_configuration_comes_back(zero3, stored, tiny_model_dir):
    assert torch.equal(embeddings(load_model(str(tiny_model_dir))), stored)
    with pytest.raises(KeyError), whole_models():
        assert not is_deepspeed_zero3_enabled()
        raise KeyError
    assert is_deepspeed_zero3_enabled() and zero3.is_zero3()


def test_alone_there_is_one_process_and_models_are_whole(zero3):
    state = process_state()
    with alone():
        assert process_state() is not state and process_state().num_processes == 1 and process_state().is_main_process
        assert not is_deepspeed_zero3_enabled()
    assert type(process_state()) is type(state)
    assert is_deepspeed_zero3_enabled()
