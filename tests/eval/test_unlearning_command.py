"""`fdiv eval unlearning`: the erasure report of a model that forgot, of one that did not, and what is refused."""

import json
import shutil

import pytest

from fdiv.cli import main
from fdiv.eval.unlearning.evaluation import UnlearningEvalConfig, UnlearningEvaluation
from fdiv.eval.unlearning.measurement import AttackResult, Measured, Measurement
from fdiv.evaluation import EvalContext
from fdiv.models.loading import load_model, load_tokenizer
from tests.support.unlearned import FORGET, RETAIN, rows_of, write


def measure(known, output, *words, model="retrained", base="model"):
    given = ["--model", known / model, "--base", known / base, "--forget", known / "forget.jsonl"]
    given += ["--output", output, "--max_new_tokens", "16", *words]
    return main(["eval", "unlearning", *map(str, given)])


@pytest.fixture(scope="module")
def report(known_models, tmp_path_factory):
    """Of the retrained model against the one that knows everything, with every set, twice sampled."""
    folder = tmp_path_factory.mktemp("report")
    write(folder / "holdout.jsonl", rows_of(("Gus Ash", "Hal Yew"), 1))
    words = ("--retain", known_models / "retain.jsonl", "--holdout", folder / "holdout.jsonl", "--samples", "4")
    words += ("--retrained", known_models / "retrained", "--attacks", "{name: relearn, steps: [1, 3]}", "int4", "nf4")
    assert measure(known_models, folder / "out", *words) == 0
    return folder / "out"


def test_what_the_report_holds(report):
    found = json.loads((report / "erasure.json").read_text())
    measured = found["measured"]
    # A model that has memorised the rows, and one that has never seen them.
    assert measured["forget_probability"]["before"] > 0.9 > 0.3 > measured["forget_probability"]["after"]
    assert measured["extraction_strength"]["before"] == 1.0
    # Half of it is extraction strength, at 1; the other half what the probability, chance c, lacks: (1 − p)/(1 − c).
    assert 0 < measured["forgotten"]["before"] < 1 - measured["forget_probability"]["before"]
    assert measured["forgotten"]["after"] == pytest.approx(1.0)
    assert measured["leak@4"] == pytest.approx(
        {"before": 1.0, "after": 0.0, "before_se": 0.0, "after_se": 0.0, "retrained": 0.0}
    )
    assert measured["neighbour_probability"]["before"] > 0.9 < measured["neighbour_probability"]["after"]
    assert measured["mia_min_k"]["before"] == 1.0 and measured["at_chance"]["before"] == 0.0
    assert 0 < measured["forget_probability"]["chance"] < 0.5
    # The retrained model is the measured one here, so everything beside it is equal.
    names = [name for name in measured if measured[name]["after"] is not None]
    assert all(measured[name]["retrained"] == pytest.approx(measured[name]["after"]) for name in names)
    assert len(found["rows"]) == len(FORGET) and len(found["examples"]) == 3
    assert all(row["leaked"]["before"] > 0 == row["leaked"]["after"] for row in found["rows"])
    assert found["examples"][0]["before"] == FORGET[0]["answer"] != found["examples"][0]["after"]
    assert found["asked"]["rows"] == 6 and found["asked"]["first_rows"][0] == FORGET[0]


def test_the_attacks_stand_beside_the_same_rows_without_them(report):
    found = {entry["name"]: entry for entry in json.loads((report / "erasure.json").read_text())["attacks"]}
    assert list(found) == ["relearn_1", "relearn_3", "int4", "nf4"]
    assert found["relearn_1"]["rows"] == 5 and found["int4"]["rows"] == 6  # a row was trained on
    for name in ("relearn_1", "relearn_3", "int4"):
        assert found[name]["forget_probability"]["attacked"] == pytest.approx(
            found[name]["forget_probability"]["retrained"]
        )
        assert 0 < found[name]["forget_probability"]["without_attack"] < 0.3
    start, one, three = (
        found[name]["forget_probability"][key]
        for name, key in (("relearn_1", "without_attack"), ("relearn_1", "attacked"), ("relearn_3", "attacked"))
    )
    areas = json.loads((report / "erasure.json").read_text())["areas"]  # trapezoids over 0, 1, 3 steps
    assert areas["attack/relearn/forget_probability_area"] == pytest.approx(((start + one) / 2 + one + three) / 3)


