"""The Chinook task: every query form of every problem agrees, the parts are disjoint, slips stay outside quotes."""

from __future__ import annotations

import json
import random
import sqlite3
from pathlib import Path

import pytest

from fdiv.recipes.tasks.sql.chinook import _KINDS, TEMPLATES, ChinookTaskConfig, _slip, chinook_problems


@pytest.fixture(scope="module")
def database(shared_data) -> Path:
    return shared_data / "data" / "chinook_sqlite" / "Chinook_Sqlite.sqlite"


def test_problems_of_the_real_database(database):
    problems = chinook_problems(database)
    assert {problem["template"] for problem in problems} == set(TEMPLATES)
    assert len({problem["prompt"] for problem in problems}) == len(problems) > 500
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    by_prompt = {problem["prompt"]: problem["queries"] for problem in problems}
    # counted by hand in the database's tables
    counts = {
        "How many tracks are of the genre Jazz?": 130,
        "How many customers live in Brazil?": 5,
        "How many albums are by Iron Maiden?": 21,
        "How many invoices went to the city Paris?": 14,
    }
    for prompt, expected in counts.items():
        assert {connection.execute(query).fetchall()[0] for query in by_prompt[prompt]} == {(expected,)}
    for problem in problems[::7]:
        assert 3 <= len(set(problem["queries"])) == len(TEMPLATES[problem["template"]].queries) <= 4
    assert not any("'" in problem["entity"] or "%" in problem["entity"] for problem in problems)


def test_queries_that_disagree_or_find_nothing_are_left_out(tmp_path):
    """In a made-up Chinook, `pop` and `Pop` are one genre for LIKE alone, and `Folk` has no tracks."""
    path = tmp_path / "small.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(
            """
            CREATE TABLE Genre (GenreId, Name); INSERT INTO Genre VALUES (1,'Pop'),(2,'pop'),(3,'Jazz'),(4,'Folk');
            CREATE TABLE Track (TrackId, GenreId, MediaTypeId, AlbumId, Milliseconds);
            INSERT INTO Track VALUES (1,1,1,1,10),(2,2,1,1,20),(3,3,1,1,30);
            CREATE TABLE MediaType (MediaTypeId, Name); CREATE TABLE Artist (ArtistId, Name);
            CREATE TABLE Album (AlbumId, ArtistId, Title); CREATE TABLE Customer (LastName, City, Country);
            CREATE TABLE Invoice (BillingCountry, BillingCity, Total);
            """
        )
    found = [(problem["template"], problem["entity"]) for problem in chinook_problems(path)]
    # counting, Folk has the answer 0 in every form; the longest of no tracks is null. `pop` has the longest of both.
    assert found == [
        ("genre_tracks", "Folk"), ("genre_tracks", "Jazz"), ("genre_longest", "Jazz"), ("genre_longest", "pop"),
    ]  # fmt: skip


def test_other_databases_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such database"):
        chinook_problems(tmp_path / "none.sqlite")
    with sqlite3.connect(tmp_path / "empty.sqlite") as connection:
        connection.execute("CREATE TABLE t (x)")
    with pytest.raises(ValueError, match="is not the Chinook database: no such table"):
        chinook_problems(tmp_path / "empty.sqlite")


def test_slips_replace_words_of_their_kind_outside_quotes():
    query = "SELECT COUNT(*) FROM Track WHERE GenreId IN (SELECT GenreId FROM Genre WHERE Name = 'Genre Name COUNT')"
    assert _slip(query, 0.0, random.Random(0)) == query
    for seed in range(20):
        slipped = _slip(query, 1.0, random.Random(seed))
        assert slipped.endswith("'Genre Name COUNT')")
        old, new = (text.partition("'")[0].replace("(", " ").replace(")", " ").split() for text in (query, slipped))
        assert len(old) == len(new)
        for before, after in zip(old, new, strict=True):
            kind = next((kind for kind in _KINDS if before in kind), None)
            assert (before == after) if kind is None else (after in kind and after != before)
    share = sum(_slip(query, 0.1, random.Random(seed)) != query for seed in range(2000)) / 2000
    assert share == pytest.approx(1 - 0.9**6, abs=0.03)  # COUNT, Track, GenreId twice, Genre, Name


def test_builder(database, tmp_path):
    from transformers import AutoTokenizer

    keys = ChinookTaskConfig(
        database=str(database), steps=2, batch_size=2, hidden_size=32, layers=1, vocab_size=400
    ).build(tmp_path)
    train, test = (
        [json.loads(line) for line in (Path(keys["dataset_name"]) / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    )
    prompts = [row["prompt"] for row in train + test]
    assert len(set(prompts)) == len(prompts)
    total = len(chinook_problems(database))
    assert len(train) / total == pytest.approx(0.35, abs=0.01) and len(test) / total == pytest.approx(0.25, abs=0.01)
    assert keys["reward"] == {"name": "sql", "database": str(database), "gold": "answer"}
    tokenizer = AutoTokenizer.from_pretrained(keys["model_name_or_path"])
    text = f" {train[0]['answer']}"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 1}, "prepare.steps must be at least 2"),
        ({"layers": 0}, "prepare.layers must be at least 1"),
        ({"train_share": 0.8, "test_share": 0.3}, "leave something for the base model"),
        ({"slips": 1.0}, r"prepare.slips must lie in \[0, 1\)"),
    ],
)
def test_bad_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ChinookTaskConfig(**({"database": "x.sqlite"} | wrong))
