"""Names of number types, and adapters by their folder, with tokens of their own."""

import argparse

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fdiv.errors import DataError
from fdiv.eval.benchmark.options import add_shared_arguments
from fdiv.eval.lm_eval import command as lm_eval
from fdiv.eval.pass_at_k import command as passk
from fdiv.eval.preferences import command as preferences
from fdiv.eval.tofu.evaluation import TofuEvalConfig
from fdiv.models.dtypes import DTYPES, dtype_name
from fdiv.models.loading import base_and_adapter, load_model, load_tokenizer

SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16", "torch.bfloat16": "bfloat16"}
PARSERS = {
    "tofu": lambda parser: add_shared_arguments(parser, TofuEvalConfig),
    "passk": passk.add_arguments,
    "preferences": preferences.add_arguments,
    "lm_eval": lm_eval.add_arguments,
}
NEEDED = {
    "preferences": "--model m --dataset d --divergence kl --beta 1 --output o",
    "lm_eval": "--model m --tasks t --output o",
    "tofu": "--output o",
}


@pytest.mark.parametrize("kind", PARSERS)
@pytest.mark.parametrize("text", [*DTYPES, *SHORT, "bf8", "int8", ""])
def test_dtype_is_a_choice_of_every_evaluation(kind, text, capsys):
    parser = argparse.ArgumentParser()
    PARSERS[kind](parser)
    words = [*NEEDED.get(kind, "").split(), "--dtype", text]
    if text in (*DTYPES, *SHORT):
        assert parser.parse_args(words).dtype == SHORT.get(text, text)
        return
    with pytest.raises(SystemExit):
        parser.parse_args(words)
    assert f"dtype {text!r}: choose auto, float32, bfloat16, float16" in capsys.readouterr().err


def test_dtype_name_refuses_in_one_line():
    with pytest.raises(DataError, match=r"^dtype 'fp8': choose .*$"):
        dtype_name("fp8")


@pytest.fixture(scope="module")
def adapters(tiny_model_dir, tmp_path_factory):
    """LoRA adapters on the tiny model: a plain one, and one with three tokens added to tokenizer and embedding."""
    from peft import LoraConfig, get_peft_model

    made = {}
    for name, added in (("plain", 0), ("added", 3)):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        if added:
            tokenizer.add_tokens([f"<new{i}>" for i in range(added)])
            model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + added, mean_resizing=False)
        tied = {"ensure_weight_tying": True} if model.config.tie_word_embeddings else {}
        saved = ["embed_tokens"] if added else None
        config = LoraConfig(target_modules="all-linear", init_lora_weights=False, modules_to_save=saved, **tied)
        model = get_peft_model(model, config)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with torch.no_grad():
            logits = model.eval()(torch.arange(8)[None]).logits
        made[name] = (str(folder), logits)
    return made


@pytest.mark.parametrize("name", ["plain", "added"])
@pytest.mark.parametrize("as_model", [True, False])
def test_an_adapter_by_its_folder(adapters, tiny_model_dir, name, as_model):
    """Loaded as the model or beside its base, it has the logits that it was saved with, rows of new tokens included."""
    folder, expected = adapters[name]
    words = (folder, None) if as_model else (str(tiny_model_dir), folder)
    with torch.no_grad():
        found = load_model(*words, dtype="fp32")(torch.arange(8)[None]).logits
    torch.testing.assert_close(found.cpu(), expected)
    assert ("<new2>" in load_tokenizer(*words).get_vocab()) == (name == "added")


def test_an_adapter_as_model_beside_another_is_refused(adapters):
    folder = adapters["plain"][0]
    with pytest.raises(DataError, match="is an adapter, and --adapter"):
        base_and_adapter(folder, folder)
