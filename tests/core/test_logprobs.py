"""Log-probabilities: the fused and the plain path agree with each other and with log_softmax."""

from __future__ import annotations

import inspect

import pytest
import torch

from fdiv.models.logprobs import OUTPUTS, enable_fused_head, fused_head, mean_log_prob, sequence_log_prob, token_scores


def _build(architecture: str, vocab: int = 123, seed: int = 0) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    config = (
        LlamaConfig(
            vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64,
        )
        if architecture == "llama"
        else GPT2Config(
            vocab_size=vocab, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
        )
    )  # fmt: skip
    torch.manual_seed(seed)
    # A wide initialisation, so that the distributions are far from uniform.
    config.initializer_range = 0.3
    return AutoModelForCausalLM.from_config(config).eval()


def _batch(rows: int = 3, length: int = 47, vocab: int = 123, side: str = "right") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, vocab, (rows, length), generator=generator)
    attention = torch.ones_like(input_ids)
    completion = torch.zeros_like(input_ids)
    for row in range(rows):
        padding = 5 * row
        real = slice(0, length - padding) if side == "right" else slice(padding, length)
        attention[row] = 0
        attention[row, real] = 1
        start = (0 if side == "right" else padding) + 7
        completion[row, start : real.stop] = 1
    return {"input_ids": input_ids * attention, "attention_mask": attention, "completion_mask": completion}


