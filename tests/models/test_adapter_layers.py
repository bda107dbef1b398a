"""Adapters on layers of every family: default layers, heads trained whole, embeddings that the head shares."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from datasets import Dataset

from fdiv.errors import DataError, RolloutError
from fdiv.inference.vllm_server import merged_state_dict
from fdiv.training.merge import merge_adapter
from tests.models.test_fused_head import build


def adapted(model, **settings):
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **settings)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_a_family_without_default_layers_names_the_key_and_the_way_out(tiny_model_dir, tmp_path):
    from fdiv.alignment import FDPOConfig, FDPOTrainer

    args = FDPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    rows = Dataset.from_dict({"prompt": ["a"], "chosen": [" b"], "rejected": [" c"]})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir)
    with pytest.raises(DataError, match=r"GraniteForCausalLM: set `lora_target_modules`.* to `all-linear`") as caught:
        FDPOTrainer(
            build("granite", {}), args=args, train_dataset=rows, processing_class=tokenizer,
            peft_config=peft.LoraConfig(task_type="CAUSAL_LM"),
        )  # fmt: skip
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["lora on embeddings", "head saved", "embeddings saved"],
)
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_heads_are_merged_or_refused(tied, settings, tiny_model_dir, tmp_path):
    base = build("llama", {"tie_word_embeddings": tied})
    base.save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "base")
    model = adapted(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), **settings)
    model.save_pretrained(tmp_path / "adapter")
    if tied:
        with pytest.raises(DataError, match="shares one matrix between embeddings and head.*use it with --adapter"):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged")
        with pytest.raises(RolloutError, match="cannot be passed to a server"):
            merged_state_dict(model, model.state_dict())
        return
    ids = torch.arange(5, 17).view(1, 12)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-4, rtol=0)
        served = build("llama", {"tie_word_embeddings": False})
        served.load_state_dict(merged_state_dict(model, model.state_dict()))  # strict: exactly the base's names
        torch.testing.assert_close(served(input_ids=ids).logits, expected, atol=1e-4, rtol=0)
        assert (base(input_ids=ids).logits - expected).abs().max() > 0.1


def test_trainable_tokens_of_a_tied_model_are_merged(tiny_model_dir, tmp_path):
    build("llama", {"tie_word_embeddings": True}).save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base, target_modules=["q_proj"], trainable_token_indices=[5, 7])
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(5, 17).view(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=0)
