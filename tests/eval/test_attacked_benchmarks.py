"""Attacks in `eval tofu` and `eval muse`: what is measured on which rows, beside the retrained model, in files and logs."""

import json

import pytest
import torch

from fdiv.cli import main
from fdiv.errors import DataError
from fdiv.eval.benchmark import presets
from fdiv.eval.benchmark.log import read_eval_log
from fdiv.eval.muse.evaluation import MuseEvalConfig, MuseEvaluation
from fdiv.eval.tofu.evaluation import TofuEvalConfig, TofuEvaluation
from fdiv.eval.unlearning.attacks import Attacked, build_attack, curve_area, encode
from fdiv.evaluation import EvalContext
from fdiv.models.loading import load_model, load_tokenizer
from fdiv.models.tiny import build_tiny_model
from fdiv.report.metrics import better, describe

ATTACKS = [
    {"name": "relearn", "steps": [1, 3], "learning_rate": 1e-2, "share": 0.3},
    "int4",
    "paraphrase",
    "answer_prefix",
    "priming",
    {"name": "sampling", "samples": 3, "max_items": 4},
    "adapter_removal",
]
GREEDY = ("relearn_1", "relearn_3", "int4", "paraphrase", "answer_prefix", "priming")


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    for name, preset in dict(presets.PRESETS).items():
        monkeypatch.setitem(presets.PRESETS, name, presets.Preset(**(preset.__dict__ | {"answer_tokens": 8})))


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return load_tokenizer(str(tiny_model_dir))


def tofu(tokenizer, data, **more):
    config = TofuEvalConfig(data=str(data), gradnorm=False, fluency_classifier="none", **more)
    return TofuEvaluation(config, tokenizer, progress=False)


def test_tofu_under_attack(tiny_model_dir, tofu_dir, tokenizer):
    model = load_model(str(tiny_model_dir))
    evaluation = tofu(tokenizer, tofu_dir, attacks=ATTACKS, retain_model=str(tiny_model_dir))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluation.retain_log()
    result = evaluation.aggregate(evaluation.run(model))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    values, notes = result.values, result.notes
    for label in GREEDY:
        for name in ("forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_truth_ratio", "extraction_strength"):
            assert 0 <= values[f"attack/{label}/{name}"] <= 1, (label, name)
            # the retain model is the model itself, attacked in the same way
            assert values[f"retrained/attack/{label}/{name}"] == values[f"attack/{label}/{name}"], (label, name)
        assert values[f"attack/{label}/forget_quality"] == 1.0
        weights = label in ("relearn_1", "relearn_3", "int4")
        assert (f"attack/{label}/retain_Q_A_Prob" in values) == weights
    assert values["attack/int4/retain_Q_A_Prob"] != values["retain_Q_A_Prob"]
    assert values["attack/int4/forget_Q_A_Prob"] != values["forget_Q_A_Prob"]
    assert "no adapter" in notes["attack/adapter_removal"] and values["attack/adapter_removal"] is None
    assert "on 5 of 7 rows, 2 rows were trained on" in notes["attack/relearn_1/forget_Q_A_Prob"]
    assert "on 4 of 7 rows" in notes["attack/sampling/leak@3"]
    assert {"attack/sampling/leak@1", "attack/sampling/leak@3", "attack/sampling/leak@3_se"} <= values.keys()
    assert all(value is not None or name in notes for name, value in values.items())
    for name in values:
        assert describe(name) is not None, name
    assert (
        better("attack/int4/forget_Q_A_ROUGE") == "lower" and better("retrained/attack/int4/forget_Q_A_ROUGE") is None
    )
    assert better("after/attack/relearn/forget_Q_A_ROUGE_area") == "lower"


def test_what_is_measured_after_an_attack_is_what_the_evaluation_measures(tiny_model_dir, tofu_dir, tokenizer):
    """The attacked model by itself, and the attacked rows in a file, give the same numbers on the rows that count."""
    model = load_model(str(tiny_model_dir))
    evaluation = tofu(tokenizer, tofu_dir, attacks=["int4", "paraphrase", ATTACKS[0]])
    log = evaluation.run(model)
    values = evaluation.aggregate(log).values
    rounded = build_attack("int4").attack(model, tokenizer, [], seed=0).model
    alone = tofu(tokenizer, tofu_dir)
    expected = alone.aggregate(alone.run(rounded)).values
    for name in ("forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_truth_ratio", "extraction_strength"):
        assert values[f"attack/int4/{name}"] == pytest.approx(expected[name], rel=1e-4), name
    # seven forget rows are measured, so all five retain rows are
    assert values["attack/int4/retain_Q_A_Prob"] == pytest.approx(expected["retain_Q_A_Prob"], rel=1e-4)
    rows = build_attack("paraphrase").attack(model, tokenizer, evaluation.attack_rows(), seed=0).rows
    text = encode(rows[0], tokenizer, evaluation.config.prompt())
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([text.input_ids])).logits[0, text.prompt_length - 1 : -1].log_softmax(-1)
    loss = -scores.gather(1, torch.tensor(text.label_ids)[:, None]).mean().item()
    assert log.items("attack/paraphrase/forget_Q_A_Prob")[0]["avg_loss"] == pytest.approx(loss, rel=1e-4)
    # relearned rows are out, and the curve begins with the rows that are left
    trained = log.stamp["attacks"]["relearn_1"]["trained_on"]
    left = log.items("attack/relearn_1/forget_Q_A_Prob")
    assert len(trained) == 2 and sorted([*left, *trained]) == list(range(7))
    start = sum(log.items("forget_Q_A_Prob")[i]["prob"] for i in left) / len(left)
    heights = [start, *(values[f"attack/relearn_{step}/forget_Q_A_Prob"] for step in (1, 3))]
    assert values["attack/relearn/forget_Q_A_Prob_area"] == pytest.approx(curve_area([0, 1, 3], heights), rel=1e-9)
    assert heights[2] > heights[0]


