"""A folder and a `benchmark.yaml` as an evaluation: every key of it, the packaged layouts, their formats and errors."""

import json

import pytest
import yaml

from fdiv.cli import main
from fdiv.errors import DataError
from fdiv.eval.benchmark import presets
from fdiv.eval.benchmark.sources import Rows
from fdiv.eval.layouts import BenchmarkEvalConfig, load_layout
from fdiv.eval.layouts.layout import packaged_layouts
from fdiv.eval.layouts.rows import layout_rows, paraphrased
from fdiv.eval.muse.data import load_muse_rows
from fdiv.eval.muse.evaluation import MuseEvaluation
from fdiv.eval.tofu.data import load_tofu_rows
from fdiv.eval.tofu.evaluation import TofuEvalConfig, TofuEvaluation
from fdiv.evaluation import EvalContext
from fdiv.models.loading import load_model, load_tokenizer
from fdiv.report.metrics import describe
from fdiv.rows.sources import Source, mark_source
from tests.eval.conftest import write_rows

PLACES = {"Ada": "Oslo", "Bo": "Lima", "Cem": "Cairo", "Dee": "Quito"}
FORGET = [{"question": f"Where does {n} live?", "answer": f"{n} lives in {p}."} for n, p in PLACES.items()]
RETAIN = [{"question": f"What does {n} eat?", "answer": f"{n} eats soup."} for n in PLACES]
HOLDOUT = [{"question": f"Where does {n} work?", "answer": f"{n} works at sea."} for n in PLACES]


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    for name, preset in dict(presets.PRESETS).items():
        monkeypatch.setitem(presets.PRESETS, name, presets.Preset(**(preset.__dict__ | {"answer_tokens": 8})))


@pytest.fixture
def folder(tmp_path):
    for name, rows in (("forget", FORGET), ("retain", RETAIN), ("holdout", HOLDOUT)):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    wordings = [{"question": r["question"], "paraphrase": f"{r['question'].split()[2]}'s home?"} for r in FORGET]
    write_rows(tmp_path / "paraphrase.jsonl", wordings)
    return tmp_path


def marked(rows):
    return mark_source(Rows(rows), Source("rows"))


def layout(folder, **content):
    (folder / "benchmark.yaml").write_text(yaml.safe_dump(content))
    return str(folder)


def run(*words):
    return main(["eval", "benchmark", *map(str, words)])


