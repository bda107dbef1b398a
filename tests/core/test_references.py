"""Where training continues an adapter, the reference is that adapter: log-ratio 0 before the first step."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from fdiv.models.reference import Reference

ADAPTERS = {
    "lora": peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"]),
    "lora on embeddings": peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens", "v_proj"]),
    "dora": peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], use_dora=True),
    "head saved": peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    "ia3": peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "vera": peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    "loha": peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    "lokr": peft.LoKrConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
    "oft": peft.OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], oft_block_size=4),
    "boft": peft.BOFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], boft_block_size=4),
    "fourier": peft.FourierFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], n_frequency=10),
}


def log_probs(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.size(1) :].log_softmax(-1)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_reference_of_a_continued_adapter_is_that_adapter(kind, tiny_model_dir):
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), ADAPTERS[kind])
    with torch.no_grad():  # an adapter that was trained: every trainable weight is off its start
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval()
    ids = torch.arange(8).view(2, 4)
    trained = log_probs(model, ids)
    with model.disable_adapter():
        assert (log_probs(model, ids) - trained).abs().max() > 1e-4
    trainer = SimpleNamespace(
        model=model,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        accelerator=SimpleNamespace(unwrap_model=lambda wrapped: wrapped, autocast=torch.no_grad),
    )
    reference = Reference(trainer, copy_adapter=True)
    with reference.active() as frozen:
        assert torch.equal(log_probs(frozen, ids), trained)
    with torch.no_grad():  # training goes on; the reference stays
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    with reference.active() as frozen:
        assert torch.equal(log_probs(frozen, ids), trained)
    assert not torch.equal(log_probs(model, ids), trained)