def test_the_given_beginning_is_no_part_of_the_answer(tiny_model_dir, tofu_dir, tokenizer):
    evaluation = tofu(tokenizer, tofu_dir, attacks=[{"name": "answer_prefix", "share": 0.5}])
    log = evaluation.run(load_model(str(tiny_model_dir)))
    row = log.items("attack/answer_prefix/forget_Q_A_ROUGE")[0]
    assert row["ground_truth"] == "lives in Oslo." and log.items("forget_Q_A_ROUGE")[0]["ground_truth"].startswith(
        "Author A"
    )


def test_files_logs_and_the_command_line(tiny_model_dir, tofu_dir, tmp_path):
    words = ["--model", tiny_model_dir, "--data", tofu_dir, "--no_gradnorm", "--fluency_classifier", "none"]
    words += ["--attacks", "{name: relearn, steps: [1, 3], learning_rate: 1e-2}", "int8"]
    words += ["{name: sampling, samples: 2, max_items: 2}", "{name: adapter_scaling, factor: 0.5, as: half}"]
    assert main(["eval", "tofu", *map(str, words), "--output", str(tmp_path / "retain")]) == 0
    retain = tmp_path / "retain" / "TOFU_EVAL.json"
    assert (
        main(["eval", "tofu", *map(str, words), "--retain_logs", str(retain), "--output", str(tmp_path / "own")]) == 0
    )
    out = json.loads((tmp_path / "own" / "out.json").read_text())
    assert out["attack/int8/forget_Q_A_Prob"] == out["retrained/attack/int8/forget_Q_A_Prob"]
    assert out["attack/relearn/extraction_strength_area"] == out["retrained/attack/relearn/extraction_strength_area"]
    assert out["attack/sampling/leak@2"] == out["retrained/attack/sampling/leak@2"]
    assert "no adapter" in out["notes"]["attack/half"]
    log = read_eval_log(tmp_path / "own" / "TOFU_EVAL.json", "tofu")
    assert log.stamp["attacks"]["int8"]["settings"] == {"name": "int8", "seed": 0}
    # a log gives the same numbers again
    again = ["--from_logs", tmp_path / "own" / "TOFU_EVAL.json", "--retain_logs", retain]
    assert main(["eval", "tofu", *map(str, again), "--output", str(tmp_path / "again.json")]) == 0
    found = json.loads((tmp_path / "again.json").read_text())
    attacked = [name for name in out if "attack/" in name]
    assert len(attacked) > 40
    assert {name: found[name] for name in attacked} == {name: out[name] for name in attacked}
    # another parameter is another attack: the retrained model is shown without one
    words[words.index("int8")] = "{name: int8, group_size: 4}"
    assert main(["eval", "tofu", *map(str, words), "--retain_logs", str(retain), "--output", str(tmp_path / "o")]) == 0
    other = json.loads((tmp_path / "o" / "out.json").read_text())
    assert other["retrained/attack/int8/forget_Q_A_Prob"] == out["forget_Q_A_Prob"]
    assert "without the attack" in other["notes"]["retrained/attack/int8/forget_Q_A_Prob"]


def test_a_subset_of_the_rows(tiny_model_dir, tofu_dir, tokenizer):
    """Attacks look at no other rows than the evaluation does."""
    evaluation = tofu(tokenizer, tofu_dir, attacks=["int4", ATTACKS[0]], max_items=3)
    log = evaluation.run(load_model(str(tiny_model_dir)))
    trained = log.stamp["attacks"]["relearn_1"]["trained_on"]
    assert list(log.items("attack/int4/forget_Q_A_Prob")) == [0, 3, 6]
    assert list(log.items("attack/relearn_1/forget_Q_A_Prob")) == [i for i in (0, 3, 6) if i not in trained]
    assert evaluation.aggregate(log).values["attack/relearn/forget_Q_A_Prob_area"] > 0


