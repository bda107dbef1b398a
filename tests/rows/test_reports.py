"""What became of the rows, counted by hand, for every trainer and evaluation, and in `result.json`."""

import json

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from fdiv.alignment.d2o.data import prepare_negatives
from fdiv.errors import DataError
from fdiv.inference.prompting import PromptFormat
from fdiv.rows.report import RowReport, records_of
from fdiv.unlearning import FLATConfig, GradAscentConfig, GradDiffConfig
from fdiv.unlearning.data.assembly import build_forget_dataset, read_retain_rows

QUIET = {"report_to": "none", "use_cpu": True, "bf16": False}


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def unlearning_rows(short, long):
    answer = " one two three" * 12
    rows = [{"prompt": f"Who is number {n}?", "completion": f" Ada {n}."} for n in range(short)]
    return Dataset.from_list(rows + [{"prompt": f"What of {n}?", "completion": answer} for n in range(long)])


def length_of(tokenizer, row):
    return len(tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"])


@pytest.mark.parametrize(("short", "long"), [(4, 0), (3, 1), (1, 3), (0, 4)])
def test_unlearning_counts_answers_that_lose_their_end(short, long, tokenizer, tmp_path):
    rows, reports = unlearning_rows(short, long), []
    args = GradAscentConfig(str(tmp_path), max_length=40, **QUIET)
    build_forget_dataset(rows, [], args, tokenizer, report=reports.append)
    (report,) = reports
    lengths = [length_of(tokenizer, row) for row in rows]
    assert report.record() == {
        "read": 4, "used": 4, "left_out": 0, "dropped": {}, "max_length": 40, "cut": sum(n > 40 for n in lengths),
        "longest": max(lengths), "without_signal": {},
    }  # fmt: skip
    assert report.cut == long
    assert ("every answer loses its end" in report.line()) == (short == 0)


def test_retain_and_template_answers_are_counted_too(tokenizer, tmp_path):
    reports = []
    args = FLATConfig(
        str(tmp_path), max_length=40, template_source="fixed", template_text="no idea of it at all " * 20, **QUIET
    )
    retain = read_retain_rows(unlearning_rows(2, 3), args, tokenizer, reports.append)
    build_forget_dataset(unlearning_rows(3, 0).select([2]), retain, args, tokenizer, report=reports.append)
    counts = {report.name: (report.read, report.cut) for report in reports}
    assert counts == {"retain rows": (5, 3), "forget rows": (1, 0), "template rows": (1, 1)}


def test_texts_too_short_to_score_are_counted(tokenizer, tmp_path):
    args = GradAscentConfig(str(tmp_path), max_length=16, text_prompt_tokens=6, **QUIET)
    rows, reports = Dataset.from_list([{"text": text} for text in ["a", "", "one two three four five six " * 4]]), []
    build_forget_dataset(rows, [], args, tokenizer, report=reports.append)
    (report,) = reports
    assert (report.read, report.used, report.dropped) == (2, 1, {"too short to score a token": 1})


FOLDED = [
    ("WHO IS number 0?", " ada  0."), ("Who is number 0?", " Ada 0.\n"), ("Ｗho is number 0?", " Ada 0."),
    ("Who is\u00a0number 0?", " Ada 0."),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "completion"), FOLDED)
def test_forget_rows_among_the_retain_rows_are_found_folded(prompt, completion, tokenizer, tmp_path):
    args = GradDiffConfig(str(tmp_path), max_length=64, **QUIET)
    other = Dataset.from_list(
        [{"prompt": "Else?", "completion": " No."}, {"prompt": prompt, "completion": completion}]
    )
    retain = read_retain_rows(other, args, tokenizer)
    with pytest.raises(
        DataError, match="1 of 2 forget rows also stand in the retain set .first: the forget rows, row 0"
    ):
        build_forget_dataset(unlearning_rows(2, 0), retain, args, tokenizer)
    different = other.map(lambda row: {"completion": row["completion"] + " Not."})
    build_forget_dataset(unlearning_rows(2, 0), read_retain_rows(different, args, tokenizer), args, tokenizer)


@pytest.mark.parametrize(("kept", "fine"), [(6, True), (5, True), (4, False)])
def test_negatives_of_d2o(kept, fine, tokenizer):
    long = {"prompt": "word " * 60, "rejected": " no"}
    rows = Dataset.from_list([{"prompt": "hi", "rejected": " x" * 50}] * kept + [long] * (10 - kept))
    reports = []
    prepare_negatives(rows, tokenizer, max_length=32, anchors=0, name="train_dataset", report=reports.append)
    (report,) = reports
    assert report.name == "training rows" and report.dropped == {"prompt fills max_length=32": 10 - kept}
    assert (report.read, report.used, report.cut) == (10, kept, kept)
    if fine:
        report.check()
    else:
        with pytest.raises(DataError, match="training rows: 4 of 10 rows are left"):
            report.check()