def test_the_page_says_what_was_not_measured_and_never_that_rows_are_erased(report):
    page = (report / "erasure.html").read_text()
    for text in ("What was asked to go", "What was not measured", "What such numbers cannot prove", "Under attack"):
        assert text in page
    assert FORGET[0]["answer"] in page and "relearn_3" in page and "data:image/png" in page
    assert "erased" not in page.lower() and "erased" not in (report / "erasure.json").read_text().lower()
    assert "adapter_removal" in page.partition("What was not measured")[2]


def test_again_from_what_is_kept(report, known_models, capsys):
    """The same command goes on from the finished items and gives the same numbers."""
    before = json.loads((report / "erasure.json").read_text())
    words = ("--retain", known_models / "retain.jsonl", "--holdout", report.parent / "holdout.jsonl", "--samples", "4")
    words += ("--retrained", known_models / "retrained", "--attacks", "{name: relearn, steps: [1, 3]}", "int4", "nf4")
    assert measure(known_models, report, *words) == 0
    after = json.loads((report / "erasure.json").read_text())
    assert after["measured"] == before["measured"] and after["attacks"] == before["attacks"]
    assert (
        "Of 6 rows, 0 gave their secret in at least one of 4 sampled answers; before, 6 did."
        in capsys.readouterr().out
    )


def test_kept_attacks_are_made_again_where_what_they_depend_on_changes(known_models, tmp_path, monkeypatch):
    """Prompt, rate of relearning, rows shown, chance, type of the weights, bound on answers: each another folder."""
    model = load_model(str(known_models / "retrained"))
    tokenizer = load_tokenizer(str(known_models / "retrained"))
    made = []

    def stages(measurement, model, attack, measured):
        made.append(attack.name)
        return [AttackResult(attack.name)]

    monkeypatch.setattr(Measurement, "_stages", stages)

    def count(chance=0.1, model=model, **keys):
        settings = {"retain": str(known_models / "retain.jsonl"), "samples": 0, "attacks": ["relearn", "priming"]}
        config = UnlearningEvalConfig(forget=str(known_models / "forget.jsonl"), **(settings | keys))
        evaluation = UnlearningEvaluation(
            config, tokenizer, EvalContext(None, tmp_path / "out", seed=0, stage="standalone")
        )
        measured = Measured([], [{"probability": chance}] * len(FORGET))
        evaluation.measurement.examples, before = 0, len(made)
        evaluation.measure_more(model, measured, attacked=True)
        assert [result.name for result in measured.attacks] == ["relearn", "priming"]
        return len(made) - before

    write(tmp_path / "retain.jsonl", RETAIN[1:])
    assert [count(), count()] == [2, 0]
    for changed in (
        {"relearning_rate": 1e-3},
        {"relearning_rate": 1e-4},
        {"chat_template": "never"},
        {"end_token": "appended"},
        {"retain": str(tmp_path / "retain.jsonl")},
        {"chance": 0.2},
        {"max_new_tokens": 7},
        {"model": load_model(str(known_models / "retrained"), dtype="bfloat16")},
    ):
        assert [count(**changed), count(**changed)] == [2, 0], changed
    assert count() == 0


def test_a_model_that_knows_them_still(known_models, tmp_path, capsys):
    """Nothing was unlearned: the same numbers on both sides, and no word of forgetting; texts hidden on request."""
    words = ("--samples", "0", "--attacks", "prefix", "--hide_texts")
    assert measure(known_models, tmp_path, *words, model="model") == 0
    found = json.loads((tmp_path / "erasure.json").read_text())
    forgotten = found["measured"]["forgotten"]
    assert forgotten["before"] == forgotten["after"] and 0 < forgotten["before"] < 0.01
    assert "leak@1" not in found["measured"] and "Sampled answers: none were made." in found["not_measured"]
    text = (tmp_path / "erasure.html").read_text() + json.dumps(found)
    assert FORGET[0]["answer"] not in text and found["examples"][0]["after"] == "holds it: True"
    assert any("no retain rows and no neighbours were given" in line for line in found["not_measured"])


def test_the_retrained_model_has_the_type_of_the_others(known_models, tmp_path):
    """It is the measured model here, so that every number is equal to the last bit."""
    words = ("--samples", "0", "--attacks", "int8", "--dtype", "bfloat16", "--retrained", known_models / "retrained")
    assert measure(known_models, tmp_path, *words) == 0
    measured = json.loads((tmp_path / "erasure.json").read_text())["measured"]
    names = [name for name in measured if measured[name]["after"] is not None]
    assert "forget_probability" in names
    assert all(measured[name]["retrained"] == measured[name]["after"] for name in names)


