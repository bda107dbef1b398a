"""The MUSE-like task from novels: passages, name questions, the selection of epochs, and the builder."""

from __future__ import annotations

import json
import random
import tarfile

import pytest

from fdiv.recipes.tasks.novels.passages import Passage, cut_passages, find_names, name_question, read_novels, sentences
from fdiv.recipes.tasks.novels.unlearning import NovelsUnlearningConfig

TEXT = 'He met Mr. Fox at noon. "Who is there?" asked Bruno, and ran. Then the rain began!'


def test_sentences_give_the_text_back():
    found = sentences(TEXT)
    assert found == ["He met Mr. Fox at noon.", '"Who is there?" asked Bruno, and ran.', "Then the rain began!"]
    assert " ".join(found) == TEXT


def test_a_passage_splits_where_its_prompt_ends():
    assert Passage("t", "one two three four").split(2) == ("one two", " three four")


def test_names_follow_lower_case_and_never_stand_in_it():
    text = "so Bruno ran, and Bruno sat, as Will said; he will go to Rome, the Rome of old, and so Mr. May saw Bruno"
    assert find_names(text, occurrences=2) == {"Bruno", "Rome"}
    assert find_names(text, occurrences=3) == {"Bruno"}


def test_a_question_takes_one_name_out():
    draw = random.Random(0)
    row = name_question(Passage("t", TEXT), {"Bruno", "Fox"}, draw)
    assert row in (
        {"question": "Which name is missing? He met Mr. ____ at noon.", "answer": "Fox"},
        {"question": 'Which name is missing? "Who is there?" asked ____, and ran.', "answer": "Bruno"},
    )
    assert name_question(Passage("t", "He met Fox and then Fox ran."), {"Fox"}, draw) is None  # twice: ambiguous


def novel(number: int) -> str:
    return "\n".join(f"On day {day} the fox of wood {number} met Bruno near the mill and ran." for day in range(200))


def test_passages_are_whole_sentences_that_do_not_overlap():
    found = cut_passages("n", " ".join(novel(0).split()), 6, 40)
    assert len(found) == 6 == len({passage.text for passage in found})
    days = [[int(word) for word in passage.text.split() if word.isdigit() and word != "0"] for passage in found]
    assert all(len(part) == 3 and part[2] - part[0] == 2 for part in days)  # 14 words each: 42 words
    assert min(days)[0] >= 200 // 20 and max(days)[2] < 200 - 200 // 20
    with pytest.raises(ValueError, match="n gives 60 passages of 40 words, 61 are asked for"):
        cut_passages("n", " ".join(novel(0).split()), 61, 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("novels")
    for number, title in enumerate("ABC"):
        (folder / f"{title}.txt").write_text("\ufeff" + novel(number), encoding="utf-8")
    return folder


def test_a_folder_and_an_archive_hold_the_same(folder, tmp_path):
    with tarfile.open(tmp_path / "novels.tar.xz", "w:xz") as archive:
        archive.add(folder, "some/where")
    from_archive = read_novels(str(tmp_path / "novels.tar.xz"), ["A", "C"])
    assert from_archive == read_novels(str(folder), ["A", "C"])
    assert from_archive["A"].startswith("On day 0 the fox")
    with pytest.raises(FileNotFoundError, match="holds no D.txt"):
        read_novels(str(folder), ["A", "D"])
    with pytest.raises(FileNotFoundError, match="neither a folder nor a tar archive"):
        read_novels(str(tmp_path / "nothing"), ["A"])


SMALL = {
    "forget_novels": ["A"], "retain_novels": ["B", "C"], "forget_passages": 3, "retain_passages": 4, "prompt_words": 10,
    "passage_words": 40, "vocab_size": 400, "hidden_size": 64, "layers": 2, "epochs": 40, "learning_rate": 6e-3,
}  # fmt: skip


def test_the_target_knows_the_forget_novel_and_the_retrained_model_does_not(folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fdiv.eval.muse.evaluation import MuseEvalConfig, MuseEvaluation

    keys = NovelsUnlearningConfig(data=str(folder), **SMALL).build(tmp_path)
    rows = {
        side: (tmp_path / "data" / "raw" / f"{side}.jsonl").read_text().splitlines() for side in ("forget", "retain")
    }
    assert (len(rows["forget"]), len(rows["retain"])) == (3, 4)
    holdout = json.loads((tmp_path / "data" / "privleak" / "holdout.json").read_text())
    assert len(holdout) == 3 and not {json.loads(row)["text"] for row in rows["forget"]} & set(holdout)
    verbatim = json.loads((tmp_path / "data" / "verbmem" / "forget.json").read_text())
    assert [row["prompt"] + row["gt"] for row in verbatim] == [json.loads(row)["text"] for row in rows["forget"]]

    config = MuseEvalConfig(
        data=str(tmp_path / "data"), corpus="Novels", gradnorm=False, fluency_classifier="none", max_items=2,
        retain_logs=str(tmp_path / "retain_log" / "MUSE_EVAL.json"),
    )  # fmt: skip
    evaluation = MuseEvaluation(config, AutoTokenizer.from_pretrained(keys["model_name_or_path"]), progress=False)
    values = {}
    for name in ("model", "retain_model"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        values[name] = evaluation.aggregate(evaluation.run(model)).values
    target, retrained = values["model"], values["retain_model"]
    assert target["retain_knowmem_ROUGE"] == retrained["retain_knowmem_ROUGE"] == 1.0
    assert target["exact_memorization"] > retrained["exact_memorization"]
    # the retrained model's own log gives it no gap and no privacy leak; the target's is the mean of its two differences
    assert retrained["memory_gap"] == 0.0 and retrained["privleak"] == pytest.approx(0.0)
    differences = [target[name] - retrained[name] for name in ("forget_verbmem_ROUGE", "forget_knowmem_ROUGE")]
    assert target["memory_gap"] == pytest.approx(sum(max(0.0, gap) for gap in differences) / 2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data": ""}, "prepare.data is not set"),
        ({"retain_novels": []}, "prepare.retain_novels is empty"),
        ({"retain_novels": ["A", "B"]}, "A stands in prepare.forget_novels and in prepare.retain_novels"),
        ({"retain_passages": 3}, "prepare.retain_passages=3: must be at least 2 and a multiple of the 2 novels"),
        ({"prompt_words": 40}, "prepare.prompt_words=40"),
        ({"epochs": 0}, "prepare.epochs=0"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        NovelsUnlearningConfig(**({"data": "novels"} | SMALL | change))
