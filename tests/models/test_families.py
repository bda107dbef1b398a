"""A sweep over model families: values, padding, one f-DPO step, one sampled group, save and reload (slow)."""

from __future__ import annotations

import pytest
import torch
import transformers
from datasets import Dataset

from fdiv.inference.padding import depends_on_padding
from fdiv.inference.sampling import SamplingRequest, sample_completions
from fdiv.models.loading import load_model
from fdiv.models.logprobs import enable_fused_head, token_scores
from tests.models.test_fused_head import KEPT, LEFT, MIXTURES, build

pytestmark = pytest.mark.slow

GPT = {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 128}
MAMBA = {"state_size": 8, "conv_kernel": 4, "expand": 2}
FAMILIES = {
    **KEPT, **MIXTURES, **LEFT, "llama tied": {"tie_word_embeddings": True}, "gpt2": GPT, "gpt_neox": {}, "gptj": {**GPT, "rotary_dim": 8},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 2}, "gpt_bigcode": GPT, "opt":
    {"ffn_dim": 32, "word_embed_proj_dim": 32}, "bloom": {"n_layer": 2, "n_head": 2}, "falcon": {"alibi": True}, "mpt":
    {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 128}, "phi": {}, "phi3": {}, "qwen2": {}, "qwen3": {"head_dim": 16},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2}, "gemma": {"head_dim": 16}, "gemma3_text": {"head_dim": 16}, "mistral": {},
    "stablelm": {}, "starcoder2": {}, "olmo": {}, "olmo2": {}, "granite": {"logits_scaling": 4.0}, "cohere2": {"logit_scale": 0.3},
    "mamba": MAMBA, "falcon_mamba": MAMBA, "smollm3": {}, "glm": {"head_dim": 16}, "nemotron": {}, "helium": {"head_dim": 16},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
}  # fmt: skip

MIXTURE_WORDS = ("moe", "mixtral", "llama4")


def made(family):
    no_dropout = {"dropout": 0.0, "attention_dropout": 0.0, "attn_pdrop": 0.0}
    return build(family.partition(" ")[0], no_dropout | FAMILIES[family])


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def padded(rows, side):
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    completion = mask * (mask.cumsum(-1) > 1)  # the first token has nothing before it
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}


ROWS = [[(37 * i + n) % 384 for i in range(n)] for n in (7, 12)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("fused", [True, False])
def test_values(family, side, fused):
    model = made(family)
    # The grouped product of experts has no float64.
    double = made(family) if any(word in family for word in MIXTURE_WORDS) else made(family).double()
    if fused:
        enable_fused_head(model)
    if side == "left" and depends_on_padding(model) is not None:
        pytest.skip("found to depend on padding; see test_padding.py")
    scores = token_scores(model, **padded(ROWS, side), fused=fused)
    for number, row in enumerate(ROWS):
        with torch.no_grad():
            log_p = double(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1].double().log_softmax(-1)
        expected = log_p.gather(-1, torch.tensor(row[1:])[:, None]).squeeze(-1)
        found = scores.log_probs[number][scores.mask[number]].double()
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_one_step_one_group_save_and_reload(family, tiny_model_dir, tmp_path):
    from fdiv.alignment import FDPOConfig, FDPOTrainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir)
    rows = Dataset.from_dict({"prompt": ["The sky is"] * 2, "chosen": [" blue."] * 2, "rejected": [" red, red."] * 2})
    model = made(family)
    args = FDPOConfig(
        str(tmp_path), divergence="reverse_kl", max_steps=1, per_device_train_batch_size=2, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, bf16=False, router_aux_loss_coef=None, learning_rate=1e-3,
        disable_dropout=True, gradient_checkpointing=False,
    )  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = FDPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    logged = trainer.state.log_history[0]
    own_loss = logged["loss"] - trainer.router_aux_loss_coef * logged.get("aux_loss", 0.0)
    assert own_loss == pytest.approx(0.693147, abs=0.05)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    trainer.save_model(str(tmp_path / "saved"))
    again = load_model(str(tmp_path / "saved"), dtype="float32")
    batch = padded(ROWS, "right")
    with torch.no_grad():
        values = token_scores(model, **batch).log_probs
        torch.testing.assert_close(token_scores(again, **batch).log_probs, values, atol=1e-4, rtol=0)
    if family == "xlstm":
        return  # its own generate fails in transformers 5.23
    group = [SamplingRequest(str(n), tuple(ROWS[0]), 4, stream=(n,)) for n in range(4)]
    sampled = sample_completions(again, tokenizer, group, batch_size=4, progress=False)
    alone = sample_completions(again, tokenizer, group[:1], batch_size=1, progress=False)
    assert sampled["0"] == alone["0"]
    assert all(1 <= len(ids) <= 4 for ids in sampled.values())
