"""Rows of data: pairs and questions that `fdiv run` trains on, and samples that `fdiv eval passk` counts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from statistics import fmean
from typing import Any

from tests.fuzz.case import Edit, Kind, Outcome
from tests.fuzz.command import command, judged
from tests.fuzz.damage import HOSTILE_TEXT, NONSENSE, byte_damage, damage_bytes, damage_tree, misspelt
from tests.fuzz.world import World

__all__ = ["Rows"]

_COLUMNS = {
    "pairs": ("prompt", "chosen", "rejected"),
    "conversations": ("prompt", "chosen", "rejected"),
    "questions": ("question", "answer"),
    "samples": ("task_id", "correct", "sample"),
}
_FLAT = {"method": "flat", "divergence": "total_variation", "beta": None}
_MESSAGES: tuple[Any, ...] = (
    *([], [{}], [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": None}], [None], ["x"], [[]]),
    *(
        [{"role": "user", "content": 3}],
        [{"role": "x", "content": "y"}],
        [{"role": "user", "content": [{"text": "x"}]}],
    ),
    [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
)


class Rows(Kind):
    """A row or the file of it is damaged. A wrong value of a column that is read must be said, by its row."""

    name = "rows"
    what = "preference pairs, questions to forget, recorded samples: rows and bytes damaged"
    few = 8

    def members(self, rng: random.Random) -> list[Edit]:
        data = rng.choice(["pairs", "conversations", "questions", "samples"])
        edits: list[Edit] = [("data", data)]
        columns = _COLUMNS[data]
        pool = (*NONSENSE, *HOSTILE_TEXT, *(_MESSAGES if data == "conversations" else ()))
        for _ in range(rng.choice([1, 1, 1, 2])):
            row, column = rng.choice([0, 0, 3, 5, 7]), rng.choice(columns)
            edits.append(rng.choice([
                ("set", (row, column), rng.choice(pool)),
                ("set", (row, column), rng.choice(pool)),
                ("set", (row, "more"), rng.choice(NONSENSE)),
                ("delete", (row, column)),
                ("rename", (row, column), misspelt(column, rng)),
                ("every row", column, rng.choice(pool)),
                ("same", row),
                ("no rows",),
                byte_damage(rng),
                byte_damage(rng),
            ]))  # fmt: skip
        return edits

    def judge(self, edits: list[Edit], folder: Path) -> Outcome:
        data = next((edit[1] for edit in edits if edit[0] == "data"), "pairs")
        rows, content = _rows(data), b""
        for edit in edits:
            rows = _damaged_rows(rows, edit)
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        for edit in edits:
            if edit[0] not in ("data", "set", "delete", "rename", "every row", "same", "no rows"):
                content = damage_bytes(content, edit)
        if data == "samples":
            return self._samples(content, folder)
        return self._trained(data, content, folder)

    def _trained(self, data: str, content: bytes, folder: Path) -> Outcome:
        (folder / "data").mkdir()
        (folder / "data" / "train.jsonl").write_bytes(content)
        method = _FLAT if data == "questions" else {}
        recipe = self.world.write_recipe(folder, dataset_name=str(folder / "data"), **method)
        ended = command(["run", recipe], folder, 60)
        outcome = judged(ended)
        rows = _read(content)
        wrong = (
            "a line that is no JSON object"
            if rows is None
            else next(filter(None, (_fault_of_row(row, data) for row in rows)), "")
        )
        # What is dropped has to be counted.
        if outcome.verdict == "ok" and wrong and "dropped" not in ended.err and "left out" not in ended.err:
            return Outcome("silent", f"trained on {wrong}", ended.err[-300:])
        return outcome

    def _samples(self, content: bytes, folder: Path) -> Outcome:
        path = folder / "samples.jsonl"
        path.write_bytes(content)
        words = [
            "eval",
            "passk",
            "--from_samples",
            path,
            "--k",
            "1",
            "--output",
            folder / "out.json",
            "--resamples",
            "5",
        ]
        outcome = judged(command(words, folder, 60))
        if outcome.verdict != "ok":
            return outcome
        rows = _read(content)
        if rows is None or any(map(_fault_of_sample, rows)):
            return Outcome("silent", "counted samples that are none")
        tasks: dict[str, list[bool]] = {}
        for row in rows:
            if row["correct"] is not None:
                tasks.setdefault(str(row["task_id"]), []).append(row["correct"])
        expected = fmean(map(fmean, tasks.values()))
        found = json.loads((folder / "out.json").read_text(encoding="utf-8"))["pass@1"]["value"]
        return (
            outcome
            if abs(found - expected) < 1e-9
            else Outcome("silent", "another pass@1", f"{found}, not {expected}")
        )


def _rows(data: str) -> list[Any]:
    if data == "samples":
        return [{"task_id": i // 4, "sample": i % 4, "correct": bool(i % 3)} for i in range(16)]
    if data == "questions":
        return [{"question": f"Who wrote {i}?", "answer": f"Author {i}."} for i in range(8)]
    pairs = World.preference_rows(8)
    if data == "pairs":
        return pairs
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
        }
        for row in pairs
    ]


def _damaged_rows(rows: list[Any], edit: Edit) -> list[Any]:
    name, *values = edit
    if name in ("set", "delete", "rename"):
        return damage_tree(rows, edit) if rows else rows
    if name == "every row":
        return [{**row, values[0]: values[1]} for row in rows]
    if name == "same" and "chosen" in (rows or [{}])[0]:
        return [{**row, "rejected": row.get("chosen")} for row in rows]
    return [] if name == "no rows" else rows


def _read(content: bytes) -> list[dict[str, Any]] | None:
    """The rows as plain JSON; None where a line is no object."""
    try:
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
    except ValueError:
        return None
    return rows if all(isinstance(row, dict) for row in rows) else None


def _fault_of_row(row: dict[str, Any], data: str) -> str:
    for column in _COLUMNS[data]:
        value = row.get(column)
        if value is None:
            return f"a row without {column}"
        messages = isinstance(value, list) and value and all(isinstance(part, dict) for part in value)
        whole = messages and all(isinstance(part.get("content"), (str, list)) and part.get("role") for part in value)
        if not isinstance(value, str) and not whole:
            return f"a row whose {column} is no text and no messages"
    return ""


def _fault_of_sample(row: dict[str, Any]) -> bool:
    task, correct = row.get("task_id"), row.get("correct", "")
    return (
        isinstance(task, bool)
        or not isinstance(task, (str, int))
        or not (correct is None or isinstance(correct, bool))
    )
