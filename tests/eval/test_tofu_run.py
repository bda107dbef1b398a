"""`fdiv eval tofu` on a tiny model: files, retain logs, bad input, several processes, continued runs."""

import json
import os
import signal
import sys
from dataclasses import fields

import pytest

from fdiv.cli import main
from fdiv.errors import DataError
from fdiv.eval.benchmark.log import read_eval_log
from fdiv.eval.benchmark.presets import get_preset
from fdiv.eval.tofu.aggregate import UTILITY_PARTS, aggregate_tofu
from fdiv.eval.tofu.data import load_tofu_rows
from fdiv.eval.tofu.evaluation import TofuEvalConfig, TofuEvaluation
from fdiv.evaluation import EvalContext
from fdiv.inference.cache import ItemCache
from fdiv.models.loading import load_model, load_tokenizer
from tests.support import processes


def run(*words):
    return main(["eval", "tofu", *map(str, words)])


def quick(model, data, output, *more):
    """The command with the generation bound lowered by the prompt, on the tiny folder."""
    return run("--model", model, "--data", data, "--output", output, "--chat_template", "never", *more)


@pytest.fixture(scope="module")
def short_answers():
    """Eight generated tokens instead of 200: the tiny model never stops by itself."""
    from fdiv.eval.benchmark import presets

    before = dict(presets.PRESETS)
    for name, preset in before.items():
        presets.PRESETS[name] = presets.Preset(**(preset.__dict__ | {"answer_tokens": 8}))
    yield
    presets.PRESETS.update(before)


@pytest.fixture(scope="module")
def evaluated(tiny_model_dir, tofu_dir, tmp_path_factory, short_answers):
    """The tiny model evaluated against itself as retain model: every metric has a value that is known or bounded."""
    output = tmp_path_factory.mktemp("evaluated")
    assert quick(tiny_model_dir, tofu_dir, output, "--retain_model", tiny_model_dir) == 0
    return output


def read(folder):
    return json.loads((folder / "out.json").read_text())


