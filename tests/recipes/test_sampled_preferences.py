"""Pairs that a model writes itself: who is preferred to whom, what is held out, what is counted; VADER and scored samples."""

import json

import pytest
import torch

from fdiv.alignment.scorers import build_scorer
from fdiv.recipes.tasks.sampled_preferences import SampledPreferencesConfig

PROMPTS = [f"Line {i}:" for i in range(6)]


def digits(completions, **_):
    """A scorer that reads the number a completion is."""
    return [float(text) for text in completions]


@pytest.fixture
def config(monkeypatch):
    """Six prompts, two of them held out, whose continuations are known: four numbers each, the same for all prompts."""

    def make(texts=("3", "1", "4", "2"), **settings):
        monkeypatch.setattr(SampledPreferencesConfig, "_sample", lambda self, prompts: [list(texts) for _ in prompts])
        settings = {"samples_per_prompt": 4, "test_prompts": 2, "scorer": f"{__name__}:digits", **settings}
        return SampledPreferencesConfig(model="a model", prompts=PROMPTS, **settings)

    return make


def _rows(folder, part):
    return [json.loads(line) for line in (folder / "data" / f"{part}.jsonl").read_text().splitlines()]


def test_the_best_is_preferred_to_the_worst(config, tmp_path):
    """4 over 1 and 3 over 2, for each prompt; prompts 0 and 3 are held out."""
    keys = config().build(tmp_path)
    assert keys["model_name_or_path"] == "a model"
    train, test = _rows(tmp_path, "train"), _rows(tmp_path, "test")
    assert {row["prompt"] for row in test} == {PROMPTS[0], PROMPTS[3]}
    assert {row["prompt"] for row in train} == {PROMPTS[i] for i in (1, 2, 4, 5)}
    assert [(row["chosen"], row["rejected"]) for row in test] == 2 * [("4", "1"), ("3", "2")]


def test_negatives_are_the_rejected_of_the_training_pairs(config, tmp_path):
    """One file that D²O (prompt, rejected) and methods of unlearning (prompt, completion) both read."""
    config(validation_prompts=1).build(tmp_path)
    negatives = [json.loads(line) for line in (tmp_path / "negatives.jsonl").read_text().splitlines()]
    pairs = _rows(tmp_path, "train")
    assert negatives == [
        {"prompt": p["prompt"], "rejected": p["rejected"], "completion": p["rejected"]} for p in pairs
    ]
    assert [row["rejected"] for row in negatives[:2]] == ["1", "2"]


def test_prompts_to_choose_settings_on_are_neither_trained_on_nor_tested(config, tmp_path):
    """Of prompts 1, 2, 4 and 5, which are not for the test, the first and the third."""
    config(validation_prompts=2).build(tmp_path)
    found = {part: {row["prompt"] for row in _rows(tmp_path, part)} for part in ("train", "validation", "test")}
    places = {"train": (2, 5), "validation": (1, 4), "test": (0, 3)}
    assert found == {part: {PROMPTS[place] for place in places[part]} for part in places}


def test_pairs_without_a_gap_are_left_out_and_counted(config, tmp_path):
    """3 over 2 is a gap of 1, below 2."""
    config(min_gap=2.0).build(tmp_path)
    counts = json.loads((tmp_path / "prepare.json").read_text())
    assert counts["train"] == {"pairs": 4, "left out": 4}
    assert counts["test"] == {"pairs": 2, "left out": 2}
    with pytest.raises(ValueError, match=r"no two continuations of a train prompt differ by min_gap=3.5"):
        config(min_gap=3.5).build(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"test_prompts": 6}, "6 different prompts, of which test_prompts=6"),
        ({"validation_prompts": 4}, "test_prompts=2 and validation_prompts=4 are held out"),
        ({"validation_prompts": -1}, "validation_prompts=-1: must be at least 0"),
        ({"pairs_per_prompt": 3}, "samples_per_prompt=4 cannot make pairs_per_prompt=3"),
        ({"min_gap": 0.0}, "min_gap=0.0: must be above 0"),
        ({"temperature": 0.0}, "temperature=0.0: must be above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ({"scorer": "vadr"}, "unknown scorer 'vadr'; did you mean 'vader'"),
    ],
)
def test_refused_settings(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_samples_are_continuations_of_the_model(tiny_model_dir):
    """As many per prompt as asked for, none longer than the limit, the same for the same seed."""
    from transformers import AutoTokenizer

    settings = {"samples_per_prompt": 4, "test_prompts": 1, "max_new_tokens": 3}
    made = [SampledPreferencesConfig(model=str(tiny_model_dir), prompts=PROMPTS, **settings) for _ in range(2)]
    first, again = (config._sample(PROMPTS) for config in made)
    assert first == again
    assert [len(texts) for texts in first] == 6 * [4]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    assert len({text for texts in first for text in texts}) > 6  # a random model rarely says the same twice
    assert (
        max(len(tokenizer(text)["input_ids"]) for texts in first for text in texts) <= 3 * 3
    )  # bytes may split again


def test_vader_gives_its_authors_numbers():
    """Two lines of the README of vaderSentiment."""
    pytest.importorskip("vaderSentiment", reason="the package vaderSentiment is not installed")
    texts = ["VADER is smart, handsome, and funny.", "VADER is not smart, handsome, nor funny."]
    assert build_scorer("vader")(prompts=["", ""], completions=texts) == [0.8316, -0.7424]
    negated = build_scorer({"name": "vader", "negated": True})
    assert negated(prompts=["", ""], completions=texts) == [-0.8316, 0.7424]


def test_preferences_evaluation_scores_own_samples(tiny_model_dir):
    """The mean over prompts and its standard error, by hand; the samples are those behind the entropy."""
    from transformers import AutoTokenizer

    from fdiv.eval.preferences.evaluation import PreferencesEvalConfig, _Prompt

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    evaluation = PreferencesEvalConfig(num_samples=2, scorer=f"{__name__}:digits")
    samples = [tuple(tokenizer(text)["input_ids"]) for text in ("1", "3", "5", "9")]
    prompts = [_Prompt(i, tuple(tokenizer(PROMPTS[i])["input_ids"])) for i in range(2)]
    found = evaluation._scored_samples(tokenizer, prompts, samples)
    assert found["score"] == pytest.approx((2 + 7) / 2)
    # s = 2.5·√2 over √2 prompts.
    assert found["score_se"] == pytest.approx(torch.tensor([2.0, 7.0]).std().item() / 2**0.5)
    assert found["distinct_1"] == 1.0
    with pytest.raises(ValueError, match="num_samples=0 takes none"):
        PreferencesEvalConfig(num_samples=0, scorer="vader")