def test_sets_of_an_evaluation(tokenizer):
    from fdiv.eval.benchmark.rows import set_reports
    from fdiv.inference.greedy import GenerationRequest
    from fdiv.inference.prompting import EncodedText
    from fdiv.inference.scoring import ScoringRequest

    def text(tokens, labels):
        return EncodedText(tuple(range(tokens)), tokens - labels)

    scoring = [
        ScoringRequest("forget_Q_A_Prob/0", text(10, 3)), ScoringRequest("forget_Q_A_PERT_Prob/0/1", text(12, 3)),
        ScoringRequest("forget_Q_A_Prob/4", text(30, 3)), ScoringRequest("forget_Q_A_Prob/7", text(5, 0)),
        ScoringRequest("holdout/3", text(8, 2)),
    ]  # fmt: skip
    generation = [GenerationRequest("forget_Q_A_ROUGE/0", tuple(range(15)), 4)]
    sets = {"forget": ("forget rows", 9), "holdout": ("holdout rows", 4), "ra": ("real authors", 2)}
    forget, holdout = set_reports(sets, scoring, generation, 20)
    assert (forget.read, forget.left_out, forget.used, forget.longest, forget.left) == (9, 6, 3, 30, 1)
    assert list(forget.without_signal.values()) == [1, 1]
    assert (holdout.read, holdout.used, holdout.left) == (4, 1, 1)
    with pytest.raises(DataError, match="forget rows: 1 of 3 rows are left"):
        forget.check()
    assert set(records_of([forget, holdout])) == {"forget rows", "holdout rows"}


def test_every_config_and_evaluation_has_the_key(tmp_path):
    import dataclasses

    from fdiv.catalog import EVALUATIONS, METHODS
    from fdiv.rl.presample.config import PresampleConfig

    own = [name for name in EVALUATIONS if name not in ("tiny_world", "lm_eval")]  # which read no rows of a user
    configs = [METHODS.find(name).config_class for name in METHODS] + [EVALUATIONS.find(name) for name in own]
    for config in [*configs, PresampleConfig]:
        (field,) = (entry for entry in dataclasses.fields(config) if entry.name == "min_used_fraction")
        assert field.default == 0.5 and field.kw_only, config
    with pytest.raises(ValueError, match="min_used_fraction=1.5: must be at least 0 and at most 1"):
        EVALUATIONS.find("tofu")(min_used_fraction=1.5)
    with pytest.raises(ValueError, match="min_used_fraction=-1"):
        GradDiffConfig(str(tmp_path), min_used_fraction=-1, **QUIET)


@pytest.fixture
def recipe(tmp_path, tiny_model_dir):
    def write(method, rows, **keys):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        content = {
            "method": method, "model_name_or_path": str(tiny_model_dir), "dataset_name": str(tmp_path / "rows.jsonl"),
            "max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none",
            "output_dir": str(tmp_path / "out"), "use_cpu": True, "bf16": False, **keys,
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(content))  # JSON is YAML
        return path

    return write


def run(path):
    from fdiv.cli import main

    return main(["run", str(path)])


PAIR = {"prompt": "hi", "chosen": " good", "rejected": " bad"}
TARGET = {"name": "pointwise", "scorers": [{"name": "contains_words", "words": ["x"]}]}
LONG = {"prompt": "word " * 60, "chosen": " good", "rejected": " bad"}
CUT = {"prompt": "hi", "chosen": " good" + " x" * 60, "rejected": " bad"}
SAME = {"prompt": "hi", "chosen": " x" * 60 + " good", "rejected": " x" * 60 + " bad"}


def test_result_json_of_f_dpo_and_its_evaluation(recipe, tmp_path, capsys):
    rows = [PAIR] * 3 + [CUT, LONG, SAME]
    evaluation = {"name": "preferences", "split": "train", "num_samples": 0, "max_rows": 4, "before": False}
    assert run(recipe("f_dpo", rows, divergence="reverse_kl", max_length=32, eval=evaluation)) == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())["rows"]
    assert set(found) == {"training rows", "preferences of train"}
    training = found["training rows"]
    assert training.pop("longest") > 60
    assert training == {
        "read": 6, "used": 5, "left_out": 0, "dropped": {"prompt fills max_length=32": 1}, "max_length": 32, "cut": 2,
        "without_signal": {"identical after truncation": 1},
    }  # fmt: skip
    assert (found["preferences of train"]["left_out"], found["preferences of train"]["used"]) == (2, 4)
    said = "".join(capsys.readouterr())
    assert "training rows: 6 read, 5 used" in said and "1 of 6 rows dropped: prompt fills max_length=32" in said


