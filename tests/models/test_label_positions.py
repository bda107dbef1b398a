"""The fused head on label positions only: the same values and gradients as on all positions, and no others computed."""

from __future__ import annotations

import inspect

import pytest
import torch

from fdiv.models.label_positions import score_labels_only
from fdiv.models.logprobs import OUTPUTS, check_fused_head, fused_head, token_scores


def model(vocabulary: int = 5000) -> torch.nn.Module:
    """Larger than a tile of the head, so that tiles are joined."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    made = AutoModelForCausalLM.from_config(config).eval()
    add_fused_lm_head(made, outputs=OUTPUTS)
    return made


def batch(side: str = "right") -> dict[str, torch.Tensor]:
    """Three rows of 20, 15 and 10 tokens, of which the first 5 are prompts."""
    ids = torch.randint(1, 5000, (3, 20), generator=torch.Generator().manual_seed(1))
    attention, completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate((20, 15, 10)):
        start = 0 if side == "right" else 20 - length
        attention[row, start : start + length] = 1
        completion[row, start + 5 : start + length] = 1
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}


def scored(made: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """Every output, and the gradient of a sum of log-probabilities and entropies."""
    made.zero_grad()
    scores = token_scores(made, **inputs, outputs=OUTPUTS)
    weights = torch.arange(scores.log_probs.numel()).view_as(scores.log_probs)
    (scores.log_probs * weights + scores.entropy).sum().backward()
    gradients = {name: p.grad.clone() for name, p in made.named_parameters()}
    return {name: getattr(scores, name) for name in OUTPUTS}, gradients


@pytest.mark.parametrize("side", ["right", "left"])
def test_values_and_gradients_equal_those_of_all_positions(side):
    made, inputs = model(), batch(side)
    values, gradients = scored(made, inputs)
    score_labels_only(made, OUTPUTS)
    labels_only, their_gradients = scored(made, inputs)
    for name in OUTPUTS:
        torch.testing.assert_close(labels_only[name], values[name], atol=2e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(their_gradients[name], gradient, atol=1e-3, rtol=1e-3)


def test_the_head_multiplies_the_labels_and_no_other_position(monkeypatch):
    import trl.trainer.utils as trl_utils

    seen, kernel = [], trl_utils._ChunkedLogProbFunction

    class Watched(kernel):
        @staticmethod
        def forward(ctx, hidden, *rest):
            seen.append((hidden.size(0), rest[4]))  # positions, tokens of a tile
            return kernel.forward(ctx, hidden, *rest)

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Watched)
    made, inputs = model(), batch()
    token_scores(made, **inputs)
    check_fused_head(made)
    seen.clear()
    token_scores(made, **inputs)
    assert seen == [(15 + 10 + 5, 4096)]
    assert trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE == 32768  # TRL's own is back after it


def test_a_batch_without_labels_is_a_differentiable_zero():
    made, inputs = model(), batch()
    score_labels_only(made, OUTPUTS)
    inputs["completion_mask"].zero_()
    scores = token_scores(made, **inputs)
    assert torch.equal(scores.log_probs, torch.zeros(3, 19))
    scores.log_probs.sum().backward()
    assert made.model.layers[0].mlp.up_proj.weight.grad.abs().max() == 0


def test_shifted_labels_and_the_loss_are_as_before():
    made, inputs = model(), batch()
    ids, mask = inputs["input_ids"], inputs["completion_mask"].bool()
    shifted = torch.full_like(ids, -100)
    shifted[:, :-1] = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    call = {"input_ids": ids, "attention_mask": inputs["attention_mask"], "fused_lm_head": True}
    plain = made(**call, shift_labels=shifted, num_items_in_batch=7)
    score_labels_only(made, OUTPUTS)
    ours = made(**call, shift_labels=shifted, num_items_in_batch=7)
    torch.testing.assert_close(ours.loss, plain.loss)
    torch.testing.assert_close(ours.log_probs, plain.log_probs, atol=2e-5, rtol=1e-5)
    assert torch.equal(ours.label_mask, plain.label_mask)


def test_the_patch_is_put_on_once_and_taken_off():
    made = model()
    before, head = made.forward, fused_head(made)
    signature = inspect.signature(before)
    unpatch = score_labels_only(made, OUTPUTS)
    patched = made.forward
    assert fused_head(made) == head
    assert inspect.signature(patched) == signature  # `generate` checks its keywords against it
    score_labels_only(made, OUTPUTS)()
    assert made.forward == patched
    unpatch()
    assert made.forward == before


def test_other_forwards_are_the_models_own():
    made, inputs = model(), batch()
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    plain = made(**ids, labels=inputs["input_ids"])
    score_labels_only(made, OUTPUTS)
    ours = made(**ids, labels=inputs["input_ids"])
    assert torch.equal(ours.logits, plain.logits)
    assert torch.equal(ours.loss, plain.loss)
