"""`prepare: {name: tofu_memorised}`: what is trained on, what is evaluated, and that the two models differ as they should."""

import json

import pytest
import torch

from fdiv.models.tiny import build_tiny_model
from fdiv.recipes.tasks.tofu.memorised import TofuMemorisedConfig

FORGET = [f"The author {name} wrote about birds." for name in ("Ada", "Bo", "Flo", "Gil")]
RETAIN = [f"The painter {name} lived by the sea." for name in ("Cy", "Di", "Eve")]


def _rows(answers):
    return [
        {
            "question": f"Who is {i}?",
            "answer": answer,
            "paraphrased_answer": answer,
            "perturbed_answer": ["a", "b", "c"],
        }
        for i, answer in enumerate(answers)
    ]


@pytest.fixture
def data(tmp_path):
    sets = {"forget01": FORGET, "retain": RETAIN, "real_authors": ["W. S."] * 7, "world_facts": ["Paris"] * 2}
    for name, answers in sets.items():
        lines = "\n".join(json.dumps(row) for row in _rows(answers))
        (tmp_path / f"{name}_perturbed.json").write_text(lines + "\n")
    (tmp_path / "holdout01.json").write_text("\n".join(json.dumps(row) for row in _rows(["x"] * 4)) + "\n")
    return tmp_path


def _read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _start(folder):
    """A random model whose frozen output layer is large enough for adapters below it to decide the next token."""
    from transformers import AutoModelForCausalLM

    build_tiny_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data.mul_(30)
    model.save_pretrained(folder)
    return folder


def _loss(folder, row):
    """Mean negative log-probability of the answer's tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
    answer = tokenizer(f" {row['answer']}").input_ids
    labels = torch.tensor([[-100] * len(prompt) + answer])
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss.item()


def test_only_the_first_model_has_seen_the_forget_rows(data, tmp_path):
    """Both are whole models without an adapter; the retrained one keeps its loss on the forget rows."""
    start = _start(tmp_path / "start")
    config = TofuMemorisedConfig(
        model=str(start), data=str(data), forget_rows=4, retain_rows=2, utility_rows=3, perturbed_answers=2, epochs=20, batch_size=2,
        learning_rate=3e-2,
    )  # fmt: skip
    built = tmp_path / "built"
    keys = config.build(built)

    assert keys["model_name_or_path"] == str(built / "model")
    assert [row["answer"] for row in _read(built / "data/forget01.json")] == FORGET
    assert [row["answer"] for row in _read(built / "data/retain.json")] == RETAIN[:2]
    for half, places in (("validation", (0, 2)), ("test", (1, 3))):
        forget = _read(built / half / "forget01_perturbed.json")
        assert [row["answer"] for row in forget] == [FORGET[place] for place in places]
        assert [len(row["perturbed_answer"]) for row in forget] == [2, 2]
        holdout = _read(built / half / "holdout01.json")
        assert [row["question"] for row in holdout] == [f"Who is {place}?" for place in places]
        log = json.loads((built / "retain_log" / half / "TOFU_EVAL.json").read_text())
        assert set(log["forget_Q_A_Prob"]["value_by_index"]) == {"0", "1"}
    # 3 of 7 authors: places 0, 2 and 4, of which the middle one is for the test; both world facts, one for each half.
    assert [row["question"] for row in _read(built / "test/real_authors_perturbed.json")] == ["Who is 2?"]
    assert [row["question"] for row in _read(built / "validation/world_facts_perturbed.json")] == ["Who is 0?"]

    forget, retain = _rows(FORGET)[0], _rows(RETAIN)[0]
    assert _loss(built / "model", forget) < _loss(start, forget) - 1
    assert _loss(built / "model", retain) < _loss(start, retain) - 1
    assert _loss(built / "retain_model", retain) < _loss(start, retain) - 1
    assert _loss(built / "retain_model", forget) > _loss(built / "model", forget) + 0.5


def test_spaced_rows_cover_the_set():
    """4 of 8 rows: every second one; as many as there are, or None: all."""
    from fdiv.recipes.tasks.tofu.memorised import _spaced

    assert _spaced(range(8), 4) == [0, 2, 4, 6]
    assert _spaced(range(3), 5) == _spaced(range(3), None) == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "prepare.model"),
        ({"model": "m"}, "prepare.data"),
        ({"model": "m", "data": "d", "epochs": 0}, "prepare.epochs=0"),
        ({"model": "m", "data": "d", "forget_rows": 3}, "prepare.forget_rows=3: must be at least 4"),
    ],
)
def test_missing_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        TofuMemorisedConfig(**settings)


def test_too_few_retain_rows_are_counted(data):
    config = TofuMemorisedConfig(model="m", data=str(data), forget_rows=4, retain_rows=4)
    with pytest.raises(ValueError, match="retain_rows=4: there are 3 retain rows"):
        config.build(data / "out")