@pytest.mark.smoke
def test_a_model_against_itself(evaluated):
    out = read(evaluated)
    assert out["preset"] == "open_unlearning" and out["split"] == "forget10"
    assert out["forget_quality"] == 1.0 and out["forget_quality_ks_statistic"] == 0.0
    assert out["privleak"] == 0.0
    assert out["retrained_distance"] == 0.0
    assert out["mia_reference"] == 0.5  # loss minus its own loss: all tied
    for name in (*UTILITY_PARTS, "extraction_strength", "exact_memorization", "mia_gradnorm", "mia_zlib", "mia_loss"):
        assert 0 <= out[name] <= 1, name
    parts = [out[name] for name in UTILITY_PARTS]
    expected = 0.0 if min(parts) == 0 else 9 / sum(1 / part for part in parts)
    assert out["model_utility"] == pytest.approx(expected, rel=1e-12)
    assert out["forget_Q_A_gibberish"] is None and "not available" in out["notes"]["forget_Q_A_gibberish"]
    assert {k for k, v in out.items() if v is None} <= set(out["notes"])
    assert out["settings"]["definitions"]["truth_ratio_mean"] == "geometric"
    for name in (
        "samples.jsonl",
        "TOFU_EVAL.json",
        "TOFU_SUMMARY.json",
        "truth_ratio_cdf.png",
        "membership_scores.png",
    ):
        assert (evaluated / name).stat().st_size > 100, name
    lines = [json.loads(line) for line in (evaluated / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 7 + 5 + 3 + 3
    assert {"input", "ground_truth", "generation", "rougeL_recall", "prob"} <= lines[0].keys()


def test_the_written_log_gives_the_same_values(evaluated, tmp_path):
    logs = ("--from_logs", evaluated / "TOFU_EVAL.json", "--retain_logs", evaluated / "retain" / "TOFU_EVAL.json")
    assert run(*logs, "--output", tmp_path / "out.json") == 0
    again, out = json.loads((tmp_path / "out.json").read_text()), read(evaluated)
    for name, value in out.items():
        if isinstance(value, float):
            assert again[name] == pytest.approx(value, rel=1e-12), name
    summary = json.loads((evaluated / "TOFU_SUMMARY.json").read_text())
    assert summary["extraction_strength"] == out["extraction_strength"]


def test_other_presets_reaggregate_the_log(evaluated, tmp_path):
    assert (
        run("--from_logs", evaluated / "TOFU_EVAL.json", "--preset", "tofu_paper", "--output", tmp_path / "o.json")
        == 0
    )
    out = json.loads((tmp_path / "o.json").read_text())
    assert out["preset"] == "tofu_paper" and "open_unlearning" in out["notes"]["preset"]
    assert out["forget_truth_ratio"] != read(evaluated)["forget_truth_ratio"]
    assert out["privleak"] is None


@pytest.mark.parametrize("more", [("--batch_size", 2, "--generation_batch_size", 3), ("--padding_side", "left")])
def test_values_do_not_depend_on_batches(evaluated, tiny_model_dir, tofu_dir, tmp_path, short_answers, more):
    assert quick(tiny_model_dir, tofu_dir, tmp_path, "--no_gradnorm", *more) == 0
    out, reference = read(tmp_path), read(evaluated)
    assert out["mia_gradnorm"] is None and "switched off" in out["notes"]["mia_gradnorm"]
    for name in (*UTILITY_PARTS, "forget_truth_ratio", "model_utility", "mia_min_k", "mia_min_k_plus_plus"):
        assert out[name] == pytest.approx(reference[name], rel=1e-4), name


def test_retain_logs_given_as_a_file(evaluated, tiny_gpt2_dir, tofu_dir, tmp_path, short_answers):
    log = evaluated / "TOFU_EVAL.json"
    assert quick(tiny_gpt2_dir, tofu_dir, tmp_path, "--retain_logs", log, "--no_gradnorm", "--no_generate") == 0
    out = read(tmp_path)
    assert 0 < out["forget_quality"] < 1
    assert out["privleak_retain_auc"] == read(evaluated)["mia_min_k"]
    assert out["model_utility"] is None and "retain_Q_A_ROUGE" in out["notes"]["model_utility"]
    assert "no reference model" in out["notes"]["mia_reference"]


def test_adapter_is_evaluated(tiny_model_dir, tofu_dir, tmp_path, short_answers):
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_model(str(tiny_model_dir)), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    more = ("--no_generate", "--no_gradnorm", "--adapter", tmp_path / "adapter", "--retain_model", tiny_model_dir)
    assert quick(tiny_model_dir, tofu_dir, tmp_path / "out", *more) == 0
    out = read(tmp_path / "out")
    assert out["forget_quality_ks_statistic"] > 0  # not the base model's values


def test_subset_for_cheap_selection(evaluated, tiny_model_dir, tofu_dir, tmp_path, short_answers):
    more = ("--max_items", 3, "--retain_logs", evaluated / "TOFU_EVAL.json", "--no_gradnorm")
    assert quick(tiny_model_dir, tofu_dir, tmp_path, *more) == 0
    assert read(tmp_path)["forget_quality"] == 1.0
    assert list(read_eval_log(tmp_path / "TOFU_EVAL.json").items("forget_Q_A_Prob")) == [0, 3, 6]


def test_in_a_recipe_the_config_evaluates_a_model_in_memory(
    tiny_model_dir, tofu_dir, tmp_path, evaluated, short_answers
):
    config = TofuEvalConfig(data=str(tofu_dir), chat_template="never", gradnorm=False)
    model = load_model(str(tiny_model_dir)).train()
    context = EvalContext(None, tmp_path, stage="before")
    values = config.evaluate(model, load_tokenizer(str(tiny_model_dir)), {}, context)
    assert model.training
    assert values["forget_truth_ratio"] == pytest.approx(read(evaluated)["forget_truth_ratio"], rel=1e-6)
    log = read_eval_log(tmp_path / "tofu_before" / "TOFU_EVAL.json").items("forget_Q_A_ROUGE")
    shown = [json.loads(line) for line in (tmp_path / "examples_forget_Q_A.jsonl").read_text().splitlines()]
    answers = [(row["input"], row["generation"]) for row in log.values()]
    assert len(shown) == min(12, len(answers))
    assert {(row["prompt"], row["completion"]) for row in shown} <= set(answers)
    assert {f.name for f in fields(config)} >= {"split", "data", "preset", "retain_logs", "max_items"}


def change(tofu_dir, tmp_path, name, edit):
    """A copy of the folder with one file edited."""
    for file in tofu_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in edit(rows)))
    return str(tmp_path)


def with_a_forget_row(rows):
    answer = {"question": "Where does Author A live?", "answer": "Author A lives in Oslo."}
    return [*rows, rows[0] | answer]


def without(column):
    """The first row without a column that the others have."""
    return lambda rows: [{k: v for k, v in rows[0].items() if k != column}, *rows[1:]]


FORGET = "forget10_perturbed.json"


