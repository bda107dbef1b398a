"""Rows of one's own for unlearning: every format of every file, what is refused, and what a row's scores mean."""

import csv
import json

import pytest
from datasets import Dataset

from fdiv.errors import DataError
from fdiv.eval.unlearning import aggregate
from fdiv.eval.unlearning.attacks.rows import answered, asked
from fdiv.eval.unlearning.data import check_apart, passages, read_questions, read_rows, with_paraphrases

PAIRS = [("Where does Ana live?", "In Porto."), ("Who is Bo?", "A pilot."), ("王小明?", "上海。")]


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


FORMATS = {
    "question": lambda q, a: {"question": q, "answer": a},
    "prompt": lambda q, a: {"prompt": q, "completion": a},
    "prompt of messages": lambda q, a: {"prompt": turns(q, a)[:1], "completion": turns(q, a)[1:]},
    "messages": lambda q, a: {"messages": turns(q, a)},
    "messages that go on": lambda q, a: {"messages": [*turns("Hi", "Hello."), *turns(q, a), turns("Thanks", "")[0]]},
    "conversations": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
}


def write(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(row["text"] for row in rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_in_every_file(name, suffix, tmp_path):
    if suffix == ".csv" and name == "prompt of messages":
        pytest.skip("a table of text has no messages beside a column that may be text")
    file = write(tmp_path / f"rows{suffix}", [FORMATS[name](*pair) for pair in PAIRS])
    assert [(asked(row), answered(row)) for row in read_rows(file, "forget")] == PAIRS


def test_running_text(tmp_path):
    texts = [{"text": " ".join(f"w{i}" for i in range(count))} for count in (3, 250, 100)]
    for suffix in (".jsonl", ".txt", ".csv"):
        rows = read_rows(write(tmp_path / f"x{suffix}", texts), "forget")
        assert [row["text"] for row in rows] == [row["text"] for row in texts]
    cut = passages(rows)
    assert [(row["row"], len(row["text"].split())) for row in cut] == [(0, 3), (1, 83), (1, 83), (1, 84), (2, 100)]
    assert " ".join(row["text"] for row in cut if row["row"] == 1) == texts[1]["text"]


def test_secrets_and_paraphrases_beside_the_rows(tmp_path):
    rows = [
        {"question": "Q1?", "answer": "A 1", "secret": "one", "paraphrase": "Say Q1?"},
        {"question": "Q2?", "answer": "A 2", "secret": None, "paraphrase": None},
    ]
    read = read_rows(write(tmp_path / "a.jsonl", rows), "forget")
    assert [row.get("secret") for row in read] == [["one"], None] and read[0]["paraphrase"] == ["Say Q1?"]
    in_order = write(tmp_path / "p.jsonl", [{"question": "Tell Q1"}, {"question": "Tell Q2"}])
    assert [row["paraphrase"] for row in with_paraphrases(read, in_order)] == [["Say Q1?", "Tell Q1"], ["Tell Q2"]]
    numbered = write(tmp_path / "n.jsonl", [{"row": 1, "paraphrase": "x"}, {"row": 1, "paraphrase": "y"}])
    assert [row.get("paraphrase") for row in with_paraphrases(read, numbered)] == [["Say Q1?"], ["x", "y"]]
    with pytest.raises(DataError, match="has 1 rows, the forget rows 2"):
        with_paraphrases(read, write(tmp_path / "s.jsonl", [{"question": "x"}]))
    with pytest.raises(DataError, match=r"b\.jsonl, line 1: column 'row' is 2: a number from 0 to 1"):
        with_paraphrases(read, write(tmp_path / "b.jsonl", [{"row": 2, "paraphrase": "x"}]))


REFUSED = {
    "empty": ("", "x.jsonl is empty; it must hold at least one row"),
    "blank": ("\n \n", "x.jsonl is empty; it must hold at least one row"),
    "no list": ("\ufeff[]", "x.jsonl is empty; it must hold at least one row"),
    "columns": ('{"a": "b"}', "the forget rows have the columns a: question and answer"),
    "two formats": (
        '{"question": "q", "answer": "a", "text": "t"}',
        "has `question` and `answer` beside `text`: it is unclear which is meant",
    ),
    "null": ('{"question": "q", "answer": "a"}\n{"question": "q", "answer": null}', "line 2: column 'answer' is null"),
    "no answer": ('{"messages": [{"role": "user", "content": "hi"}]}', "line 1: column 'messages' holds no answer"),
    "role": (
        '{"conversations": [{"from": "martian", "value": "q"}, {"from": "gpt", "value": "a"}]}',
        "has the role 'martian'",
    ),
    "signs": ('{"question": "q", "answer": "a", "secret": "?!"}', "'secret' holds '?!': no letter or digit to find"),
    "secret": ('{"question": "q", "answer": "a", "secret": 3}', "column 'secret' has an entry 0 that is 3, not text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path):
    content, message = REFUSED[name]
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(DataError) as caught:
        read_rows(str(tmp_path / "x.jsonl"), "forget")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"the forget rows: no such file: .*none\.jsonl"):
        read_rows(str(tmp_path / "none.jsonl"), "forget")


SAME = [("Where does  ANA live?", "in porto."), ("Where does Ana\u00a0live?", "In Ｐorto.")]


@pytest.mark.parametrize("pair", SAME)
@pytest.mark.parametrize("name", FORMATS)
def test_a_forget_row_among_others_is_found_in_any_format(name, pair, tmp_path):
    forget = read_rows(write(tmp_path / "f.jsonl", [FORMATS["question"](*p) for p in reversed(PAIRS)]), "forget")
    others = read_rows(write(tmp_path / "r.jsonl", [FORMATS[name]("Else?", "No."), FORMATS[name](*pair)]), "retain")
    with pytest.raises(
        DataError, match=r"1 of 3 forget rows also stand in the retain rows \(first: .*f\.jsonl, line 3\)"
    ):
        check_apart(forget, others, "retain")
    check_apart(forget, others[:1], "retain")


def test_a_text_inside_another_is_found(tmp_path):
    forget = read_rows(write(tmp_path / "f.txt", [{"text": "The  SECRET words"}]), "forget")
    others = read_rows(write(tmp_path / "r.txt", [{"text": "Here are the secret words, all."}]), "retain")
    with pytest.raises(DataError, match="1 of 1 forget rows also stand in the retain rows"):
        check_apart(forget, others, "retain")


def test_questions_without_answers(tmp_path):
    assert read_questions(write(tmp_path / "a.jsonl", [{"question": "Q?"}]), "q") == [{"question": "Q?"}]
    assert read_questions(write(tmp_path / "a.txt", [{"text": "Q?"}]), "q") == [{"question": "Q?"}]
    assert read_questions(write(tmp_path / "b.jsonl", [{"prompt": "P"}]), "q") == [{"prompt": "P"}]
    with pytest.raises(DataError, match="no column `question`, `prompt` or `text`"):
        read_questions(write(tmp_path / "c.jsonl", [{"answer": "P"}]), "q")


# ---------------------------------------------------------------- scores
def row(p, es=0.0):
    return {"probability": p, "extraction_strength": es, "exact_memorization": es}


@pytest.mark.parametrize(
    ("own", "chance", "unknown"),
    [
        (row(0.2), row(0.1), True),  # log 2 is less than one nat per token
        (row(0.9), row(0.3), False),  # log 3 is more
        (row(0.04), row(0.001), True),  # likelier than chance, and still never said
        (row(0.04, 0.2), row(0.001, 0.05), False),  # but its end is completed
        (row(0.2, 0.15), row(0.1, 0.05), True),
        (row(0.0), row(0.0), True),
        (row(None), row(0.1), False),  # without a label nothing is known of it
    ],
)
def test_a_row_at_chance(own, chance, unknown):
    assert aggregate.at_chance([own], [chance]) == ([0] if unknown else [])


def test_forgotten_is_one_minus_what_is_above_chance():
    rows = [row(0.6, 0.2), row(0.1, 0.1), row(1.0, 1.0)]
    chance = [row(0.2, 0.2), row(0.2, 0.2), row(0.5, 0.5)]
    # (0.6 − 0.2)/0.8 = 0.5 and 0; below chance 0 and 0; known whole 1 and 1.
    assert aggregate.forgotten(rows, chance) == pytest.approx(1 - (0.5 + 0 + 0 + 0 + 1 + 1) / 6)
    assert aggregate.forgotten([row(1.0)], [row(1.0)]) == 1.0  # chance says it all: nothing is above it


def test_kept_is_a_geometric_mean_so_that_its_ratio_is_that_of_the_sets():
    before = aggregate.kept([row(0.8), row(0.4)], [row(0.09)])
    after = aggregate.kept([row(0.3), row(0.29)], [row(0.09)])
    assert before == pytest.approx((0.61 * 0.1) ** 0.5) and after / before == pytest.approx((0.305 / 0.61) ** 0.5)
    assert aggregate.kept([], []) is None
    # A set that the model never knew does not decide it, whatever becomes of a hundredth of a percent.
    unknown = [aggregate.kept([row(0.9)], [row(p)]) for p in (1e-4, 1e-6)]
    assert 0.99 < unknown[1] / unknown[0] < 1


def test_scores_of_a_record_by_hand():
    import math

    record = {
        "avg_loss": math.log(2), "labels": 4, "log_probs": [-1.0, -2.0, -0.1, -9.0], "is_top1": [1, 0, 1, 1],
        "mean": [-1.0] * 4, "variance": [1.0] * 4,
    }  # fmt: skip
    scores = aggregate.row_scores(record)
    assert scores["probability"] == pytest.approx(0.5)
    assert scores["extraction_strength"] == pytest.approx(1 / 3)  # of the first three labels the last is completed
    assert scores["exact_memorization"] == pytest.approx(2 / 3)
    assert scores["min_k"] == pytest.approx(2.0)  # 40 % of three labels is one
    empty = aggregate.row_scores({"avg_loss": None, "labels": 0, "is_top1": []})
    assert set(empty.values()) == {None}
    assert aggregate.defined_mean([0.5, None, 0.5]) == (0.5, 0.0) and aggregate.defined_mean([]) == (None, None)


def test_membership_needs_both_sides():
    scores = [{"min_k": 1.0, "min_k_plus_plus": 0.0}, {"min_k": 2.0, "min_k_plus_plus": 0.0}]
    assert aggregate.membership(scores, [{"min_k": 3.0, "min_k_plus_plus": 0.0}]) == {
        "mia_min_k": 1.0,
        "mia_min_k_plus_plus": 0.5,
    }
    assert set(aggregate.membership(scores, []).values()) == {None}


def test_a_passage_gives_the_secrets_of_its_continuation(tmp_path):
    """Of a text the secret may stand in one passage, or in the words that a passage begins with."""
    from types import SimpleNamespace

    from fdiv.eval.unlearning.sets import load_sets

    words = [f"w{number}" for number in range(200)]
    words[30], words[70], words[180] = "Porto", "Riga", "Lima"
    file = write(tmp_path / "x.jsonl", [{"text": " ".join(words), "secret": ["Porto", "Riga", "Lima"]}])
    sets = load_sets(SimpleNamespace(), file)
    assert [secret.texts for secret in sets.secrets] == [("Riga",), ("Lima",)] and "secrets" not in sets.origins
    file = write(tmp_path / "y.jsonl", [{"text": " ".join(words[:60]), "secret": "Porta"}])
    sets = load_sets(SimpleNamespace(), file)
    assert sets.secrets[0].texts == () and sets.secrets[0].words[:1] == ("porto",)
    assert "does not stand in what their answer says (first: " in sets.origins["secrets"]