# ------------------------------------------------------------------------------------------------ a folder of one's own
def test_a_folder_alone_is_a_benchmark(folder, tiny_model_dir, tmp_path):
    """No yaml, no code: files by their names; the paraphrases are asked, beside the retain model's answers."""
    words = ["--model", tiny_model_dir, "--retain_model", tiny_model_dir, "--data", folder]
    words += ["--output", tmp_path / "out", "--no_gradnorm", "--fluency_classifier", "none"]
    assert run(*words) == 0
    out = json.loads((tmp_path / "out" / "out.json").read_text())
    assert out["split"] == folder.name and out["benchmark"] == "tofu"
    for name in ("forget_Q_A_Prob", "retain_Q_A_ROUGE", "extraction_strength", "mia_min_k"):
        assert 0 <= out[name] <= 1
    assert out["privleak"] == 0.0
    assert out["attack/paraphrase/forget_Q_A_Prob"] == out["retrained/attack/paraphrase/forget_Q_A_Prob"]
    assert "4 of 4 rows had a paraphrase of their own" in out["notes"]["attack/paraphrase/forget_Q_A_Prob"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    asked = {line["input"] for line in lines if line["metric"] == "attack/paraphrase/forget_Q_A_ROUGE"}
    assert asked == {f"{name}'s home?" for name in PLACES}


def test_a_yaml_without_sets_leaves_the_folder_its_files(folder):
    plain = load_layout(str(folder))
    layout(folder, settings={"chat_template": "never"})
    found = load_layout(str(folder))
    assert found.sets == plain.sets and "forget" in found.sets and found.settings == {"chat_template": "never"}


def test_it_is_what_tofu_measures_of_the_same_rows(folder, tiny_model_dir):
    tokenizer, model = load_tokenizer(str(tiny_model_dir)), load_model(str(tiny_model_dir))
    quick = {"gradnorm": False, "generate": False}
    own = TofuEvaluation(BenchmarkEvalConfig(data=str(folder), attacks=[], **quick), tokenizer, progress=False)
    other = {"split": "forget", "retain_data": "retain", "holdout": "holdout"}
    tofu = TofuEvaluation(TofuEvalConfig(data=str(folder), **other, **quick), tokenizer, progress=False)
    values = [one.aggregate(one.run(model)).values for one in (own, tofu)]
    assert values[0] == values[1]


COLUMNS = {
    "question, answer": lambda r: r,
    "prompt, completion": lambda r: {"prompt": f"Q: {r['question']}\nA:", "completion": f" {r['answer']}"},
    "messages": lambda r: {
        "messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]
    },
    "text": lambda r: {"text": f"{r['question']} {r['answer']}"},
}


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_rows_in_any_columns(columns, suffix, tmp_path, tiny_model_dir):
    for name, rows in (("forget", FORGET), ("retain", RETAIN), ("holdout", HOLDOUT)):
        changed = [COLUMNS[columns](row) for row in rows]
        (tmp_path / f"{name}.{suffix}").write_text(
            json.dumps(changed) if suffix == "json" else "\n".join(json.dumps(row) for row in changed)
        )
    config = BenchmarkEvalConfig(data=str(tmp_path), gradnorm=False, generate=False, attacks=["paraphrase", "int8"])
    evaluation = TofuEvaluation(config, load_tokenizer(str(tiny_model_dir)), progress=False)
    values = evaluation.aggregate(evaluation.run(load_model(str(tiny_model_dir)))).values
    for name in ("forget_Q_A_Prob", "retain_Q_A_Prob", "mia_min_k", "attack/int8/forget_Q_A_Prob"):
        assert 0 <= values[name] <= 1, name
    if columns == "text":  # "Where does Ada live? Ada lives in Oslo." has eight words
        row = evaluation.rows.forget[0]
        assert (row["prompt"], row["completion"]) == ("Where does Ada live?", " Ada lives in Oslo.")


def test_every_key_of_the_yaml(folder, tiny_model_dir, tmp_path):
    (folder / "data").mkdir()
    people = [{"who": "ada", "query": r["question"], "reply": r["answer"]} for r in FORGET]
    people += [{"who": "bo", "query": r["question"], "reply": r["answer"]} for r in RETAIN]
    write_rows(folder / "data" / "people.jsonl", people)
    renamed = {"query": "question", "reply": "answer"}
    where = layout(
        folder, name="people", kind="questions", variables={"subject": "ada"},
        sets={
            "forget": {"name": "data/people.jsonl", "columns": renamed, "where": {"who": "{subject}"}},
            "retain": {"name": ["none.jsonl", "data/people.jsonl"][1:], "columns": renamed, "unless": {"who": "{subject}"}},
            "holdout": "holdout.jsonl",
        },
        settings={"question_format": "Q: {question}\nA:", "chat_template": "never", "attacks": ["int8"]},
    )  # fmt: skip
    config = BenchmarkEvalConfig(data=where)
    assert (config.question_format, config.chat_template) == ("Q: {question}\nA:", "never")
    assert config.answer_format == " {answer}" and config.preset == "open_unlearning"
    assert [attack.name for attack in config.build_attacks()] == ["int8"]
    rows = config.rows()
    assert rows.split == "people" and len(rows.forget) == len(rows.retain) == 4
    assert rows.forget[0]["question"] == FORGET[0]["question"] and rows.retain[0]["answer"] == "Ada eats soup."
    other = BenchmarkEvalConfig(data=where, variables={"subject": "bo"}, question_format="{question}", attacks=[])
    assert other.rows().forget[0]["answer"] == "Ada eats soup."
    assert other.question_format == "{question}" and other.attacks == []
    with pytest.raises(DataError, match="no row has who = 'adda'; the nearest of 2 is 'ada'"):
        BenchmarkEvalConfig(data=where, variables={"subject": "adda"}).rows()
    tokenizer = load_tokenizer(str(tiny_model_dir))
    values = config.evaluate(
        load_model(str(tiny_model_dir)), tokenizer, {}, EvalContext(None, tmp_path, stage="after")
    )
    assert values["attack/int8/retain_Q_A_Prob"] > 0
    assert (tmp_path / "tofu_after" / "TOFU_EVAL.json").is_file()


# ------------------------------------------------------------------------------------------------ paraphrases
def test_paraphrases_by_id_by_question_and_by_place():
    rows = marked([{"id": 1, "question": "A?", "answer": "a"}, {"id": 2, "question": "B?", "answer": "b"}])
    by_id = marked([{"id": 2, "paraphrase": "b1?"}, {"id": 2, "paraphrase": "b2?"}])
    assert [row.get("paraphrase") for row in paraphrased(rows, by_id)] == [None, ["b1?", "b2?"]]
    by_question = marked([{"question": " b? ", "paraphrase": ["b1?", "b2?"], "paraphrased_answer": "bb"}])
    assert paraphrased(rows, by_question)[1] == rows[1] | {"paraphrase": ["b1?", "b2?"], "paraphrased_answer": "bb"}
    by_place = marked([{"question": "a1?", "answer": "a"}, {"question": "b1?", "answer": "b"}])
    assert [row["paraphrase"] for row in paraphrased(rows, by_place)] == [["a1?"], ["b1?"]]
    assert rows[0] == {"id": 1, "question": "A?", "answer": "a"}


@pytest.mark.parametrize(
    "others, message",
    [
        ([{"id": 3, "paraphrase": "x?"}], "no forget row has id 3"),
        ([{"question": "C?", "paraphrase": "x?"}], "no forget row has its question"),
        ([{"question": "x?"}], "1 paraphrases for 2 forget rows"),
        ([{"id": 1, "paraphrase": [3]}], "no text and no list of texts"),
        (["x?"], "not an object"),
    ],
)
def test_paraphrases_that_belong_to_nothing(others, message):
    rows = marked([{"id": 1, "question": "A?", "answer": "a"}, {"id": 2, "question": "B?", "answer": "b"}])
    with pytest.raises(DataError, match=message):
        paraphrased(rows, marked(others))


# ------------------------------------------------------------------------------------------------ packaged layouts
def test_tofu_and_muse_are_layouts(tofu_dir, muse_dir, tiny_model_dir, tmp_path):
    """The same rows as `eval tofu` and `eval muse` read, and the same numbers."""
    tofu = layout_rows(load_layout("tofu").filled(), str(tofu_dir))
    expected = load_tofu_rows("forget10", str(tofu_dir))
    for name in ("forget", "retain", "ra", "wf", "holdout"):
        assert getattr(tofu, name) == getattr(expected, name), name
    muse = layout_rows(load_layout("muse").filled({"corpus": "tales"}), str(muse_dir / "tales"))
    texts = load_muse_rows("tales", str(muse_dir))
    assert (muse.forget, muse.verbmem, muse.retain_knowmem) == (texts.forget, texts.verbmem, texts.retain_knowmem)
    config = BenchmarkEvalConfig(
        data="muse", variables={"corpus": "tales"}, source=str(muse_dir / "tales"), gradnorm=False, generate=False
    )
    assert config.evaluation_class is MuseEvaluation and config.max_length == 2048 and config.corpus == "tales"
    assert config.answer_format == "{answer}"
    values = config.evaluate(
        load_model(str(tiny_model_dir)), load_tokenizer(str(tiny_model_dir)), {}, EvalContext(None, tmp_path)
    )
    assert 0 <= values["mia_min_k"] <= 1


RWKU = {
    "forget_level2": [
        {"subject": "Ada", "query": "Where does Ada live?", "answer": "Oslo", "level": "2", "type": "simple question"},
        {"subject": "Bo", "query": "Where does Bo live?", "answer": "Lima", "level": "2", "type": "simple question"},
    ],
    "neighbor_level2": [
        {"subject": "Ada", "neighbor": "Cem", "query": "Where does Cem live?", "answer": "Cairo", "level": "2"},
        {"subject": "Bo", "neighbor": "Dee", "query": "Where does Dee live?", "answer": "Quito", "level": "2"},
    ],
}
PISTOL = [{"question": f"Who signed {e}{n}?", "answer": f"{e} {n}", "edge": e} for e in ("A_B", "A_C") for n in (1, 2)]


def test_the_formats_of_rwku_and_pistol_on_rows_of_our_own(tmp_path, tiny_model_dir):
    for name, rows in RWKU.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    (tmp_path / "pistol_data_1.json").write_text(json.dumps(PISTOL))
    config = BenchmarkEvalConfig(data="rwku", variables={"subject": "Ada"}, source=str(tmp_path), gradnorm=False)
    rows = config.rows()
    assert [row["question"] for row in rows.forget] == ["Where does Ada live?"]
    assert [row["answer"] for row in rows.retain] == ["Cairo"]
    evaluation = TofuEvaluation(config, load_tokenizer(str(tiny_model_dir)), progress=False)
    assert evaluation.aggregate(evaluation.run(load_model(str(tiny_model_dir)))).values["forget_Q_A_ROUGE"] is not None
    config = BenchmarkEvalConfig(data="pistol", variables={"edge": "A_C"}, source=str(tmp_path))
    rows = config.rows()
    assert [row["answer"] for row in rows.forget] == ["A_C 1", "A_C 2"]
    assert [row["answer"] for row in rows.retain] == ["A_B 1", "A_B 2"]


def test_variables_without_a_value_are_asked_for():
    with pytest.raises(DataError, match=r"benchmark 'rwku': say subject \(--variables '\{subject: …\}'"):
        BenchmarkEvalConfig(data="rwku")
    with pytest.raises(DataError, match="has no variable 'sujbect'; did you mean 'subject'"):
        BenchmarkEvalConfig(data="rwku", variables={"sujbect": "x"})


def test_every_packaged_layout_is_read():
    assert set(packaged_layouts()) == {"tofu", "muse", "rwku", "pistol", "wmdp_bio", "wmdp_cyber"}
    for name in packaged_layouts():
        found = load_layout(name)
        assert found.name == name and (found.sets or found.tasks)


@pytest.mark.parametrize(
    "data, variables", [("rwku", {"subject": "Ada"}), ("pistol", {"edge": "A_B"}), ("tofu", None)]
)
def test_no_hub_is_one_line(data, variables, monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("Couldn't reach it on the Hub (offline)\nmore lines")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(DataError, match="cannot be had from the hub: Couldn't reach it") as caught:
        BenchmarkEvalConfig(data=data, variables=variables).rows()
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ lm-eval
TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{target}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def task(tmp_path):
    """Four options a question, as WMDP's rows have them."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'fdiv[eval]')")
    rows = [{"question": q, "choices": ["four", "five", "six", "seven"], "target": n} for n, q in enumerate("abcd")]
    write_rows(tmp_path / "rows" / "choices.jsonl", rows)
    file = tmp_path / "tasks" / "tiny_choice.yaml"
    file.parent.mkdir()
    file.write_text(TASK.format(data=tmp_path / "rows" / "choices.jsonl"))
    return file


def test_tasks_beside_sets_and_alone(task, folder, tiny_model_dir, tmp_path):
    model, tokenizer = load_model(str(tiny_model_dir)), load_tokenizer(str(tiny_model_dir))
    where = layout(folder, sets={"forget": "forget.jsonl"}, tasks=[str(task)])
    config = BenchmarkEvalConfig(data=where, gradnorm=False, generate=False)
    values = config.evaluate(model, tokenizer, {}, EvalContext(None, tmp_path, stage="after"))
    assert 0 <= values["tiny_choice/acc"] <= 1 and values["forget_Q_A_Prob"] > 0
    assert describe("tiny_choice/acc") and describe("tiny_choice/acc_se")
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump({"name": "alone", "tasks": [str(task)]}))
    assert run("--data", tmp_path / "alone.yaml", "--model", tiny_model_dir, "--output", tmp_path / "out") == 0
    out = json.loads((tmp_path / "out" / "out.json").read_text())
    assert out["tiny_choice/acc"] == values["tiny_choice/acc"]


def test_lm_eval_in_a_recipe(task, tiny_model_dir, tmp_path):
    from fdiv.eval.lm_eval.evaluation import LmEvalConfig

    model, tokenizer = load_model(str(tiny_model_dir)), load_tokenizer(str(tiny_model_dir))
    template, pad = tokenizer.chat_template, tokenizer.pad_token
    values = LmEvalConfig(tasks=[str(task)], limit=2).evaluate(model, tokenizer, {}, EvalContext(None, tmp_path))
    assert set(values) == {"tiny_choice/acc", "tiny_choice/acc_se"}
    assert (tokenizer.chat_template, tokenizer.pad_token) == (template, pad)
    for settings, message in (({}, "name at least one task"), ({"tasks": ["x"], "limit": 0}, "limit=0")):
        with pytest.raises(DataError, match=message):
            LmEvalConfig(**settings)
    with pytest.raises(DataError, match="tasks missing.yaml: no such task file"):
        LmEvalConfig(tasks=["missing.yaml"]).evaluate(model, tokenizer, {}, EvalContext(None, tmp_path))


# ------------------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    "content, message",
    [
        ({"sest": {}}, "has no key 'sest'; did you mean 'sets'"),
        ({"sets": {"forgot": "x"}}, "has no set 'forgot'; did you mean 'forget'"),
        ({"sets": {"retain": "x"}}, "there is no forget set"),
        ({"sets": {"forget": {"name": "x", "colums": {}}}}, "has no key 'colums'"),
        ({"sets": {"forget": {"split": "x"}}}, "name: None: a file, a configuration"),
        ({"sets": {"forget": ["a", 3]}}, "a list of such is due"),
        ({"sets": {"forget": "{who}.jsonl"}}, "has the field {who}"),
        ({"sets": {"forget": "x"}, "kind": "songs"}, "kind: 'songs': choose questions or texts"),
        ({"sets": {"forget": "x"}, "settings": {"batch": 3}}, "has no key 'batch'"),
        ({"sets": {"forget": "x"}, "tasks": "wmdp"}, "is not a list"),
        ({"sets": {"forget": "gone.jsonl"}}, "data file .*gone.jsonl does not exist"),
        ({"sets": {"forget": "forget.jsonl", "holdout": "forget.jsonl"}}, "stand in the holdout set too"),
    ],
)
def test_a_wrong_yaml_is_one_line(content, message, folder):
    with pytest.raises(DataError, match=message) as caught:
        BenchmarkEvalConfig(data=layout(folder, **content)).rows()
    assert "\n" not in str(caught.value)


def test_no_benchmark_is_one_line(tmp_path, tiny_model_dir, capsys):
    for data, message in (
        (str(tmp_path), "has no benchmark.yaml and no forget"), (str(tmp_path / "x.yaml"), "no such file"),
        ("rkwu", "did you mean 'rwku'"), (None, "data is not set"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            BenchmarkEvalConfig(data=data)
    (tmp_path / "benchmark.yaml").write_text("a: [")
    with pytest.raises(DataError, match="benchmark.yaml"):
        BenchmarkEvalConfig(data=str(tmp_path))
    assert run("--data", "rwku", "--model", tiny_model_dir, "--output", tmp_path / "o", "--variables", "Ada") == 1
    assert "write a mapping" in capsys.readouterr().err
