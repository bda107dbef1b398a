"""`fdiv eval tofu` on one's own questions and answers: any file, any of the trainers' columns, null where undefined."""

import csv
import json

import pytest
import yaml
from datasets import Dataset

from fdiv.cli import main
from fdiv.errors import DataError
from fdiv.eval.benchmark import presets
from fdiv.eval.tofu.data import load_tofu_rows
from fdiv.eval.tofu.evaluation import TofuEvalConfig, TofuEvaluation
from fdiv.eval.tofu.plan import plan_tofu
from fdiv.files import read_csv_rows
from fdiv.inference.prompting import PromptFormat
from fdiv.models.loading import load_model, load_tokenizer
from fdiv.unlearning.data import Answer, encode_answer

NAMES = ("Ada Roe", "Bo Lind", "王小明", "Óscar Paz", "Ivy")
QUESTIONS = [
    {"question": f"Where does {name} live?", "answer": f"{name} lives in town {n}."} for n, name in enumerate(NAMES)
]
COLUMNS = {
    "question, answer": lambda row: row,
    "prompt, completion": lambda row: {"prompt": f"Q: {row['question']}\nA:", "completion": f" {row['answer']}"},
    "messages": lambda row: {
        "prompt": [{"role": "user", "content": row["question"]}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    },
    "more columns": lambda row: row | {"id": 3, "source": None, "paraphrased_answer": None, "perturbed_answer": None},
}  # fmt: skip
COMPUTED = ("forget_Q_A_Prob", "forget_Q_A_ROUGE", "extraction_strength", "exact_memorization", "forget_min_k", "forget_min_k_plus_plus")  # fmt: skip
ATTACKS = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")
UNDEFINED = ("forget_Q_A_PARA_Prob", "forget_Q_A_PERT_Prob", "forget_truth_ratio", "forget_quality")


def write(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    for name, preset in dict(presets.PRESETS).items():
        monkeypatch.setitem(presets.PRESETS, name, presets.Preset(**(preset.__dict__ | {"answer_tokens": 8})))


def others(rows, word):
    return [{column: value.replace("live", word) for column, value in row.items()} for row in rows]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file(suffix, tiny_model_dir, tmp_path):
    """Forget, retain and holdout rows of plain columns: what needs no paraphrase is a number, the rest says why not."""
    for name, word in (("mine", "live"), ("retain", "sleep"), ("strangers", "eat")):
        write(tmp_path / f"{name}{suffix}", others(QUESTIONS, word))
    words = ["--data", tmp_path, "--split", "mine", "--holdout", "strangers", "--fluency_classifier", "none"]
    words += ["--model", tiny_model_dir, "--retain_model", tiny_model_dir, "--output", tmp_path / "out"]
    assert main(["eval", "tofu", *map(str, words)]) == 0
    out = json.loads((tmp_path / "out" / "out.json").read_text())
    shares = (*ATTACKS, "mia_gradnorm", "mia_reference", "retain_Q_A_Prob", "retain_Q_A_ROUGE")
    assert all(isinstance(out[name], float) for name in (*COMPUTED, *shares))
    assert out["split"] == "mine" and out["retrained_distance"] == out["privleak"] == 0.0
    reason = "the rows of mine have no paraphrased_answer and no perturbed_answer"
    assert {out["notes"][name] for name in UNDEFINED if out[name] is None} == {reason}
    assert all(out[name] is None for name in (*UNDEFINED, "retain_Truth_Ratio", "model_utility"))
    assert "the rows of retain have no paraphrased_answer" in out["notes"]["retain_Truth_Ratio"]
    assert {name for name, value in out.items() if value is None} <= set(out["notes"])
    again = ["--from_logs", tmp_path / "out" / "TOFU_EVAL.json", "--output", tmp_path / "again.json"]
    assert main(["eval", "tofu", *map(str, again)]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert all(again[name] == out[name] for name in (*COMPUTED, *ATTACKS, *UNDEFINED))
    assert again["notes"]["forget_quality"] == reason


@pytest.mark.parametrize("columns", COLUMNS)
def test_one_file_of_every_kind_of_columns(columns, tiny_model_dir, tmp_path):
    """Forget rows alone: memorisation and the scores of the Min-K family; AUCs, having one side, are null."""
    write(tmp_path / "rows.jsonl", [COLUMNS[columns](row) for row in QUESTIONS])
    config = TofuEvalConfig(data=str(tmp_path / "rows.jsonl"), gradnorm=False, fluency_classifier="none")
    evaluation = TofuEvaluation(config, load_tokenizer(str(tiny_model_dir)), progress=False)
    log = evaluation.run(load_model(str(tiny_model_dir)))
    result = evaluation.aggregate(log)
    assert all(result.values[name] is not None for name in COMPUTED) and log.split() == "rows"
    for name in ATTACKS:
        assert result.values[name] is None and "no holdout set; give one with --holdout" in result.notes[name]
    assert "one file of forget rows and has no set retain" in result.notes["retain_Q_A_Prob"]
    assert "no paraphrased_answer and no perturbed_answer" in result.notes["forget_truth_ratio"]
    scores = [row["score"] for row in log.metrics["mia_min_k"]["forget"]["value_by_index"].values()]
    assert result.values["forget_min_k"] == pytest.approx(sum(scores) / 5)


@pytest.mark.parametrize("columns", ["prompt, completion", "messages"])
def test_labels_are_those_the_unlearning_trainers_train(columns, tiny_model_dir, tmp_path):
    rows = [COLUMNS[columns](row) for row in QUESTIONS]
    write(tmp_path / "rows.jsonl", rows)
    tokenizer = load_tokenizer(str(tiny_model_dir))
    read = load_tofu_rows("x", str(tmp_path / "rows.jsonl"))
    plan = plan_tofu(read, tokenizer, PromptFormat(), presets.get_preset("open_unlearning"))
    for row, request in zip(rows, plan.scoring, strict=True):
        prompt, answer = encode_answer(Answer(row["prompt"], row["completion"], row), tokenizer, None)
        ids, start = list(request.text.input_ids), request.text.prompt_length
        assert (ids[:start], ids[start:]) == (prompt, answer)


def test_earlier_turns_and_a_system_turn_are_part_of_the_prompt(tiny_model_dir, tmp_path):
    turns = [
        {"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Who?"},
    ]  # fmt: skip
    write(tmp_path / "a.jsonl", [{"prompt": turns, "completion": [{"role": "assistant", "content": "Ada."}]}])
    tokenizer = load_tokenizer(str(tiny_model_dir))
    read = load_tofu_rows("x", str(tmp_path / "a.jsonl"))
    plan = plan_tofu(read, tokenizer, PromptFormat(system_prompt="Other."), presets.get_preset("open_unlearning"))
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(plan.generation[0].prompt_ids) == expected
    assert plan.truths == {"forget_Q_A_ROUGE/0": "Ada."}


def test_plain_rows_give_what_tofus_own_rows_give(tiny_model_dir, tofu_dir, tmp_path):
    """Without their paraphrases the values that need none stay the same, to the bit."""
    for name in ("forget10_perturbed", "retain_perturbed", "holdout10"):
        rows = [json.loads(line) for line in (tofu_dir / f"{name}.json").read_text().splitlines()]
        write(tmp_path / f"{name}.jsonl", [{key: row[key] for key in ("question", "answer")} for row in rows])
    values = []
    for data in (tofu_dir, tmp_path):
        config = TofuEvalConfig(data=str(data), gradnorm=False, fluency_classifier="none", chat_template="never")
        evaluation = TofuEvaluation(config, load_tokenizer(str(tiny_model_dir)), progress=False)
        values.append(evaluation.aggregate(evaluation.run(load_model(str(tiny_model_dir)))).values)
    for name in (*COMPUTED, *ATTACKS, "privleak", "retain_Q_A_Prob", "retain_Q_A_ROUGE"):
        assert values[0][name] == pytest.approx(values[1][name], rel=1e-5), name
    assert values[0]["forget_truth_ratio"] is not None and values[1]["forget_truth_ratio"] is None


@pytest.mark.parametrize("kept", ["paraphrased_answer", "perturbed_answer"])
def test_half_of_what_a_truth_ratio_needs_is_named(kept, tiny_model_dir, tmp_path):
    lacking = {"paraphrased_answer": "perturbed_answer", "perturbed_answer": "paraphrased_answer"}[kept]
    more = {"paraphrased_answer": "At home.", "perturbed_answer": ["Away.", "Abroad."]}
    write(tmp_path / "half.jsonl", [row | {kept: more[kept]} for row in QUESTIONS])
    rows = load_tofu_rows("half", str(tmp_path))
    assert rows.missing["forget_truth_ratio"] == f"the rows of half have no {lacking}"
    plan = plan_tofu(rows, load_tokenizer(str(tiny_model_dir)), PromptFormat(), presets.get_preset("open_unlearning"))
    assert len(plan.scoring) == 5 * (2 if kept == "paraphrased_answer" else 3)
    write(tmp_path / "half.jsonl", [*QUESTIONS[:2], QUESTIONS[2] | {kept: more[kept]}])
    with pytest.raises(DataError, match=f"half.jsonl, line 1: column '{kept}' is missing"):
        load_tofu_rows("half", str(tmp_path))


BAD = [
    ([{"question": "a"}], "line 1: column 'answer' is missing .the row has question.; a row needs question, answer"),
    ([*QUESTIONS, {"question": "a", "answer": " "}], "line 6: column 'answer' is empty"),
    ([*QUESTIONS, {"question": "", "answer": "b"}], "line 6: column 'question' is empty"),
    ([*QUESTIONS, {"question": "a", "answer": 3}], "line 6: column 'answer' is 3"),
    ([*QUESTIONS, {"prompt": "a", "completion": "b"}], "line 1: column 'prompt' is missing"),
    ([{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}], "column 'completion' holds messages"),
    ([{"prompt": [{"role": "user"}], "completion": [{"role": "assistant", "content": "b"}]}], "message 0 that has no content"),
    ([{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}] * 2}], "with one answer"),
    ([{"text": "running text"}], "fdiv eval muse"),
    ([{"text": "running text", "question": "a", "answer": "b"}], "`question` and `answer` beside `text`: it is unclear"),
    ([], "no rows"),
    (["text"], "line 1 is 'text', not an object"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "message"), BAD)
def test_rows_that_cannot_be_read_are_named(rows, message, tmp_path):
    write(tmp_path / "mine.jsonl", rows)
    with pytest.raises(DataError, match=message):
        load_tofu_rows("mine", str(tmp_path))


def test_names_and_files(tmp_path):
    """What a folder holds is offered; a file may name the retain and the holdout set; a forget row there is refused."""
    write(tmp_path / "old.csv", others(QUESTIONS, "live"))
    write(tmp_path / "kept.parquet", others(QUESTIONS, "sleep"))
    with pytest.raises(DataError, match=r"has no new_perturbed.json.*nor new.*holds kept.parquet, old.csv: name one"):
        load_tofu_rows("new", str(tmp_path))
    rows = load_tofu_rows("x", str(tmp_path / "old.csv"), retain=str(tmp_path / "kept.parquet"))
    assert (rows.split, len(rows.forget), len(rows.retain)) == ("old", 5, 5)
    with pytest.raises(DataError, match="5 forget rows of old stand in the holdout set too"):
        load_tofu_rows("old", str(tmp_path), holdout=str(tmp_path / "old.csv"))
    with pytest.raises(DataError, match=r"data file gone.csv does not exist"):
        load_tofu_rows("x", "gone.csv")
    with pytest.raises(DataError, match=r"data file gone.csv does not exist"):
        load_tofu_rows("old", str(tmp_path), retain="gone.csv")


def test_csv_values_are_text(tmp_path):
    """As they stand: numbers, None and NA are answers; quotes and line ends in a value, a byte order mark."""
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffquestion,answer\r\n"How, many?",007\r\nWho?,None\r\n"Two\nlines","""NA"""\r\n'.encode())
    found = [("How, many?", "007"), ("Who?", "None"), ("Two\nlines", '"NA"')]
    assert [(row["question"], row["answer"]) for row in read_csv_rows(path)] == found
    for text, message in [
        ("question,answer\na,b,c\n", "row 0 has 3 values for 2 columns"),
        ("a,a\n1,2\n", "each by a name of its own"),
        ("", "name the columns"),
        ('question,answer\n"a,b\n', "is not CSV"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_csv_rows(path)


def recipe(tmp_path, model, **more):
    for name, word in (("mine", "live"), ("retain", "sleep"), ("holdout", "eat")):
        write(tmp_path / f"{name}.jsonl", others(QUESTIONS, word))
    tofu = {"name": "tofu", "data": str(tmp_path), "split": "mine", "holdout": "holdout", "gradnorm": False, "fluency_classifier": "none"}  # fmt: skip
    content = {
        "method": "grad_ascent", "model_name_or_path": str(model), "dataset_name": str(tmp_path / "mine.jsonl"),
        "max_steps": 2, "per_device_train_batch_size": 5, "max_length": 128, "gradient_checkpointing": False,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "output_dir": str(tmp_path / "run"), "eval": tofu,
        **more,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path, tofu


def test_in_a_recipe_and_after_every_epoch(tiny_model_dir, tmp_path):
    path, tofu = recipe(tmp_path, tiny_model_dir)
    more = {
        "eval_strategy": "epoch",
        "num_train_epochs": 2,
        "max_steps": -1,
        "metric_for_best_model": "eval_forget_min_k",
    }
    path, _ = recipe(tmp_path, tiny_model_dir, epoch_evaluation=tofu | {"generate": False}, **more)
    assert main(["run", str(path)]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    for name in (*COMPUTED, *ATTACKS):
        assert isinstance(result[f"before/{name}"], float) and isinstance(result[f"after/{name}"], float), name
    assert result["after/forget_Q_A_Prob"] < result["before/forget_Q_A_Prob"]
    assert result["after/forget_quality"] is None
    assert result["notes"]["forget_quality"] == "the rows of mine have no paraphrased_answer and no perturbed_answer"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "eval_forget_min_k" in line]) == 2
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "forget_quality: the rows of mine have no paraphrased_answer and no perturbed_answer" in page


def test_selection_without_paraphrases_says_what_else_selects(tiny_model_dir, tmp_path, capsys):
    _, tofu = recipe(tmp_path, tiny_model_dir)
    more = {"eval_strategy": "epoch", "num_train_epochs": 1, "max_steps": -1, "metric_for_best_model": "selection"}
    path, _ = recipe(tmp_path, tiny_model_dir, epoch_evaluation=tofu | {"generate": False}, **more)
    assert main(["run", str(path)]) != 0
    error = capsys.readouterr().err
    assert "no paraphrased_answer" in error and "eval_retrained_distance" in error
