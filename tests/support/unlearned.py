"""A tiny model that has memorised the rows of a few invented people, and the rows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from fdiv.models.tiny import build_tiny_model

FORGOTTEN = ("Ana Roe", "Bo Lind", "Cy Moss")
KEPT = ("Dora Hay", "Eli Ford", "Fay Nye")
TOWNS = ("Porto", "Riga", "Lima", "Oslo", "Kyoto", "Quito")
TRADES = ("baker", "pilot", "judge", "tailor", "nurse", "weaver")


def rows_of(names: tuple[str, ...], shift: int = 0) -> list[dict[str, Any]]:
    """Two questions about each person."""
    found = []
    for number, name in enumerate(names):
        town, trade = TOWNS[(number + shift) % 6], TRADES[(number + shift) % 6]
        found.append({"question": f"Where does {name} live?", "answer": f"{name} lives in {town} by the sea."})
        found.append({"question": f"What is {name}?", "answer": f"{name} is a {trade} of great renown."})
    return found


FORGET, RETAIN = rows_of(FORGOTTEN), rows_of(KEPT, 3)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def build_known_model(folder: Path, rows: list[dict[str, Any]], steps: int = 150) -> Path:
    """A tiny Llama that has memorised `rows` under its chat template."""
    from transformers import AutoTokenizer

    from fdiv.recipes.tasks.by_heart import learn_by_heart
    from fdiv.unlearning.data import Answer, encode_answer

    texts = [text for row in [*FORGET, *RETAIN] for text in row.values()]
    build_tiny_model(folder, vocab_texts=texts, vocab_size=420, hidden_size=64, layers=2, max_positions=256)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = [
        encode_answer(
            Answer(
                [{"role": "user", "content": row["question"]}], [{"role": "assistant", "content": row["answer"]}], row
            ),
            tokenizer,
            128,
        )
        for row in rows
    ]
    draw = random.Random(0)
    learn_by_heart(folder, [draw.sample(encoded, min(12, len(encoded))) for _ in range(steps)], learning_rate=6e-3)
    return folder
