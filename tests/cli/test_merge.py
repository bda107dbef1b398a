"""`fdiv merge`: an adapter added to its base is the same model, published whole; what is no adapter is refused."""

import errno
import json
import os

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from fdiv.cli import main
from fdiv.models.tiny import build_tiny_model

IDS = torch.arange(5, 45).view(2, 20)


def save_adapter(model_dir, folder, tokenizer=False, dtype=torch.float32, **settings):
    """A random LoRA adapter on disk; the logits of base and adapter together."""
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    model = get_peft_model(base, LoraConfig(**settings)).eval()
    model.save_pretrained(folder)
    if tokenizer:
        own = AutoTokenizer.from_pretrained(model_dir)
        own.chat_template = "the adapter's own"
        own.save_pretrained(folder)
    with torch.no_grad():
        return model(IDS).logits


@torch.no_grad()
def logits(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True, "modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, {"use_dora": True}],
    ids=["lora", "rslora-head", "dora"],
)
def test_merged_logits_are_the_adapters(settings, tiny_model_dir, tmp_path):
    expected = save_adapter(tiny_model_dir, tmp_path / "adapter", **settings)
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, rtol=0, atol=1e-5)
    assert (expected - logits(tiny_model_dir)).abs().max() > 0.1


def test_the_folder_is_an_ordinary_model(tiny_model_dir, tmp_path, capsys):
    base = build_tiny_model(tmp_path / "base")
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**settings, "temperature": 0.7, "do_sample": True}))
    save_adapter(base, tmp_path / "adapter", tokenizer=True)
    output = tmp_path / "deep" / "merged"
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(output)]) == 0
    assert f"merged model: {output}" in capsys.readouterr().err
    files = {path.name for path in output.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "README.md"} <= files
    assert not [name for name in files if "adapter" in name or name.endswith((".bin", ".pt"))]
    assert [path.name for path in output.parent.iterdir()] == ["merged"]  # nothing staged is left
    assert json.loads((output / "generation_config.json").read_text())["temperature"] == 0.7
    assert AutoTokenizer.from_pretrained(output).chat_template == "the adapter's own"
    config = AutoModelForCausalLM.from_pretrained(output).config
    assert getattr(config, "quantization_config", None) is None
    assert (
        f"The LORA adapter `{tmp_path / 'adapter'}` added to the weights of `{base}`"
        in (output / "README.md").read_text()
    )


def test_the_number_type_is_the_bases_unless_it_is_said(tmp_path, tiny_model_dir):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(base)
    save_adapter(base, tmp_path / "adapter", dtype=torch.bfloat16)
    for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
        output = tmp_path / dtype
        assert main(["merge", str(tmp_path / "adapter"), "--output", str(output), "--dtype", dtype]) == 0
        assert AutoModelForCausalLM.from_pretrained(output, dtype="auto").dtype == expected


def test_evaluation_of_base_with_adapter_equals_that_of_the_merged_model(tiny_model_dir, tmp_path, pairs):
    save_adapter(tiny_model_dir, tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    places = {
        "adapter": ["--model", tiny_model_dir, "--adapter", tmp_path / "adapter"],
        "merged": ["--model", tmp_path / "merged", "--reference", tiny_model_dir],
    }
    found = {}
    for name, words in places.items():
        words = [*words, "--dataset", pairs / "test.jsonl", "--divergence", "reverse_kl", "--beta", "0.5"]
        output = tmp_path / f"eval_{name}"
        assert main(["eval", "preferences", *map(str, words), "--max_new_tokens", "4", "--output", str(output)]) == 0
        found[name] = json.loads((output / "preferences_eval.json").read_text())["metrics"]
    numbers = {key: value for key, value in found["adapter"].items() if value is not None}
    assert len(numbers) > 5 and any(value > 0 for key, value in numbers.items() if "kl" in key)
    assert found["merged"] == pytest.approx(found["adapter"], rel=1e-3, abs=1e-4, nan_ok=True)


def test_another_place_of_the_base(tiny_model_dir, tmp_path, fails):
    expected = save_adapter(tiny_model_dir, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    moved = {**settings, "base_model_name_or_path": str(tmp_path / "gone" / "model" / "here")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(moved))
    line = fails("merge", tmp_path / "adapter", "--output", tmp_path / "merged", code=1)
    assert "the base model" in line and "gone/model/here cannot be loaded" in line and "--base" in line
    words = ["merge", tmp_path / "adapter", "--base", tiny_model_dir, "--output", tmp_path / "merged"]
    assert main([str(word) for word in words]) == 0
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- what is refused
def test_what_is_no_adapter(tiny_model_dir, tmp_path, fails):
    (tmp_path / "empty").mkdir()
    output = ("--output", tmp_path / "merged")
    assert "a whole model, which needs no merging" in fails("merge", tiny_model_dir, *output, code=1)
    assert "holds no adapter: there is no adapter_config.json" in fails("merge", tmp_path / "empty", *output, code=1)
    line = fails("merge", tmp_path / "no" / "such" / "folder", *output, code=1)
    assert "no PEFT adapter can be loaded from" in line
    virtual = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    )
    virtual.save_pretrained(tmp_path / "prompt")
    line = fails("merge", tmp_path / "prompt", *output, code=1)
    assert "PROMPT_TUNING adapter" in line and "nothing to merge" in line
    assert not (tmp_path / "merged").exists()


def test_an_output_that_holds_something(tiny_model_dir, tmp_path, fails):
    save_adapter(tiny_model_dir, tmp_path / "adapter")
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "thesis.txt").write_text("years of work")
    assert "is not empty" in fails("merge", tmp_path / "adapter", "--output", kept, code=1)
    assert "is a file" in fails("merge", tmp_path / "adapter", "--output", kept / "thesis.txt", code=1)
    assert (kept / "thesis.txt").read_text() == "years of work"
    (tmp_path / "hollow").mkdir()
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "hollow")]) == 0


def test_a_base_of_another_shape(tmp_path, tiny_model_dir, capsys):
    save_adapter(tiny_model_dir, tmp_path / "adapter")
    other = build_tiny_model(tmp_path / "other", hidden_size=32)
    words = ["merge", tmp_path / "adapter", "--base", other, "--output", tmp_path / "merged"]
    assert main([str(word) for word in words]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fdiv:")]
    assert f"does not fit the base model {other}" in line
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "error, reason",
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (SafetensorError("I/O error: No space left on device"), "I/O error: No space left on device"),
    ],
    ids=["system", "safetensors"],
)
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, tiny_model_dir, monkeypatch, capsys, error, reason):
    from transformers import PreTrainedModel

    save_adapter(tiny_model_dir, tmp_path / "adapter")

    def full(model, folder, **_):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 1
    assert f"cannot be written: {reason}" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_a_damaged_adapter_and_one_of_no_known_type_are_one_line(tmp_path, tiny_model_dir, capsys):
    save_adapter(tiny_model_dir, tmp_path / "adapter")
    weights, settings = (tmp_path / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
    weights.write_bytes(weights.read_bytes()[:100])
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 1
    assert "does not fit the base model" in capsys.readouterr().err
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "peft_type": "TELEPATHY"}))
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 1
    assert "PEFT knows no type 'TELEPATHY'" in capsys.readouterr().err