def too_long(model, tokenizer, rows, *, seed):
    return Attacked(model, [row | {"question": row["question"] * (200 if n < 2 else 1)} for n, row in enumerate(rows)])


def all_too_long(model, tokenizer, rows, *, seed):
    return Attacked(model, [row | {"question": row["question"] * 200} for row in rows])


def test_rows_beyond_the_context_are_counted(tiny_model_dir, tofu_dir, tokenizer):
    evaluation = tofu(tokenizer, tofu_dir, attacks=[too_long, all_too_long])
    result = evaluation.aggregate(evaluation.run(load_model(str(tiny_model_dir))))
    assert "2 rows are longer than the model's context and left out" in result.notes["attack/too_long/forget_Q_A_Prob"]
    assert list(result.log.items("attack/too_long/forget_Q_A_Prob")) == [2, 3, 4, 5, 6]
    assert "no row fits" in result.notes["attack/all_too_long"]


def test_before_training_nothing_is_attacked(tiny_model_dir, tofu_dir, tokenizer, tmp_path):
    config = TofuEvalConfig(data=str(tofu_dir), gradnorm=False, generate=False, attacks=["int4"])
    for stage, attacked in (("before", False), ("after", True)):
        values = config.evaluate(
            load_model(str(tiny_model_dir)), tokenizer, {}, EvalContext(None, tmp_path, stage=stage)
        )
        assert ("attack/int4/forget_Q_A_Prob" in values) == attacked


def test_muse_under_attack(tiny_model_dir, muse_dir, tokenizer):
    config = MuseEvalConfig(
        corpus="tales", data=str(muse_dir), gradnorm=False, fluency_classifier="none", attacks=ATTACKS,
        retain_model=str(tiny_model_dir),
    )  # fmt: skip
    evaluation = MuseEvaluation(config, tokenizer, progress=False)
    model = load_model(str(tiny_model_dir))
    evaluation.retain_log()
    log = evaluation.run(model)
    result = evaluation.aggregate(log)
    values = result.values
    for label in GREEDY:
        for name in ("forget_verbmem_ROUGE", "forget_knowmem_ROUGE", "extraction_strength"):
            assert values[f"attack/{label}/{name}"] == values[f"retrained/attack/{label}/{name}"], (label, name)
        assert values[f"attack/{label}/memory_gap"] == 0.0
        assert (f"attack/{label}/retain_knowmem_ROUGE" in values) == (label in ("relearn_1", "relearn_3", "int4"))
    assert values["attack/sampling/leak@3"] is not None
    assert all(describe(name) is not None for name in values)
    # rows are numbered over prompts and questions; those trained on are out of both
    trained = log.stamp["attacks"]["relearn_1"]["trained_on"]
    prompts = [*log.items("attack/relearn_1/forget_verbmem_ROUGE")]
    questions = [5 + i for i in log.items("attack/relearn_1/forget_knowmem_ROUGE")]
    assert sorted([*prompts, *questions, *trained]) == list(range(11))
    begun = log.items("attack/answer_prefix/forget_verbmem_ROUGE")[0]
    assert begun["ground_truth"] == "in the old wood."


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"attacks": ["int3"]}, "unknown attack 'int3'"),
        ({"attacks": [{"name": "relearn", "stebs": 3}]}, "no argument 'stebs'"),
        ({"attacks": "int4"}, "is a list of names"),
        ({"attack_seed": -1}, "attack_seed=-1"),
        ({"attacks": [{"name": "int4", "max_items": 0}]}, "max_items=0"),
        ({"attacks": [{"name": "int4", "as": "a/b"}]}, "is no name"),
    ],
)
def test_settings_are_checked_before_anything_is_loaded(settings, message):
    with pytest.raises(DataError, match=message):
        TofuEvalConfig(**settings)


@pytest.mark.parametrize("option", ["--retain_model", "--reference_model"])
def test_a_model_beside_it_reads_the_same_tokens(option, tiny_model_dir, tofu_dir, tmp_path, capsys):
    build_tiny_model(tmp_path / "other", vocab_texts=["quite other words"])
    words = ["--model", tiny_model_dir, "--data", tofu_dir, "--output", tmp_path / "out", option, tmp_path / "other"]
    assert main(["eval", "tofu", *map(str, words), "--max_items", "1"]) == 1
    assert "other has another vocabulary than the model" in capsys.readouterr().err


def test_the_command_line_says_what_is_wrong(tiny_model_dir, tofu_dir, tmp_path, capsys):
    words = ["--model", tiny_model_dir, "--data", tofu_dir, "--output", tmp_path, "--attacks", "{name: int4, bits: 3}"]
    assert main(["eval", "tofu", *map(str, words)]) == 1
    assert "no argument 'bits'" in capsys.readouterr().err
