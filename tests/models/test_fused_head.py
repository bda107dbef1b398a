"""The fused head is kept where it gives the values of the model's own logits, and left, with a note, elsewhere."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from datasets import Dataset

from fdiv.models.logprobs import OUTPUTS, check_fused_head, enable_fused_head, token_scores

SMALL = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 384, "max_position_embeddings": 128, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0,
}  # fmt: skip
LEFT = {
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "logits_soft_cap": 1.0, "attention_window_size": 16, "w_init_variance_scale": 1.0},
    "bert": {"is_decoder": True},
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 32, "head_dim": 16, "attention_chunk_size": 64},
    "xlstm": {"output_logit_soft_cap": 1.0, "num_heads": 2, "qk_dim_factor": 0.5, "mode": "inference",
              "chunkwise_kernel": "chunkwise--native_autograd", "sequence_kernel": "native_sequence__native",
              "step_kernel": "native"},
}  # fmt: skip
KEPT = {"llama": {}, "gemma2": {"final_logit_softcapping": 1.0, "head_dim": 16}, "cohere": {"logit_scale": 0.3}}
MIXTURES = {
    "granitemoe": {"num_local_experts": 4},
    "granitemoehybrid": {"num_local_experts": 4, "layer_types": ["attention", "mamba"], "shared_intermediate_size": 32,
                         "mamba_n_heads": 4, "mamba_d_state": 16},
    "phimoe": {"num_local_experts": 4, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "mixtral": {"num_local_experts": 4},
}  # fmt: skip


def build(kind, others):
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **others})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def batch():
    ids = torch.arange(5, 29).view(2, 12)
    completion = torch.ones_like(ids)
    completion[:, :4] = 0
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}


def check_values(model, temperature=0.7):
    ids = batch()["input_ids"]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1] / temperature
    expected = torch.distributions.Categorical(logits=logits)
    scores = token_scores(model, **batch(), outputs=OUTPUTS)
    mask = scores.mask
    torch.testing.assert_close(scores.log_probs[mask], expected.log_prob(ids[:, 1:])[mask], atol=2e-5, rtol=0)
    torch.testing.assert_close(scores.entropy[mask], expected.entropy()[mask], atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", LEFT)
def test_a_head_that_does_not_fit_is_left_with_one_note(kind, capsys):
    for _ in range(2):
        model = build(kind, LEFT[kind])
        model.train()
        enable_fused_head(model, OUTPUTS, 0.7)
        assert all(module.training for module in model.modules())
        check_values(model.eval())
    printed = capsys.readouterr()
    assert " ".join((printed.out + printed.err).split()).count("the fused LM head does not fit") == 1
    gradient = token_scores(model, **batch()).log_probs.sum()
    gradient.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", KEPT)
def test_a_head_that_fits_is_kept(kind, capsys):
    for dtype in (torch.float32, torch.bfloat16):
        model = build(kind, KEPT[kind]).to(dtype)
        enable_fused_head(model, OUTPUTS, 0.7)
        assert check_fused_head(model) is None
    check_values(build_and_patch(kind))
    printed = capsys.readouterr()
    assert "does not fit" not in printed.out + printed.err


def build_and_patch(kind):
    model = build(kind, KEPT[kind])
    enable_fused_head(model, OUTPUTS, 0.7)
    return model


def test_trainable_tokens_of_a_tied_head():
    model = build("llama", {"tie_word_embeddings": True})
    model = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[3, 7])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    enable_fused_head(model, OUTPUTS, 0.7)
    check_values(model)


@pytest.mark.parametrize("kind", MIXTURES)
def test_f_dpo_with_the_load_balancing_loss_of_a_mixture(kind, tiny_model_dir, tmp_path):
    from fdiv.alignment import FDPOConfig, FDPOTrainer

    rows = Dataset.from_dict({"prompt": ["The sky is"] * 2, "chosen": [" blue."] * 2, "rejected": [" red."] * 2})
    model = build(kind, MIXTURES[kind])
    args = FDPOConfig(
        str(tmp_path), divergence="reverse_kl", max_steps=1, per_device_train_batch_size=2, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, bf16=False, router_aux_loss_coef=0.5, learning_rate=1e-12,
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir)
    trainer = FDPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    names = ("input_ids", "attention_mask")
    own = model.eval()(**{name: inputs[name] for name in names}, output_router_logits=True).aux_loss.item()
    logged = trainer.state.log_history[0]
    assert logged["aux_loss"] == pytest.approx(own, rel=1e-3)
    assert own > 0.5
    assert logged["loss"] == pytest.approx(0.693147 + 0.5 * own, rel=1e-3)
