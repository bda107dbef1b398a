"""Models whose scores depend on the batch: found, scored and sampled one row at a time, refused for rollouts."""

from __future__ import annotations

import pytest
import torch
import transformers
from datasets import Dataset

from fdiv.errors import DataError
from fdiv.inference.padding import depends_on_padding, longrope_note, safe_batch_size
from fdiv.inference.prompting import EncodedText
from fdiv.inference.sampling import SamplingRequest, sample_completions
from fdiv.inference.scoring import ScoringRequest, score_texts
from tests.models.test_fused_head import LEFT, build

LONG = {"original_max_position_embeddings": 24, "rope_parameters": {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 24, "factor": 4.0}}  # fmt: skip
DEPENDING = {
    "recurrent_gemma": LEFT["recurrent_gemma"],
    "xlstm": LEFT["xlstm"],
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "phi3": LONG,
}
SAFE = {"llama": {}, "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 2}, "gemma2": {"head_dim": 16}, "mamba": {}}


@pytest.mark.parametrize("kind", SAFE)
def test_masked_models_keep_their_batches(kind):
    model = build(kind, SAFE[kind])
    assert depends_on_padding(model) is None
    assert depends_on_padding(model.to(torch.bfloat16)) is None
    assert safe_batch_size(model, 7) == 7


@pytest.mark.parametrize("kind", DEPENDING)
def test_others_are_scored_and_sampled_one_row_at_a_time(kind, tiny_model_dir):
    model = build(kind, DEPENDING[kind])
    assert depends_on_padding(model) is not None
    assert safe_batch_size(model, 7) == 1
    ids = [(torch.arange(length) * 37 + length).remainder(384).tolist() for length in (9, 14, 40)]
    requests = [ScoringRequest(str(len(row)), EncodedText(tuple(row), 4)) for row in ids]
    found = score_texts(model, requests, pad_id=0, batch_size=3, padding_side="left", progress=False)
    for row in ids:
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([row]), use_cache=False).logits[0].log_softmax(-1)
        expected = -log_p[3:-1].gather(-1, torch.tensor(row[4:])[:, None]).mean().item()
        assert found[str(len(row))]["avg_loss"] == pytest.approx(expected, abs=2e-5)
    if kind == "xlstm":
        return  # its own generate fails in transformers 5.23
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir)
    asked = [SamplingRequest(str(n), tuple(row[:n]), 6, stream=(n,)) for n, row in zip((3, 7, 20), ids, strict=True)]
    together = sample_completions(model, tokenizer, asked, batch_size=3, progress=False)
    for request in asked:
        assert together[request.key] == sample_completions(model, tokenizer, [request], progress=False)[request.key]


def test_rollouts_of_a_model_without_a_mask_are_refused(tiny_model_dir, tmp_path):
    from fdiv.rl import DPHConfig, DPHTrainer

    args = DPHConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_completion_length=4)
    model = build("recurrent_gemma", LEFT["recurrent_gemma"])
    with pytest.raises(
        DataError, match="RecurrentGemmaForCausalLM cannot be trained on rollouts: its logits change by"
    ):
        DPHTrainer(
            model, args=args, train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            processing_class=transformers.AutoTokenizer.from_pretrained(tiny_model_dir),
        )  # fmt: skip


@pytest.mark.parametrize(("max_length", "noted"), [(16, False), (17, True), (None, True)])
def test_longrope_is_noted_where_rows_may_pass_the_length_at_which_factors_change(max_length, noted):
    from transformers import Phi3Config, Phi3ForCausalLM

    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
    config = Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, original_max_position_embeddings=16, rope_parameters=rope, pad_token_id=0,
    )  # fmt: skip
    line = longrope_note(Phi3ForCausalLM(config), max_length)
    assert (line is not None and "more than 16 tokens; set max_length: 16" in line) == noted


def test_no_note_for_other_models():
    assert longrope_note(torch.nn.Linear(1, 1), None) is None