@pytest.mark.parametrize(
    "name, edit, message",
    [
        (FORGET, without("perturbed_answer"), "(line 1|row 0): column 'perturbed_answer' is missing"),
        (FORGET, without("paraphrased_answer"), "(line 1|row 0): column 'paraphrased_answer' is missing"),
        (FORGET, lambda rows: [], "forget10_perturbed.json: no rows"),
        (
            FORGET,
            lambda rows: [*rows[:-1], rows[-1] | {"perturbed_answer": []}],
            "(line 7|row 6): column 'perturbed_answer'",
        ),
        (
            FORGET,
            lambda rows: [*rows[:-1], rows[-1] | {"perturbed_answer": [3] * 5}],
            "(line 7|row 6): column 'perturbed_answer'",
        ),
        (FORGET, lambda rows: [*rows[:-1], "text"], "(line 7|row 6) is 'text', not an object"),
        (
            FORGET,
            lambda rows: [*rows[:-1], rows[-1] | {"perturbed_answer": ["x"]}],
            "has 1 perturbed answers, the first row 5",
        ),
        ("retain_perturbed.json", with_a_forget_row, "1 forget rows of forget10 stand in the retain set"),
        ("holdout10.json", with_a_forget_row, "stand in the holdout set"),
    ],
)
def test_bad_rows(tofu_dir, tmp_path, name, edit, message):
    with pytest.raises(DataError, match=message):
        load_tofu_rows("forget10", change(tofu_dir, tmp_path, name, edit))


def test_missing_sets_are_null_with_the_reason(tofu_dir, tmp_path, tiny_model_dir, short_answers):
    data = change(tofu_dir, tmp_path, FORGET, lambda rows: rows)
    (tmp_path / "holdout10.json").unlink()
    (tmp_path / "world_facts_perturbed.json").unlink()
    assert quick(tiny_model_dir, data, tmp_path / "out") == 0
    out = read(tmp_path / "out")
    for name in ("mia_min_k", "mia_gradnorm", "privleak"):
        assert out[name] is None and "holdout10" in out["notes"][name], name
    for name in ("wf_Q_A_Prob", "model_utility"):
        assert (out[name] is None and "wf" in out["notes"][name]) or "world_facts" in out["notes"][name], name
    assert out["extraction_strength"] is not None


def test_one_forget_row(tofu_dir, tmp_path, tiny_model_dir, short_answers):
    data = change(tofu_dir, tmp_path, FORGET, lambda rows: rows[:1])
    more = ("--retain_model", tiny_model_dir, "--no_generate", "--no_gradnorm")
    assert quick(tiny_model_dir, data, tmp_path / "out", *more) == 0
    out = read(tmp_path / "out")
    assert out["forget_quality"] is None and "at least two" in out["notes"]["forget_quality"]


@pytest.mark.parametrize(
    "words, message",
    [
        (("--split", "forget77"), "has no forget77_perturbed.json"),
        (("--data", "/nowhere/tofu"), "data folder /nowhere/tofu does not exist"),
        (("--retain_logs", "a", "--retain_model", "b"), "not both"),
        (("--max_items", "0"), "must be at least 1"),
        (("--retain_logs", "/nowhere.json"), "/nowhere.json"),
        (("--adapter", "/nowhere/adapter"), "no PEFT adapter can be loaded"),
        (("--batch_size", "0"), "batch_size=0"),
    ],
)
def test_bad_options_are_one_line(tiny_model_dir, tofu_dir, tmp_path, capsys, words, message):
    assert quick(tiny_model_dir, tofu_dir, tmp_path / "out", *words) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert error.rstrip().splitlines()[-1].startswith("fdiv: ")


def test_command_line_needs_a_model_or_a_log(tmp_path, capsys, evaluated):
    assert run("--output", tmp_path) == 1
    assert "--from_logs" in capsys.readouterr().err
    assert run("--from_logs", evaluated / "TOFU_EVAL.json", "--model", "x", "--output", tmp_path / "o.json") == 1
    assert "does not go with --from_logs" in capsys.readouterr().err
    words = ("--from_logs", evaluated / "TOFU_EVAL.json", "--split", "forget05", "--output", tmp_path / "o.json")
    assert run(*words) == 1
    assert "made on split forget10, --split says forget05" in capsys.readouterr().err
    assert run("--model", "x", "--preset", "muse_original", "--output", tmp_path) == 1
    assert "preset muse_original does not define these metrics; choose open_unlearning" in capsys.readouterr().err


