"""Encoder-decoder models are refused in one line, wherever a model is loaded."""

from __future__ import annotations

import pytest
import transformers
from datasets import Dataset

from fdiv.errors import DataError
from fdiv.models.loading import check_causal, load_model
from tests.core.test_constructors import FAMILIES, rows

SIZES = {
    "bart": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
    "pegasus": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
                "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
}  # fmt: skip
REFUSAL = r"is an encoder-decoder model \({}\): fdiv trains and scores"


def build(kind):
    config = transformers.AutoConfig.for_model(kind, vocab_size=384, **SIZES[kind])
    return transformers.AutoModelForSeq2SeqLM.from_config(config)


@pytest.fixture(scope="module", params=SIZES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory, tiny_model_dir):
    path = tmp_path_factory.mktemp("models") / kind
    build(kind).save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(path)
    return str(path)


def test_load_model(kind, folder):
    with pytest.raises(DataError, match=REFUSAL.format(kind)) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_trainers_from_a_path_and_from_an_object(family, kind, folder, tmp_path):
    trainer_class, config_class, columns, others = FAMILIES[family]
    args = config_class(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    for model in (folder, build(kind)):
        with pytest.raises(DataError, match=REFUSAL.format(kind)):
            trainer_class(model, args=args, train_dataset=rows(columns), **others)


def test_a_run_and_its_memory_plan(kind, folder, tmp_path, capsys):
    from fdiv.cli.command import main

    data = tmp_path / "rows.jsonl"
    Dataset.from_dict({"prompt": ["a"] * 4, "chosen": [" b"] * 4, "rejected": [" c"] * 4}).to_json(str(data))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"method: f_dpo\ndivergence: reverse_kl\nmodel_name_or_path: {folder}\ndataset_name: {data}\n"
        f"output_dir: {tmp_path / 'out'}\nreport_to: none\nuse_cpu: true\nbf16: false\nmax_steps: 1\n"
    )
    for words in (["run", str(recipe)], ["run", str(recipe), "--dry_run"]):
        main(words)
        printed = capsys.readouterr()
        assert f"is an encoder-decoder model ({kind})" in " ".join((printed.out + printed.err).split()), words


def test_decoders_pass():
    for kind in ("llama", "gpt2", "bert"):
        check_causal(transformers.AutoConfig.for_model(kind))
    with pytest.raises(DataError, match="encoder-decoder"):
        check_causal(transformers.AutoConfig.for_model("t5"))