def test_rows_the_model_never_knew_are_said_first(known_models, tmp_path, capsys):
    words = ("--samples", "0", "--attacks", "int8")
    assert measure(known_models, tmp_path, *words, model="model", base="retrained") == 0
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if line.startswith("note: none of the 6 forget rows looks known to the model")]
    assert len(lines) == 1 and "forget.jsonl, line 1" in lines[0] and "at chance" in lines[0]
    assert json.loads((tmp_path / "erasure.json").read_text())["in_short"][0].startswith(
        "6 of 6 rows did not look known"
    )


def refused(capsys, *words):
    capsys.readouterr()
    assert main(["eval", "unlearning", *map(str, words)]) in (1, 2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    return error


def test_what_is_refused_in_a_line(known_models, tmp_path, capsys):
    given = [
        "--model",
        known_models / "retrained",
        "--output",
        tmp_path / "o",
        "--forget",
        known_models / "forget.jsonl",
    ]
    assert "give --base, the model before unlearning" in refused(capsys, *given)
    given += ["--base", known_models / "model"]
    write(tmp_path / "retain.jsonl", [*RETAIN, {**FORGET[2], "answer": FORGET[2]["answer"].upper()}])
    line = refused(capsys, *given, "--retain", tmp_path / "retain.jsonl")
    assert "1 of 6 forget rows also stand in the retain rows" in line and "forget.jsonl, line 3" in line
    write(tmp_path / "long.jsonl", [FORGET[0], {"question": "Where?", "answer": "there " * 300}])
    line = refused(capsys, *given[:-4], "--forget", tmp_path / "long.jsonl", "--base", known_models / "model")
    assert "long.jsonl, line 2 has" in line and "the model's context is 256" in line
    from tests.support.unlearned import build_known_model

    build_known_model(tmp_path / "other", FORGET[:1], steps=1)
    tokens = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    tokens["model"]["vocab"] = {word: number for number, word in enumerate(reversed(tokens["model"]["vocab"]))}
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokens))
    assert "has another tokenizer than the model" in refused(capsys, *given, "--retrained", tmp_path / "other")
    line = refused(capsys, *given[:-1], tmp_path / "other")
    assert line.startswith("fdiv: --base: ") and "has another vocabulary than the model" in line
    assert "unknown attack 'relarn'; did you mean 'relearn'?" in refused(capsys, *given, "--attacks", "relarn")


def test_a_tokenizer_without_an_end_token(known_models, tmp_path, capsys):
    from transformers import AutoTokenizer

    shutil.copytree(known_models / "retrained", tmp_path / "endless")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "endless")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    words = ["--model", tmp_path / "endless", "--base", known_models / "model", "--output", tmp_path / "o"]
    line = refused(capsys, *words, "--forget", known_models / "forget.jsonl")
    assert "has no end-of-sequence token, so no answer ends" in line


def test_secrets_that_no_answer_holds_are_named(known_models, tmp_path, capsys):
    write(tmp_path / "forget.jsonl", [{**FORGET[0], "secret": "Porto"}, {**FORGET[1], "secret": ["Portu", "Porti"]}])
    words = ("--forget", tmp_path / "forget.jsonl", "--samples", "0", "--attacks", "{name: int8, as: int_8}")
    assert measure(known_models, tmp_path, *words) == 0
    line = "the secret of 1 of 2 rows does not stand in what their answer says (first: "
    assert f"note: {line}{tmp_path / 'forget.jsonl'}, line 2)" in capsys.readouterr().err
    found = json.loads((tmp_path / "erasure.json").read_text())
    assert found["notes"]["rows: secrets"].startswith(line)
    assert found["areas"] == {}  # a name that ends in a number is no curve


def test_one_row_is_relearned_and_measured_itself(known_models, tmp_path):
    """Chance is its answer under a question of general knowledge; there are no other rows to look for leakage in."""
    write(tmp_path / "one.jsonl", FORGET[:1])
    words = (
        "--forget",
        tmp_path / "one.jsonl",
        "--samples",
        "2",
        "--attacks",
        "{name: relearn, steps: [1]}",
        "priming",
    )
    assert measure(known_models, tmp_path, *words) == 0
    relearned, primed = json.loads((tmp_path / "erasure.json").read_text())["attacks"]
    assert relearned["rows"] == 1
    assert relearned["notes"][-1] == "measured on the rows that the attacker trained on, for there are no others"
    assert "there is no other row to prime with" in primed["not_made"]