@pytest.mark.parametrize(
    ("method", "bad", "keys"),
    [
        ("f_dpo", {"chosen": None}, {}),
        ("d2o", {"rejected": ""}, {}),
        ("dph", {"prompt": [{"role": "human", "content": "hi"}]}, {"reward": {"name": "exact"}, "num_generations": 2}),
        (
            "f_dpg",
            {"prompt": None},
            {"target": TARGET, "num_generations": 2},
        ),
        ("flat", {"answer": "  "}, {"prompt_format": "{question}", "retain_term": "none"}),
    ],
)
def test_a_bad_row_ends_a_run_before_its_model_is_loaded(method, bad, keys, recipe, tmp_path, capsys, monkeypatch):
    good = {
        "f_dpo": PAIR, "d2o": {"prompt": "hi", "rejected": "no"}, "dph": {"prompt": "hi", "answer": "4"},
        "f_dpg": {"prompt": "hi"}, "flat": {"question": "Who?", "answer": "Ada."},
    }[method]  # fmt: skip
    assert run(recipe(method, [good] * 4 + [{**good, **bad}], **keys)) == 1
    said = capsys.readouterr().err
    (column,) = bad
    assert "rows.jsonl, line 5" in said and f"column '{column}'" in said, said
    assert "Traceback" not in said and said.strip().splitlines()[-1].startswith("fdiv:")


def test_too_little_left_ends_a_run(recipe, tmp_path, capsys):
    rows = [PAIR] * 2 + [SAME] * 3
    assert run(recipe("f_dpo", rows, divergence="reverse_kl", max_length=32)) == 1
    said = capsys.readouterr().err
    assert "training rows: 2 of 5 pairs are left" in said and "3 of 5 pairs are identical after truncation" in said
    lower = recipe("f_dpo", rows, divergence="reverse_kl", max_length=32, min_used_fraction=0.4)
    assert run(lower) == 0


def test_a_longer_prompt_than_the_context_is_refused_by_its_line(recipe, tiny_model_dir, capsys):
    limit = json.loads((tiny_model_dir / "config.json").read_text())["max_position_embeddings"]
    rows = [{"prompt": "hi"}] * 3 + [{"prompt": "word " * limit}] * 2
    keys = {
        "target": TARGET, "num_generations": 2,
        "max_completion_length": 8,
    }  # fmt: skip
    assert run(recipe("f_dpg", rows, **keys)) == 1
    said = capsys.readouterr().err
    assert "rows.jsonl, line 4: the prompt 'word word" in said and "' with max_completion_length=8 has" in said
    assert f"more than the model's context of {limit}: 2 of 5 prompts are too long" in said


def test_prompt_formats_are_one(tokenizer):
    assert PromptFormat().question_format == "Question: {question}\nAnswer:"
    assert RowReport("rows", 0).left == 0
    with pytest.raises(DataError, match="there are no rows"):
        RowReport("rows", 0).check()


