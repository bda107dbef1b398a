"""The tiny models: same arguments, same bytes; usable from disk; errors name the argument."""

import hashlib
import subprocess
import sys

import pytest
import torch

from fdiv.models.tiny import build_tiny_model, build_tiny_tokenizer


def _digests(folder):
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "tokenizer.json")
    }


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_loads_from_disk_with_the_size_counted_by_hand(tmp_path, architecture):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = build_tiny_model(tmp_path / "model", vocab_size=260, architecture=architecture)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    hidden, vocabulary, positions = 64, 260, 512
    if (
        architecture == "llama"
    ):  # 2 × (q, o, k, v at half width; 3 feed-forward matrices; 2 norms) + norm + embed + head
        block = 2 * hidden * hidden + 2 * hidden * hidden // 2 + 3 * hidden * 2 * hidden + 2 * hidden
        by_hand = 2 * block + hidden + 2 * vocabulary * hidden
    else:  # matrices with biases, layer norms with weight and bias, tied head
        block = 12 * hidden * hidden + 9 * hidden + 4 * hidden
        by_hand = 2 * block + 2 * hidden + vocabulary * hidden + positions * hidden
    assert model.num_parameters() == by_hand
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size == vocabulary
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 3


def test_same_arguments_same_bytes_in_another_process_and_random_state_kept(tmp_path):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    here = build_tiny_model(tmp_path / "here", vocab_texts=["aa bb aa bb cc dd ee ff"], seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    script = (
        "import sys; from fdiv.models.tiny import build_tiny_model as b;"
        "b(sys.argv[1], vocab_texts=['aa bb aa bb cc dd ee ff'], seed=3)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "there")], check=True)
    assert _digests(here) == _digests(tmp_path / "there")
    other_seed = build_tiny_model(tmp_path / "seed", vocab_texts=["aa bb aa bb cc dd ee ff"], seed=4)
    assert _digests(other_seed)["model.safetensors"] != _digests(here)["model.safetensors"]


def test_tokenizer_round_trips_any_text_and_ends_a_turn_with_eos():
    tokenizer = build_tiny_tokenizer(["hello world hello world"], vocab_size=300)
    text = "naïve — 日本語 🙂 \n\t{}"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("hello world").input_ids) == 2
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert whole == prompt + "yo" + tokenizer.eos_token + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "bert"}, "architecture='bert'"),
        ({"hidden_size": 48}, "hidden_size=48 is not a multiple of head_dim=32"),
        ({"layers": 0}, "layers=0"),
        ({"vocab_size": 200}, "vocab_size=200"),
        ({"vocab_texts": []}, "vocab_texts is empty"),
        ({"hidden_size": 63, "head_dim": 21}, "head_dim=21 is odd"),
    ],
)
def test_errors_name_the_argument_and_leave_nothing_behind(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_tiny_model(tmp_path / "model", **arguments)
    assert not (tmp_path / "model").exists()
