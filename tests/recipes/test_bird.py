"""BIRD's layout, made up small: prompts, gold queries, faults by name."""

from __future__ import annotations

import json
import sqlite3

import pytest

from fdiv.errors import DataError
from fdiv.recipes.tasks.sql.bird import bird_rows, write_bird_prompts


def _bird(folder):
    for split in ("train", "dev"):
        place = folder / split / f"{split}_databases" / "shop"
        place.mkdir(parents=True)
        with sqlite3.connect(place / "shop.sqlite") as connection:
            connection.executescript("CREATE TABLE item (name TEXT, price REAL); CREATE TABLE zone (id INTEGER);")
        questions = [
            {"db_id": "shop", "question": "Cheapest item?", "evidence": "cheap is a low price", "SQL": "SELECT 1"},
            {"db_id": "shop", "question": f"How many in {split}?", "evidence": "", "SQL": "SELECT COUNT(*) FROM item"},
        ]
        (folder / split / f"{split}.json").write_text(json.dumps(questions))
    return folder


def test_rows(tmp_path):
    assert write_bird_prompts(_bird(tmp_path / "bird"), tmp_path / "prompts") == {"train": 2, "dev": 2}
    rows = [json.loads(line) for line in (tmp_path / "prompts" / "dev.jsonl").read_text().splitlines()]
    assert rows[0]["prompt"] == [
        {
            "role": "user",
            "content": "SQLite tables:\nCREATE TABLE item (name TEXT, price REAL)\nCREATE TABLE zone (id INTEGER)\n\n"
            "Question: Cheapest item?\nHint: cheap is a low price\n"
            "Think step by step. Give the final answer as one SQLite query in a ```sql block.",
        }
    ]
    assert "Hint" not in rows[1]["prompt"][0]["content"]
    assert [row["answer"] for row in rows] == ["SELECT 1", "SELECT COUNT(*) FROM item"]
    assert [(row["database"], row["task_id"]) for row in rows] == [("shop", "dev/0"), ("shop", "dev/1")]


def test_faults_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file: .*train.json; unpack BIRD's train archive"):
        bird_rows(tmp_path, "train")
    folder = _bird(tmp_path / "bird")
    (folder / "dev" / "dev_databases" / "shop" / "shop.sqlite").unlink()
    with pytest.raises(DataError, match="no such database: .*shop.sqlite"):
        bird_rows(folder, "dev")
    (folder / "dev" / "dev.json").write_text('[{"db_id": "shop", "question": "?"}]')
    with pytest.raises(DataError, match="dev.json, row 0: column 'SQL' is missing"):
        bird_rows(folder, "dev")