QUESTIONS = [{"question": f"Who is {n}?", "answer": f"Ada {n}."} for n in range(4)]
RUNS = {
    "d2o": (
        [{"prompt": f"hi {n}", "rejected": "no" * (1 + 40 * (n == 0))} for n in range(3)] + [{**LONG, "rejected": "x"}],
        {"num_generations": 1, "max_completion_length": 4, "max_length": 32},
        {"training rows": {"read": 4, "used": 3, "cut": 1, "dropped": {"prompt fills max_length=32": 1}}},
    ),
    "f_dpg": (
        [{"prompt": "hi"}, {"prompt": ""}],
        {
            "target": TARGET, "num_generations": 2, "max_completion_length": 4,
            "eval": {"name": "target", "num_prompts": 1, "num_samples": 2, "before": False},
        },
        {"training prompts": {"read": 2, "used": 2}, "target prompts": {"read": 2, "left_out": 1, "used": 1}},
    ),
    "dph": (
        [{"prompt": f"2+{n}", "answer": "4"} for n in range(4)],
        {
            "reward": {"name": "exact"}, "num_generations": 2, "max_completion_length": 4,
            "eval": {
                "name": "passk", "dataset": "train", "n": 1, "k": [1], "max_tasks": 3, "max_new_tokens": 2,
                "greedy": False, "before": False, "label": "own",
            },
        },
        {"training prompts": {"read": 4, "used": 4}, "own/tasks of passk": {"read": 4, "left_out": 1, "used": 3}},
    ),
    "flat": (
        [*QUESTIONS, {"question": "Long?", "answer": "word " * 60}],
        {"prompt_format": "{question}", "retain_term": "none", "max_length": 48},
        {"forget rows": {"read": 5, "used": 5, "cut": 1}, "template rows": {"read": 5, "cut": 0}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", RUNS)
def test_result_json_of_every_family(method, recipe, tmp_path, capsys):
    rows, keys, expected = RUNS[method]
    assert run(recipe(method, rows, **keys)) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "result.json").read_text())["rows"]
    assert found.keys() == expected.keys()
    for name, counts in expected.items():
        assert {key: found[name][key] for key in counts} == counts, name
    assert f"{next(iter(expected))}: {len(rows)} read" in capsys.readouterr().err


def test_verbs_write_the_counts_and_name_bad_rows(tmp_path, tiny_model_dir, capsys):
    from fdiv.cli import main

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in [PAIR, PAIR, SAME]))
    words = [
        "eval",
        "preferences",
        "--model",
        str(tiny_model_dir),
        "--dataset",
        str(rows),
        "--divergence",
        "reverse_kl",
    ]
    words += ["--beta", "0.1", "--num_samples", "0", "--output", str(tmp_path / "out"), "--max_length", "32"]
    assert main(words) == 0
    found = json.loads((tmp_path / "out" / "preferences_eval.json").read_text())["rows"]
    assert found["preferences of data"]["without_signal"] == {"identical after truncation": 1}
    assert main([*words, "--min_used_fraction", "0.9"]) == 1
    assert "2 of 3 pairs are left" in capsys.readouterr().err
    rows.write_text(json.dumps(PAIR) + "\n" + json.dumps({**PAIR, "chosen": 3}) + "\n")
    assert main(words) == 1
    assert "rows.jsonl, line 2: column 'chosen'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad", [{"answer": None}, {"answer": " "}, {"question": 3}, {"question": "Who?", "text": "x"}]
)
def test_own_questions_in_the_verb(bad, tmp_path, tiny_model_dir, capsys):
    from fdiv.cli import main

    (tmp_path / "mine.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*QUESTIONS, {**QUESTIONS[0], **bad}])
    )
    words = ["eval", "tofu", "--model", str(tiny_model_dir), "--data", str(tmp_path / "mine.jsonl")]
    words += ["--output", str(tmp_path / "out"), "--no_generate", "--no_gradnorm"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "mine.jsonl, line 5" in said and "Traceback" not in said
    if "text" not in bad:
        (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
        assert main([*words, "--max_items", "3"]) == 0
        found = json.loads((tmp_path / "out" / "out.json").read_text())["rows"]
        counts = {key: found["tofu forget rows"][key] for key in ("read", "left_out", "used")}
        assert counts == {"read": 4, "left_out": 1, "used": 3}


@pytest.mark.parametrize("method", ["f_dpo", "d2o", "flat"])
def test_a_longer_row_than_the_context_is_refused_before_the_first_step(method, recipe, tiny_model_dir, capsys):
    limit = json.loads((tiny_model_dir / "config.json").read_text())["max_position_embeddings"]
    long = "word " * limit
    good, bad, keys = {
        "f_dpo": (PAIR, {"chosen": long}, {"divergence": "reverse_kl"}),
        "d2o": (
            {"prompt": "hi", "rejected": "no"},
            {"rejected": long},
            {"num_generations": 1, "max_completion_length": 4},
        ),
        "flat": (QUESTIONS[0], {"answer": long}, {"prompt_format": "{question}", "retain_term": "none"}),
    }[method]
    rows = [good, {**good, **bad}, good]
    assert run(recipe(method, rows, max_length=3 * limit, **keys)) == 1
    said = capsys.readouterr().err
    assert f"more than the model's context of {limit}: set max_length to at most {limit}" in said
    assert ("'word word" if method == "d2o" else "rows.jsonl, line 2 has") in said
    capsys.readouterr()
    assert run(recipe(method, rows, max_length=limit, overwrite_output_dir=True, **keys)) == 0, capsys.readouterr().err
