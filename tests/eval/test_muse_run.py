"""`fdiv eval muse` on a tiny model, and the MUSE plan's texts."""

import json

import pytest

from fdiv.cli import main
from fdiv.errors import DataError
from fdiv.eval.benchmark.log import read_eval_log
from fdiv.eval.muse import evaluation as muse
from fdiv.eval.muse.data import load_muse_rows
from fdiv.eval.muse.evaluation import MuseEvalConfig, MuseEvaluation
from fdiv.models.loading import load_tokenizer


@pytest.fixture(autouse=True)
def short_generations(monkeypatch):
    """Eight generated tokens: the tiny model never stops by itself."""
    monkeypatch.setattr(muse, "VERBATIM_TOKENS", 8)
    monkeypatch.setattr(muse, "ANSWER_TOKENS", 6)


def run(*words):
    return main(["eval", "muse", *map(str, words)])


def read(folder):
    return json.loads((folder / "out.json").read_text())


@pytest.mark.smoke
def test_a_model_against_itself_with_folds(tiny_model_dir, muse_dir, tmp_path, monkeypatch):
    # A random model overlaps with no answer; a truth of one letter that every answer contains makes ROUGE positive.
    monkeypatch.setattr(muse, "rouge_scores", lambda truth, text, use_stemmer: dict.fromkeys(ROUGE, len(truth) / 100))
    words = ["--model", tiny_model_dir, "--data", muse_dir, "--corpus", "tales", "--retain_model", tiny_model_dir]
    folds = ["--sustainability", tiny_model_dir, tiny_model_dir]
    assert run(*words, *folds, "--output", tmp_path) == 0
    out = read(tmp_path)
    assert out["benchmark"] == "muse" and out["preset"] == "open_unlearning" and out["split"] == "tales"
    assert out["privleak"] == 0.0 and out["mia_reference"] == 0.5
    assert out["retain_knowmem_ROUGE"] == pytest.approx(len("grapes and 0 plums") / 100)
    assert out["sustainability"] == 1.0 and out["sustainability_fold_2"] == out["retain_knowmem_ROUGE"]
    assert out["scalability"] is None and "--scalability" in out["notes"]["scalability"]
    for name in ("extraction_strength", "exact_memorization", "mia_loss", "mia_gradnorm"):
        assert 0 <= out[name] <= 1, name
    assert {k for k, v in out.items() if v is None} <= set(out["notes"])
    again = tmp_path / "again.json"
    logs = ("--from_logs", tmp_path / "MUSE_EVAL.json", "--retain_logs", tmp_path / "retain" / "MUSE_EVAL.json")
    assert run(*logs, "--output", again) == 0
    values = json.loads(again.read_text())
    for name in ("privleak", "mia_min_k", "forget_verbmem_ROUGE", "forget_knowmem_ROUGE", "extraction_strength"):
        assert values[name] == pytest.approx(out[name], rel=1e-12), name


ROUGE = ("rouge1_recall", "rougeL_recall", "rougeL_f1")


def test_plan_follows_the_preset(tiny_model_dir, muse_dir):
    tokenizer = load_tokenizer(str(tiny_model_dir))
    config = MuseEvalConfig(data=str(muse_dir), corpus="tales", chat_template="never")
    plan = MuseEvaluation(config, tokenizer).plan
    keys = {request.key for request in plan.scoring}
    assert keys == {f"{side}/{i}" for side in ("verbatim", "forget", "holdout") for i in range(5)}
    texts = {request.key: request.text for request in plan.scoring}
    verbatim = texts["verbatim/0"]
    assert tokenizer.decode(verbatim.input_ids) == "Once upon a time there were 0 foxes wholived in the old wood."
    assert texts["forget/0"].prompt_length == 1  # nothing stands before the first token
    prompts = {request.key: tokenizer.decode(request.prompt_ids) for request in plan.generation}
    assert prompts["forget_knowmem_ROUGE/1"] == (
        "Question: Who is the fox?\nAnswer: a thief\n\nQuestion: What did fox 1 eat?\nAnswer: "
    )
    assert plan.truths["forget_verbmem_ROUGE/0"] == "lived in the old wood."
    shorter = MuseEvalConfig(data=str(muse_dir), corpus="tales", max_length=4)
    assert len(MuseEvaluation(shorter, tokenizer).plan.attacked()[0].text.input_ids) <= 5


def test_original_preset_cuts_the_truth_and_reports_percent(tiny_model_dir, muse_dir, tmp_path):
    words = ["--model", tiny_model_dir, "--data", muse_dir, "--corpus", "tales", "--output", tmp_path]
    assert run(*words, "--preset", "muse_original", "--no_gradnorm") == 0
    out = read(tmp_path)
    assert out["settings"]["definitions"]["rouge_scale"] == 100.0
    assert out["privleak"] is None and "no retain log" in out["notes"]["privleak"]
    log = read_eval_log(tmp_path / "MUSE_EVAL.json")
    assert log.preset == "muse_original" and log.stamp["use_stemmer"] is False


def test_only_questions_leave_the_rest_null(tiny_model_dir, tmp_path, shared_data):
    """The shared KnowMem questions come without MUSE's texts, which are not ours to copy."""
    config = MuseEvalConfig(data=str(shared_data / "data" / "muse_knowmem"), corpus="News", chat_template="never")
    evaluation = MuseEvaluation(config, load_tokenizer(str(tiny_model_dir)))
    assert len(evaluation.plan.generation) == 200 and not evaluation.plan.scoring
    assert "verbmem/forget" in evaluation.missing["verbmem"] and "holdout" in evaluation.missing


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("knowmem/forget_qa", [{"question": "a"}], "(line 1|row 0): column 'answer' is missing"),
        ("knowmem/forget_qa", [["a", "b"]], "(line 1|row 0) is .*, not an object"),
        ("knowmem/retain_qa", [], "knowmem/retain_qa has no rows"),
        (
            "privleak/holdout",
            ["The fox number 0 ran over the hill and far away."],
            "1 rows of forget stand in holdout",
        ),
    ],
)
def test_bad_rows(muse_dir, tmp_path, name, content, message):
    import shutil

    shutil.copytree(muse_dir / "tales", tmp_path / "tales")
    (tmp_path / "tales" / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        load_muse_rows("tales", str(tmp_path))


def test_an_empty_folder_is_no_muse_data(tmp_path):
    with pytest.raises(DataError, match="holds no MUSE data"):
        load_muse_rows("News", str(tmp_path))


def test_retain_log_of_other_rows_is_refused(tiny_model_dir, muse_dir, tmp_path, capsys):
    words = ["--model", tiny_model_dir, "--data", muse_dir, "--corpus", "tales", "--no_gradnorm", "--no_generate"]
    assert run(*words, "--output", tmp_path / "a") == 0
    log = tmp_path / "a" / "MUSE_EVAL.json"
    edited = json.loads(log.read_text())
    edited["fdiv"]["forget_rows"] = "else"
    edited["fdiv"].pop("digest")
    log.write_text(json.dumps(edited))
    assert run(*words, "--retain_logs", log, "--output", tmp_path / "b") == 1
    assert "other forget rows" in capsys.readouterr().err
