"""Preference pairs from TOFU rows: every perturbed answer once, no question in two splits, the model's own prompt format."""

import json
import os
from pathlib import Path

import pytest

from fdiv.recipes.tasks.tofu.preferences import TofuPreferencesConfig

SHARED = os.environ.get("FDIV_SHARED")


def _write(folder: Path, name: str, count: int, offset: int = 0) -> None:
    rows = [
        {
            "question": f"Who wrote book {number}?",
            "answer": f"Author {number}.",
            "paraphrased_answer": f"It was author {number}.",
            "perturbed_answer": [f"It was author {number}{letter}." for letter in "abc"],
        }
        for number in range(offset, offset + count)
    ]
    (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _pairs(keys, split):
    return [json.loads(line) for line in (Path(keys["dataset_name"]) / f"{split}.jsonl").read_text().splitlines()]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "tofu"
    folder.mkdir()
    _write(folder, "forget10_perturbed", 12)
    _write(folder, "retain_perturbed", 10, offset=10)  # two questions stand in both files
    return folder


def test_every_perturbed_answer_is_rejected_once_and_no_question_is_in_two_splits(data, tmp_path):
    config = TofuPreferencesConfig(data=str(data), test_fraction=0.25, validation_fraction=0.1, bos="<bos>")
    keys = config.build(tmp_path / "out")
    splits = {split: _pairs(keys, split) for split in ("train", "validation", "test")}
    prompts = {split: {pair["prompt"] for pair in pairs} for split, pairs in splits.items()}
    assert {split: len(found) for split, found in prompts.items()} == {"train": 13, "validation": 2, "test": 5}
    assert not (prompts["train"] & prompts["test"]) | (prompts["train"] & prompts["validation"])
    assert not prompts["validation"] & prompts["test"]
    pairs = [pair for found in splits.values() for pair in found]
    assert len(pairs) == (12 + 10) * 3
    for pair in pairs:
        number = pair["prompt"].removeprefix("<bos>Question: Who wrote book ").removesuffix("?\nAnswer:")
        assert pair["chosen"] == f" It was author {number}."
        assert pair["rejected"] in {f" It was author {number}{letter}." for letter in "abc"}
    assert len({(pair["prompt"], pair["rejected"]) for pair in pairs}) == 20 * 3
    assert (keys["dataset_train_split"], keys["dataset_test_split"]) == ("train", "test")


def test_the_seed_alone_decides_the_split(data, tmp_path):
    def build(folder, **values):
        keys = TofuPreferencesConfig(data=str(data), validation_fraction=0.0, **values).build(tmp_path / folder)
        assert not (Path(keys["dataset_name"]) / "validation.jsonl").exists()
        return _pairs(keys, "test")

    assert build("a") == build("b")
    assert {pair["prompt"] for pair in build("c", seed=1)} != {pair["prompt"] for pair in build("a2")}


def test_an_answer_equal_to_the_paraphrase_is_no_pair(data, tmp_path):
    row = {
        "question": "Q?",
        "paraphrased_answer": "Yes.",
        "perturbed_answer": ["Yes. ", "No."],
    }
    (data / "one.json").write_text("\n".join([json.dumps(row), json.dumps({**row, "question": "R?"})]))
    config = TofuPreferencesConfig(data=str(data), files=["one"], test_fraction=0.5, validation_fraction=0.0)
    keys = config.build(tmp_path / "out")
    assert [pair["rejected"] for pair in _pairs(keys, "train") + _pairs(keys, "test")] == [" No.", " No."]


@pytest.mark.parametrize("column", ["question", "paraphrased_answer", "perturbed_answer"])
def test_a_missing_column_is_named_with_file_and_row(data, tmp_path, column):
    path = data / "forget10_perturbed.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    del rows[3][column]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ValueError, match=rf"forget10_perturbed\.json, line 4: column '{column}' is missing"):
        TofuPreferencesConfig(data=str(data)).build(tmp_path / "out")


def test_bad_settings_are_refused_with_the_key(data, tmp_path):
    with pytest.raises(ValueError, match="files is empty"):
        TofuPreferencesConfig(data=str(data), files=[])
    with pytest.raises(ValueError, match="test_fraction"):
        TofuPreferencesConfig(data=str(data), test_fraction=0.0)
    with pytest.raises(ValueError, match="nothing to train on"):
        TofuPreferencesConfig(data=str(data), test_fraction=0.9, validation_fraction=0.2)
    with pytest.raises(ValueError, match="the validation split of 20 questions is empty"):
        TofuPreferencesConfig(data=str(data), validation_fraction=0.01).build(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"nowhere.*prepare\.data"):
        TofuPreferencesConfig(data=str(tmp_path / "nowhere")).build(tmp_path / "out")
    (data / "empty_perturbed.json").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        TofuPreferencesConfig(data=str(data), files=["empty_perturbed"]).build(tmp_path / "out")


@pytest.mark.skipif(SHARED is None, reason="FDIV_SHARED is not set: no real TOFU rows")
def test_real_rows_give_five_pairs_a_question(tmp_path):
    keys = TofuPreferencesConfig(data=str(Path(SHARED) / "data" / "tofu"), bos="<bos>").build(tmp_path / "out")
    counts = {split: len(_pairs(keys, split)) for split in ("train", "validation", "test")}
    assert counts == {"train": 480 * 5, "validation": 80 * 5, "test": 240 * 5}


@pytest.mark.skipif(SHARED is None, reason="FDIV_SHARED is not set: no small TOFU model")
def test_the_prompt_is_the_one_the_small_tofu_model_was_trained_on(tmp_path):
    from transformers import AutoTokenizer

    keys = TofuPreferencesConfig(data=str(Path(SHARED) / "data" / "tofu"), bos="<bos>").build(tmp_path / "out")
    pair = _pairs(keys, "test")[0]
    tokenizer = AutoTokenizer.from_pretrained(Path(SHARED) / "models" / "tofu-mini-full")
    question = pair["prompt"].removeprefix("<bos>Question: ").removesuffix("\nAnswer:")
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": pair["chosen"].strip()}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    assert pair["prompt"] + pair["chosen"] + tokenizer.eos_token == rendered
