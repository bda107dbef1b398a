"""BIRD (arXiv:2305.03111) as prompts for reinforcement learning and Pass@k: schema, hint, question; the gold query.

    python -m fdiv.recipes.tasks.sql.bird --data bird --output bird/prompts

`--data` holds the archives as their authors publish them, unpacked: `train/train.json`, `train/train_databases/`,
`dev/dev.json`, `dev/dev_databases/`.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
from pathlib import Path
from typing import Any

from fdiv.errors import DataError
from fdiv.files import read_json_lines
from fdiv.rows.checks import check_rows, text_fault
from fdiv.rows.sources import Source
from fdiv.terminal import info

__all__ = ["bird_rows", "write_bird_prompts"]

_QUESTION = (
    "SQLite tables:\n{schema}\n\nQuestion: {question}{hint}\n"
    "Think step by step. Give the final answer as one SQLite query in a ```sql block."
)


def bird_rows(data: str | Path, split: str) -> list[dict[str, Any]]:
    """The rows of a split: `prompt` (conversational), `answer` (the gold query), `database` (its name), `task_id`.

    Args:
        data: see the module.
        split: train or dev.

    Raises:
        DataError: a file or database that is missing, a question without one of its fields.
    """
    folder = Path(data) / split
    path = folder / f"{split}.json"
    if not path.is_file():
        raise DataError(f"no such file: {path}; unpack BIRD's {split} archive into {data}")
    schemas: dict[str, str] = {}
    rows = []
    entries = read_json_lines(path)
    check_rows(entries, Source(str(path), path), dict.fromkeys(("db_id", "question", "SQL"), text_fault))
    for number, entry in enumerate(entries):
        name = entry["db_id"]
        if name not in schemas:
            schemas[name] = _schema(folder / f"{split}_databases" / name / f"{name}.sqlite")
        hint = f"\nHint: {entry['evidence'].strip()}" if (entry.get("evidence") or "").strip() else ""
        text = _QUESTION.format(schema=schemas[name], question=entry["question"].strip(), hint=hint)
        rows.append(
            {
                "prompt": [{"role": "user", "content": text}],
                "answer": entry["SQL"],
                "database": name,
                "task_id": f"{split}/{number}",
            }
        )
    return rows


def _schema(path: Path) -> str:
    """The CREATE TABLE statements of a database."""
    if not path.is_file():
        raise DataError(f"no such database: {path}")
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    try:
        found = connection.execute(
            "SELECT sql FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite!_%' ESCAPE '!' ORDER BY name"
        )
        return "\n".join(sql for (sql,) in found)
    except sqlite3.DatabaseError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    finally:
        connection.close()


def write_bird_prompts(data: str | Path, output: str | Path) -> dict[str, int]:
    """Write `OUTPUT/train.jsonl` and `OUTPUT/dev.jsonl`; returns how many rows each has.

    Raises:
        DataError: see `bird_rows`.
    """
    output, counts = Path(output), {}
    for split in ("train", "dev"):
        rows = bird_rows(data, split)
        output.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (output / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        counts[split] = len(rows)
    return counts


def main() -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with BIRD's train/ and dev/")
    parser.add_argument("--output", required=True, help="folder for train.jsonl and dev.jsonl")
    args = parser.parse_args()
    try:
        counts = write_bird_prompts(args.data, args.output)
    except DataError as error:
        raise SystemExit(f"fdiv: {error}") from None
    info(", ".join(f"{split}: {count} rows" for split, count in counts.items()))


if __name__ == "__main__":
    main()