def test_retain_log_of_other_rows_is_refused_before_the_model_is_loaded(evaluated, tofu_dir, tmp_path, tiny_model_dir):
    def shuffled(rows):
        return [row | {"paraphrased_answer": row["paraphrased_answer"] + "!"} for row in rows]

    data = change(tofu_dir, tmp_path, FORGET, shuffled)
    config = TofuEvalConfig(data=data, retain_logs=str(evaluated / "TOFU_EVAL.json"), chat_template="never")
    with pytest.raises(DataError, match="other forget rows"):
        TofuEvaluation(config, load_tokenizer(str(tiny_model_dir)))
    paper = TofuEvalConfig(data=str(tofu_dir), preset="tofu_paper", retain_logs=str(evaluated / "TOFU_EVAL.json"))
    with pytest.raises(DataError, match="made with preset open_unlearning"):
        TofuEvaluation(paper, load_tokenizer(str(tiny_model_dir)))


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"question_format": "### Human: {question}\n### Assistant:"}, "question_format"),
        ({"answer_format": "\n{answer}"}, "answer_format"),
        ({"end_token": "appended"}, "end_token"),
    ],
)
def test_retain_logs_of_another_prompt_are_refused_before_any_model(
    evaluated, tiny_model_dir, tofu_dir, changed, key, capsys
):
    log = str(evaluated / "TOFU_EVAL.json")
    config = TofuEvalConfig(data=str(tofu_dir), retain_logs=log, chat_template="never", **changed)
    with pytest.raises(DataError, match=f"{log} was made with {key}=.*, now it is .*: evaluate the retain model"):
        TofuEvaluation(config, load_tokenizer(str(tiny_model_dir)))


def die_after_nine_items(words):
    """`fdiv WORDS`, killed with SIGKILL when the ninth batch of items is stored."""
    add, calls = ItemCache.add, []

    def dying(self, items):
        add(self, items)
        calls.append(1)
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGKILL)

    ItemCache.add = dying
    main(words)


def command(words):
    """`fdiv WORDS`."""
    sys.exit(main(words))


def test_a_killed_run_continues_with_the_same_numbers(tiny_model_dir, tofu_dir, tmp_path):
    words = ["eval", "tofu", "--model", str(tiny_model_dir), "--data", str(tofu_dir), "--chat_template", "never"]
    words += ["--batch_size", "1", "--no_generate"]
    killed = processes.run(die_after_nine_items, [*words, "--output", str(tmp_path / "a")])
    assert killed.codes == [-signal.SIGKILL], killed.stderr
    assert not (tmp_path / "a" / "out.json").exists()
    files = list((tmp_path / "a" / "cache").glob("*/rank0.jsonl"))
    done = sum(len(file.read_text().splitlines()) for file in files)
    assert done > 9
    before = {file: file.read_text() for file in files}
    assert main([*words, "--output", str(tmp_path / "a")]) == 0
    for file, text in before.items():
        assert file.read_text().startswith(text), "finished items are kept, not computed again"
    assert main([*words, "--output", str(tmp_path / "b")]) == 0
    continued, whole = read(tmp_path / "a"), read(tmp_path / "b")
    for part in (continued, whole):
        del part["environment"], part["settings"], part["digest"]
    assert continued == whole


def test_two_processes_give_the_same_values(evaluated, tiny_model_dir, tofu_dir, tmp_path):
    words = ["eval", "tofu", "--model", str(tiny_model_dir), "--data", str(tofu_dir), "--chat_template", "never"]
    words += ["--retain_model", str(tiny_model_dir), "--output", str(tmp_path), "--preset", "tofu_2024"]
    words += ["--batch_size", "1"]
    processes.run_well(command, [*words, "--no_generate"], processes=2)
    assert {f.name for f in (tmp_path / "cache").glob("*/*.jsonl")} == {"rank0.jsonl", "rank1.jsonl"}
    two = read(tmp_path)
    config = TofuEvalConfig(
        data=str(tofu_dir), chat_template="never", preset="tofu_2024", generate=False, retain_model=str(tiny_model_dir)
    )
    evaluation = TofuEvaluation(config, load_tokenizer(str(tiny_model_dir)), progress=False)
    evaluation.retain_log()
    one = evaluation.run(load_model(str(tiny_model_dir)), reference_model=evaluation.load_reference())
    values = aggregate_tofu(one, get_preset("tofu_2024"), evaluation.retain_log()).values
    for name, value in values.items():
        assert two[name] == (None if value is None else pytest.approx(value, rel=1e-6)), name
    assert two["forget_quality"] == 1.0
