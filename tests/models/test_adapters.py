"""Adapters with vocabularies of their own, by folder and by hub name: loaded and merged with the logits they had."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fdiv.errors import DataError
from fdiv.models.adapters import adapter_folder
from fdiv.models.loading import base_and_adapter, load_model, load_tokenizer
from fdiv.training.merge import merge_adapter

LAST = 8


@pytest.fixture(scope="module")
def base(tiny_model_dir, tmp_path_factory):
    """An untied tiny model with four rows of padding beyond its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + 4, mean_resizing=False)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return folder


KINDS = {
    # rows added to the base, modules saved whole, further options
    "saved": (3, ["embed_tokens", "lm_head"], {}),
    "lora on both": (3, None, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "shrunk": (-2, ["embed_tokens", "lm_head"], {}),
    "plain": (0, None, {}),
}


LOST = {
    # whose rows are nowhere
    "saved embedding": ((3, ["embed_tokens"], {}), "lm_head"),
    "saved head": ((3, ["lm_head"], {"target_modules": ["embed_tokens", "q_proj"]}), "model.embed_tokens"),
    "nothing saved": ((3, None, {}), "model.embed_tokens and lm_head"),
}


def make(base, kind, folder):
    added, saved, options = KINDS[kind] if kind in KINDS else LOST[kind][0]
    torch.manual_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    if added:
        model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + added, mean_resizing=False)
    if added > 0:
        tokenizer.add_tokens([f"<new{number}>" for number in range(4 + added)])
    config = LoraConfig(modules_to_save=saved, init_lora_weights=False, **{"target_modules": ["q_proj"], **options})
    model = get_peft_model(model, config)
    model.save_pretrained(folder, save_embedding_layers=kind == "lora on both")
    tokenizer.save_pretrained(folder)
    return logits_of(model.eval())


def logits_of(model):
    rows = model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        return model(torch.arange(rows - LAST, rows)[None]).logits


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_those_that_were_saved(kind, base, tmp_path):
    expected = make(base, kind, tmp_path / "adapter")
    names = (str(tmp_path / "adapter"), None), (str(base), str(tmp_path / "adapter"))
    for words in names:
        torch.testing.assert_close(logits_of(load_model(*words, dtype="float32")).cpu(), expected)
        assert ("<new2>" in load_tokenizer(*words).get_vocab()) == (KINDS[kind][0] > 0)
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(
        logits_of(load_model(str(merged), dtype="float32")).cpu(), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["saved", "plain"])
def test_a_hub_name_is_resolved_to_its_folder(kind, base, tmp_path, monkeypatch):
    """A download in the hub's cache; no connection is needed."""
    import huggingface_hub.constants as constants

    snapshot = tmp_path / "hub" / "models--someone--adapter" / "snapshots" / ("0" * 40)
    expected = make(base, kind, snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    for module in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.TRANSFORMERS_CACHE"):
        monkeypatch.setattr(module, str(tmp_path / "hub"), raising=False)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert adapter_folder("someone/adapter") == snapshot
    assert base_and_adapter("someone/adapter") == (str(base), str(snapshot))
    assert base_and_adapter(str(base), "someone/adapter") == (str(base), str(snapshot))
    for words in (("someone/adapter", None), (str(base), "someone/adapter")):
        torch.testing.assert_close(logits_of(load_model(*words, dtype="float32")).cpu(), expected)
        assert ("<new2>" in load_tokenizer(*words).get_vocab()) == (kind == "saved")
    assert adapter_folder("someone/nothing") is None
    assert base_and_adapter("someone/nothing") == ("someone/nothing", None)


@pytest.mark.parametrize("kind", LOST)
def test_tokens_without_rows_are_refused(kind, base, tmp_path):
    """Rows that were made at random when the vocabulary grew, and never saved: no load can be the trained model."""
    make(base, kind, tmp_path / "adapter")
    with pytest.raises(DataError, match=rf"does not hold those of {LOST[kind][1]}: save them with it"):
        load_model(str(tmp_path / "adapter"))
    with pytest.raises(DataError, match="save them with it"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")


def test_an_adapter_of_an_adapter_is_refused(base, tmp_path):
    make(base, "plain", tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    settings = tmp_path / "two" / "adapter_config.json"
    settings.write_text(
        json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": str(tmp_path / "one")})
    )
    with pytest.raises(DataError, match="is itself an adapter, .*merge that one first"):
        base_and_adapter(str(tmp_path / "two"))


def test_a_recipe_names_the_way_out(base, tmp_path, capsys):
    from fdiv.cli import main

    make(base, "plain", tmp_path / "adapter")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    recipe = {"method": "f_dpo", "model_name_or_path": str(tmp_path / "adapter"), "use_cpu": True, "bf16": False}
    recipe |= {"dataset_name": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "out"), "report_to": "none"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["run", str(tmp_path / "recipe.yaml")]) == 1
    assert "is an adapter: `fdiv merge" in capsys.readouterr().err
