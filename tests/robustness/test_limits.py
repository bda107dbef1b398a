"""`benchmarks.limits`: FLOPs by hand and as torch counts them, and a run on a tiny model. Nothing here is timed."""

from __future__ import annotations

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.support import processes  # noqa: F401 (puts the repository on the path)

limits = importlib.import_module("benchmarks.limits")
Architecture, Passes, step_flops = limits.Architecture, limits.Passes, limits.step_flops


def llama(vocabulary=100):
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


# Per layer: query and output 32·32 each, key and value 32·16 each, three of 32·48 in the MLP.
BODY, HEAD = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48), 100 * 32


def test_the_architecture_holds_the_matrices_that_are_multiplied():
    assert BODY == 15_360
    assert limits.architecture(llama()) == Architecture(body=BODY, head=HEAD, layers=2, width=32)


def test_two_answers_to_one_prompt_by_hand():
    """A prompt of 3 tokens, answers of 2 and 4.

    Tokens with an output that is read: the prompt's 3, then 1 and 3. Logits: one after the prompt, then 1 and 3. Pairs:
    1+2+3 in the prompt, 4 in the first answer, 4+5+6 in the second.
    """
    found = limits.row_passes(3, [2, 4])
    assert found == Passes(tokens=7, scored=5, pairs=6 + 4 + 15)
    assert found.flops(limits.architecture(llama())) == 2 * BODY * 7 + 2 * HEAD * 5 + 4 * 2 * 32 * 25


def test_scored_texts_share_their_prompts_and_rows_of_a_batch_do_not():
    from fdiv.inference.encoding import EncodedText

    texts = [EncodedText((1, 2, 3, 7, 8), 3), EncodedText((1, 2, 3, 4, 5, 6, 7), 3), EncodedText((9, 2, 3, 4), 2)]
    assert limits.scoring_passes(texts) == Passes(7 + 3, 5 + 2, 25 + 6)
    batch = {
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]]),
        "completion_mask": torch.tensor([[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1]]),
    }
    assert limits.batch_passes(batch) == Passes(4 + 6, 2 + 4, 10 + 21)
    assert limits.generation_passes([3, 3], [4, 0]) == Passes(6, 4, 21)


def test_the_count_is_torchs():
    """Forward, and forward and backward, of two rows of 11 tokens without padding, attention in full."""
    from torch.utils.flop_counter import FlopCounterMode

    model, rows, length = llama(), 2, 11
    ids = torch.randint(1, 100, (rows, length))
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids).logits
    passes = Passes(tokens=rows * length, scored=rows * length, pairs=rows * length**2)
    weights = limits.architecture(model)
    assert counter.get_total_flops() == passes.flops(weights)
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids).logits
        logits.sum().backward()
    assert counter.get_total_flops() == step_flops(weights, passes, Passes())


def test_growth_is_the_exponent():
    assert limits.growth([1, 2, 4], [3.0, 6.0, 12.0]) == pytest.approx(1)
    assert limits.growth([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)


def test_operators_have_a_kind():
    kinds = {name: limits.kind_of(f"aten::{name}") for name in ("addmm", "_log_softmax", "mul", "copy_", "index_add")}
    assert kinds == {
        "addmm": "matrix products",
        "_log_softmax": "softmax and exponentials",
        "mul": "elementwise",
        "copy_": "copies",
        "index_add": "copies",
    }


def test_a_share_is_flops_over_time_over_rate():
    task = limits.Task("scoring", lambda: None, flops=10**9, rows=4, tokens=60)
    turn = {"cpu": 0.5, "wall": 1.0, "gemm_rate": 4e9, "share": 0.5}
    found = limits.summary(task, [turn, turn])
    assert (found["share"], found["share_interval"], found["rows_per_second"]) == (0.5, [0.5, 0.5], 8.0)
    assert (found["goal"], found["meets_goal"]) == (0.7, False)
    assert limits.summary(SimpleNamespace(**{**vars(task), "name": "generation"}), [turn])["meets_goal"] is None


def test_no_row_is_read_twice(tmp_path):
    """As many made-up rows as are asked for, all different; of a file with more every second, of one with fewer none."""
    limits.write_rows(tmp_path, 40)
    rows = limits.read_rows(tmp_path, 40)
    assert len({row["question"] for row in rows}) == 40
    assert limits.read_rows(tmp_path, 20) == rows[::2]
    with pytest.raises(SystemExit, match=r"forget10_perturbed\.json has 40 rows and 41 are asked for: lower --rows"):
        limits.read_rows(tmp_path, 41)


def test_rows_are_made_up_for_every_option(tmp_path, monkeypatch):
    """The largest of the options says how many: with 40 of `--rows` no row stands in two places."""
    asked = {}

    def shares(model, folder, rows, options):
        asked["rows"] = rows
        return {}

    def tofu(model, folder, options):
        asked["tofu"] = (folder / "holdout10.json").read_text().splitlines()
        return {}

    monkeypatch.setattr(limits, "shares", shares)
    monkeypatch.setattr(limits, "tofu", tofu)
    words = ["--model", "none", "--output", str(tmp_path / "limits.json"), "--parts", "shares", "tofu"]
    monkeypatch.setattr(sys, "argv", ["limits", *words, "--rows", "40", "--tofu_rows", "50"])
    threads = torch.get_num_threads()
    try:
        limits.main()
    finally:
        torch.set_num_threads(threads)
    assert len(asked["rows"]) == len({row["question"] for row in asked["rows"]}) == 40
    assert len(set(asked["tofu"])) == 50


def test_it_runs_and_writes_every_part(tmp_path, monkeypatch):
    from fdiv.models.tiny import build_tiny_model

    model = str(build_tiny_model(tmp_path / "model", max_positions=512))
    words = (
        "--rows 2 --batch 2 --new_tokens 3 --turns 1 --gemm_size 32 --tofu_rows 2 --padded_batch 1 --padded_turns 1"
    )
    words += " --curve_rows 1 2 --curve_lengths 8 16 --curve_turns 1 --processes 1"
    output = tmp_path / "limits.json"
    monkeypatch.setattr(sys, "argv", ["limits", "--model", model, "--output", str(output), *words.split()])
    threads = torch.get_num_threads()
    try:
        limits.main()
    finally:
        torch.set_num_threads(threads)
    found = json.loads(output.read_text())
    assert set(found) == {"settings", "shares", "tofu", "padded", "curves", "peak_mib", "environment"}
    assert set(found["shares"]) == {"scoring", "f_dpo", "flat", "generation"}
    for name, part in found["shares"].items():
        assert part["flops_needed"] > 0 and part["share"] > 0 and part["cpu_seconds"] > 0, name
        assert part["goal"] == limits.GOALS.get(name)
        assert sum(part["time_by_kind"].values()) == pytest.approx(1, abs=0.2)
    assert found["shares"]["scoring"]["rows"] == 14  # two questions with seven answers each
    assert set(found["tofu"]["flops_needed"]) == {"scoring", "reference", "gradnorm", "generation"}
    assert found["padded"]["padded_length"] == 500 and found["padded"]["rows_per_second_ratio"] > 0
    assert found["curves"]["rows"]["sizes"] == [1, 2] and len(found["curves"]["length"]["cpu_seconds"]) == 2
    assert len(found["curves"]["processes"]["busiest_cpu_seconds"]) == 1
    assert output.with_suffix(".png").stat().st_size > 1000
