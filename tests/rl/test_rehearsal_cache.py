"""The partition by exact arithmetic, and the cache: what it keeps, and what it refuses."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from fdiv.errors import DataError
from fdiv.models.fingerprints import tokenizer_fingerprint, weights_fingerprint
from fdiv.rl.dph.rehearsal import RehearsalCache, RehearsalHeader, RehearsalRow, parse_threshold, partition_prompts

ROWS = [
    RehearsalRow("Wie groß?", [5, 6, 7], [8, 9], [-0.5, -0.25], 4),
    RehearsalRow([{"role": "user", "content": "two"}], [3], [4, 5, 6], [0.0, -1.0, -2.0], 1),
]


# ---------------------------------------------------------------- partition
@pytest.mark.parametrize(
    ("threshold", "near_perfect"),
    [("7/8", [0, 1]), (0.875, [0, 1]), ("0.8751", [0]), (1, [0]), ("6/8", [0, 1, 2]), ("1/8", [0, 1, 2, 3])],
)
def test_partition_at_thresholds_of_eight_samples(threshold, near_perfect):
    correct = [8, 7, 6, 1, 0]
    parts = partition_prompts(correct, [8] * 5, threshold)
    assert parts.near_perfect == near_perfect
    assert parts.explore == [index for index in range(4) if index not in near_perfect]
    assert parts.wrong == [4]


def test_the_share_is_compared_exactly():
    # In floating point 0.56 · 25 is 14.000000000000002, and 14 of 25 would be refused.
    assert 0.56 * 25 > 14
    assert partition_prompts([14, 13], [25, 25], 0.56) == ([0], [1], [])
    third = Fraction(1, 3)
    assert partition_prompts([1], [3], third).near_perfect == [0]
    assert partition_prompts([1], [3], "0.3334").explore == [0]
    assert parse_threshold("7 / 8") == parse_threshold(0.875) == Fraction(7, 8)


def test_a_sample_without_a_score_neither_helps_nor_condemns():
    # 7 correct of 7 scored of 8 sampled is 7/8; 6 of 6 is not; nothing correct is "wrong" only when all were scored.
    parts = partition_prompts([7, 6, 0, 0], [8] * 4, "7/8", scored=[7, 6, 7, 8])
    assert parts == ([0], [1, 2], [3])


@pytest.mark.parametrize("threshold", ["0", 0, -0.5, "9/8", "1.01", "most", "1/0", float("nan")])
def test_thresholds_that_are_no_share(threshold):
    with pytest.raises(ValueError, match="threshold="):
        parse_threshold(threshold)


@pytest.mark.parametrize(("correct", "scored", "drawn"), [(3, 2, 8), (9, 8, 8), (0, 0, 0), (-1, 0, 8)])
def test_counts_that_cannot_be(correct, scored, drawn):
    with pytest.raises(ValueError, match="cannot be"):
        partition_prompts([correct], [drawn], "7/8", scored=[scored])


# ---------------------------------------------------------------- cache
def make(**changes) -> RehearsalCache:
    header = {"tokenizer": "t" * 24, "model": "m" * 24, "temperature": 0.7, "model_name": "some/model", **changes}
    return RehearsalCache(RehearsalHeader(**header), ROWS)


def test_what_is_saved_is_loaded(tmp_path):
    cache = make(settings={"seed": 3, "top_p": 0.95})
    cache.save(tmp_path / "deep" / "cache.safetensors")
    loaded = RehearsalCache.load(tmp_path / "deep" / "cache.safetensors")
    assert loaded.rows == ROWS
    assert loaded.header == cache.header
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["cache.safetensors"]  # no half-written rest
    RehearsalCache(cache.header, []).save(tmp_path / "empty.safetensors")
    assert len(RehearsalCache.load(tmp_path / "empty.safetensors")) == 0


def test_a_batch_is_padded_as_grpo_pads():
    batch = make().batch([0, 1], pad_token_id=99)
    assert batch.prompt_ids.tolist() == [[5, 6, 7], [99, 99, 3]]
    assert batch.prompt_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.completion_ids.tolist() == [[8, 9, 99], [4, 5, 6]]
    assert batch.completion_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.reference_log_probs.tolist() == [[-0.5, -0.25, 0.0], [0.0, -1.0, -2.0]]
    with pytest.raises(ValueError, match="no rows"):
        make().batch([], 0)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"tokenizer": "x" * 24}, ["another tokenizer", "some/model", "t" * 24, "x" * 24, "fdiv presample"]),
        ({"model": "x" * 24}, ["another model", "some/model", "m" * 24, "x" * 24, "start training from"]),
        ({"temperature": 1.0}, ["temperature 0.7", "is 1.0", "set temperature: 0.7"]),
        ({"temperature": 0.7000001}, ["is 0.7000001"]),
    ],
)
def test_it_refuses_what_it_was_not_made_with(tmp_path, wanted, words):
    make().save(tmp_path / "c.safetensors")
    loaded = RehearsalCache.load(tmp_path / "c.safetensors")
    loaded.check(tokenizer="t" * 24, model="m" * 24, temperature=0.7)
    loaded.check()
    with pytest.raises(DataError) as error:
        loaded.check(**wanted)
    for word in [str(tmp_path / "c.safetensors"), *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (RehearsalRow("a", [], [1], [-1.0], 0), "without tokens"),
        (RehearsalRow("a", [1], [], [], 0), "without tokens"),
        (RehearsalRow("a", [1], [2, 3], [-1.0], 0), "1 log-probabilities for 2 tokens"),
        (RehearsalRow("a", [1], [2], [float("nan")], 0), "nan is no log-probability"),
        (RehearsalRow("a", [1], [2], [float("-inf")], 0), "-inf is no log-probability"),
        (RehearsalRow("a", [1], [2], [0.1], 0), "0.1 is no log-probability"),
    ],
)
def test_rows_that_cannot_be_rehearsed(row, message):
    with pytest.raises(DataError, match="row 1: .*" + message):
        RehearsalCache(make().header, [ROWS[0], row])


def test_files_that_are_no_cache(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="fdiv presample"):
        RehearsalCache.load(tmp_path / "absent")
    text, other, cut, old = (tmp_path / name for name in ("text", "other", "cut", "old"))
    text.write_text("hello")
    save_file({"a": torch.zeros(2)}, other)
    make().save(cut)
    cut.write_bytes(cut.read_bytes()[:-20])
    save_file({"a": torch.zeros(1)}, old, metadata={"fdiv_rehearsal": '{"format": 0}'})
    for path, message in ((text, "damaged"), (other, "no rehearsal cache"), (cut, "damaged"), (old, "of format 0")):
        with pytest.raises(DataError, match=message):
            RehearsalCache.load(path)


# ---------------------------------------------------------------- fingerprints
def load(path, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def test_fingerprint_follows_the_weights(tiny_model_dir, tmp_path):
    from fdiv.models.tiny import build_tiny_model

    model = load(tiny_model_dir)
    digest = weights_fingerprint(model)
    assert digest == weights_fingerprint(load(tiny_model_dir, torch.bfloat16))  # loaded at another precision
    assert digest != weights_fingerprint(load(build_tiny_model(tmp_path, seed=1)))
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 0.5
    assert digest != weights_fingerprint(model)


def test_a_fresh_adapter_is_the_base_model_and_a_trained_one_is_not(tiny_model_dir):
    from peft import LoraConfig, get_peft_model

    digest = weights_fingerprint(load(tiny_model_dir))
    settings = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(load(tiny_model_dir), settings)
    assert weights_fingerprint(model) == digest
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.1)
    assert weights_fingerprint(model) != digest


def test_fingerprint_of_the_tokenizer(tiny_model_dir):
    from transformers import AutoTokenizer

    from fdiv.models.tiny import build_tiny_tokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    digest = tokenizer_fingerprint(tokenizer)
    tokenizer.pad_token, tokenizer.padding_side, tokenizer.chat_template = tokenizer.eos_token, "right", "{{ x }}"
    assert tokenizer_fingerprint(tokenizer) == digest  # none of these changes what an id means
    tokenizer.add_tokens(["<tool>"])
    assert tokenizer_fingerprint(tokenizer) != digest
    assert tokenizer_fingerprint(build_tiny_tokenizer(["aaaa bbbb"], vocab_size=384)) != digest