def _oracle(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Row by row without padding, log_softmax of the model's own logits."""
    out = torch.zeros(batch["input_ids"].shape[0], batch["input_ids"].shape[1] - 1)
    for row in range(len(out)):
        real = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row][real]
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        scores = torch.log_softmax(logits, -1).gather(-1, ids[1:, None]).squeeze(-1)
        positions = real.nonzero().squeeze(-1)[1:] - 1
        out[row, positions] = scores
    return out * batch["completion_mask"][:, 1:]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_equals_unpadded_log_softmax(architecture, fused, side):
    model, batch = _build(architecture), _batch(side=side)
    with torch.no_grad():
        expected = _oracle(model, batch)
        if fused:
            enable_fused_head(model)
        scores = token_scores(model, **batch, fused=fused)
    torch.testing.assert_close(scores.log_probs, expected, atol=1e-5, rtol=0)
    outside = batch["completion_mask"][:, 1:] == 0
    assert (scores.log_probs[outside] == 0).all()
    assert torch.equal(scores.mask, ~outside)
    assert expected.min() < -3  # the comparison is not one of near-zeros
    torch.testing.assert_close(sequence_log_prob(scores), expected.sum(-1), atol=2e-4, rtol=0)
    lengths = batch["completion_mask"].sum(-1)
    torch.testing.assert_close(mean_log_prob(scores), expected.sum(-1) / lengths, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_fused_and_plain_agree_in_value_and_gradient(architecture, temperature, monkeypatch):
    monkeypatch.setattr(
        "fdiv.models.logprobs._CHUNK_LOGITS", 123 * 10
    )  # 138 rows in chunks of 10: the chunking is exercised
    batch, results = _batch(), {}
    for fused in (True, False):
        model = _build(architecture)
        if fused:
            enable_fused_head(model, OUTPUTS, temperature)
        scores = token_scores(model, **batch, outputs=OUTPUTS, fused=fused, temperature=temperature)
        weights = torch.linspace(-1, 1, scores.log_probs.numel()).view_as(scores.log_probs)
        (weights * scores.log_probs + 0.3 * scores.entropy * scores.mask).sum().backward()
        results[fused] = scores, {name: p.grad for name, p in model.named_parameters()}
    for name in OUTPUTS:
        fused_value, plain_value = (getattr(results[fused][0], name) for fused in (True, False))
        torch.testing.assert_close(fused_value, plain_value, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for name, gradient in results[True][1].items():
        expected = results[False][1][name]
        scale = expected.abs().max().clamp(min=1)
        assert ((gradient - expected).abs().max() / scale) < 1e-5, name


def test_entropy_and_moments_on_a_known_distribution():
    """Uniform logits: entropy log V, log Σp² = −log V, and the mean logit is the logit."""
    model = _build("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    scores = token_scores(model, **_batch(), outputs=OUTPUTS, fused=False)
    log_v = torch.log(torch.tensor(123.0))
    torch.testing.assert_close(scores.entropy[scores.mask], log_v.expand(int(scores.mask.sum())))
    torch.testing.assert_close(scores.log_sum_sq_probs[scores.mask], -log_v.expand(int(scores.mask.sum())))
    assert (scores.mean_logits == 0).all()


def test_plain_path_keeps_float64():
    model = _build("llama").double()
    scores = token_scores(model, **_batch(), fused=False)
    assert scores.log_probs.dtype == torch.float64
    assert token_scores(_build("llama").to(torch.bfloat16), **_batch(), fused=False).log_probs.dtype == torch.float32


def test_enabling_twice_is_idempotent_and_outputs_can_be_added():
    model = _build("llama")
    assert fused_head(model) is None
    enable_fused_head(model)
    forward = model.forward
    enable_fused_head(model, ("log_probs",))
    assert model.forward is forward or model.forward == forward
    assert fused_head(model) == (("log_probs",), 1.0)
    enable_fused_head(model, ("entropy",))
    assert fused_head(model).outputs == ("log_probs", "entropy")
    with pytest.raises(ValueError, match=r"temperature 1\.0, not 0\.5"):
        enable_fused_head(model, temperature=0.5)
    with pytest.raises(ValueError, match="fused=False"):
        token_scores(model, **_batch(), temperature=0.5)


def test_unpatched_model_and_missing_outputs_fall_back_to_the_plain_path():
    model, batch = _build("llama"), _batch()
    plain = token_scores(model, **batch, outputs=("entropy",))
    enable_fused_head(model)  # gives log_probs only
    again = token_scores(model, **batch, outputs=("entropy",))
    assert torch.equal(plain.entropy, again.entropy)


def test_peft_model_is_patched_at_its_base_and_the_adapter_counts():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(_build("llama"), LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    batch = _batch()
    enable_fused_head(model)
    assert fused_head(model) == (("log_probs",), 1.0)
    with torch.no_grad():
        fused, plain = (token_scores(model, **batch, fused=fused).log_probs for fused in (True, False))
        with model.disable_adapter():
            base = token_scores(model, **batch).log_probs
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)
    assert (fused - base).abs().max() > 0.1


def test_adapter_on_the_head_is_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(_build("llama"), LoraConfig(target_modules=["lm_head"], r=4))
    with pytest.raises(ValueError, match="target_modules"):
        enable_fused_head(model)


def test_bad_arguments_name_the_value():
    model, batch = _build("llama"), _batch()
    with pytest.raises(ValueError, match=r"unknown per-token outputs \['variance'\]"):
        token_scores(model, **batch, outputs=("variance",))
    with pytest.raises(ValueError, match=r"completion_mask has shape \(3, 46\)"):
        token_scores(model, **{**batch, "completion_mask": batch["completion_mask"][:, 1:]})
    with pytest.raises(ValueError, match="temperature=0"):
        enable_fused_head(model, temperature=0)


def test_empty_completion_gives_zero_and_no_nan():
    batch = _batch()
    batch["completion_mask"][0] = 0
    model = _build("llama")
    scores = token_scores(model, **batch)
    sequence_log_prob(scores).sum().backward()
    assert sequence_log_prob(scores)[0] == 0 and mean_log_prob(scores)[0] == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.smoke
def test_the_private_hook_is_as_expected():
    """`fused_head` reads the closure of TRL's patched forward, and `token_scores` passes `fused_lm_head`."""
    from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

    assert list(inspect.signature(add_fused_lm_head).parameters) == [
        "model", "temperature", "cast_lm_head_to_fp32", "outputs",
    ]  # fmt: skip
    assert {"log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"} <= set(
        FusedCausalLMOutput.__dataclass_fields__
    )
    model = _build("llama")
    add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", "is_top1"))
    assert model.forward.__func__.__code__.co_name == "_fused_forward"
    assert fused_head(model) == (("log_probs", "is_top1"), 0.9)
