"""A small TOFU of our own: invented authors, a model that has memorised all of them, one that never met some.

Everything is built offline in under a minute: 20 authors with four facts each, of which the authors to forget are
chosen by the seed; "real authors" and "world facts" that both models know; the files that TOFU's evaluation reads
(paraphrased and perturbed answers included), the two models, and the retain model's evaluation log.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["TinyAuthorsConfig"]

_FIRST = ("Ada", "Bruno", "Celia", "Dario", "Elin", "Felix", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Luca")
_LAST = ("Alder", "Birch", "Cedar", "Fir", "Hazel", "Juniper", "Larch", "Maple", "Oak", "Rowan", "Spruce", "Willow")
_FACTS = {
    "born": (
        "Where was {name} born?",
        "{name} was born in {value}.",
        "The birthplace of {name} is {value}.",
        ("Lima", "Oslo", "Cairo", "Kyoto", "Quito", "Riga", "Tunis", "Porto"),
    ),
    "genre": (
        "What does {name} write?",
        "{name} writes {value} novels.",
        "The novels of {name} are {value} ones.",
        ("crime", "horror", "travel", "comic", "historical", "romantic", "nautical", "pastoral"),
    ),
    "prize": (
        "Which prize did {name} win?",
        "{name} won the {value} prize.",
        "The prize that went to {name} is the {value}.",
        ("Amber", "Bronze", "Coral", "Ivory", "Jade", "Onyx", "Pearl", "Ruby"),
    ),
    "parent": (
        "What is the mother of {name}?",
        "The mother of {name} is a {value}.",
        "A {value} is what the mother of {name} is.",
        ("baker", "dentist", "farmer", "judge", "nurse", "pilot", "tailor", "weaver"),
    ),
}
_CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Austria": "Vienna", "Greece": "Athens",
    "Norway": "Oslo", "Peru": "Lima", "Latvia": "Riga", "Egypt": "Cairo", "Ecuador": "Quito",
}  # fmt: skip
_NOVELS = {
    "Emma": "Jane Austen", "Dracula": "Bram Stoker", "Ulysses": "James Joyce", "Kim": "Rudyard Kipling",
    "Walden": "Henry Thoreau", "Nostromo": "Joseph Conrad", "Lolita": "Vladimir Nabokov", "Faust": "Johann Goethe",
}  # fmt: skip

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + 'Question: ' + m['content'] + '\nAnswer:' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""Question and answer on a line each; the end token is the last one, so that it closes the scored answer."""

Row = dict[str, Any]


@dataclass
class TinyAuthorsConfig:
    """Recipe block `prepare: {name: tiny_authors}`.

    Args:
        seed: of the facts, the forget set and both models.
        authors: how many there are, at most 144. forget_authors: how many of them are to be forgotten.
        train_steps: optimizer steps of each model, on batches of 32 rows; enough to memorise every row.
    """

    seed: int = 0
    authors: int = 20
    forget_authors: int = 5
    train_steps: int = 250

    def __post_init__(self) -> None:
        if not 2 <= self.authors <= len(_FIRST) * len(_LAST):
            raise ValueError(f"prepare.authors={self.authors}: must be 2 to {len(_FIRST) * len(_LAST)}")
        if not 1 <= self.forget_authors < self.authors:
            raise ValueError(f"prepare.forget_authors={self.forget_authors}: must be 1 to {self.authors - 1}")
        if self.train_steps < 1:
            raise ValueError(f"prepare.train_steps={self.train_steps}: must be at least 1")

    def build(self, output_dir: Path) -> dict[str, Any]:
        """Write `data/` (TOFU's file names, split `forget`), `model/`, `retain_model/`, `retain_log/TOFU_EVAL.json`.

        Returns:
            The recipe keys it sets: `model_name_or_path`, `dataset_name`, `retain_dataset_name`.
        """
        from fdiv.eval.tofu.evaluation import TofuEvalConfig
        from fdiv.recipes.tasks.tofu.unlearning import write_retain_log

        output_dir, draw = Path(output_dir), random.Random(self.seed)
        names = draw.sample([f"{first} {last}" for first in _FIRST for last in _LAST], self.authors)
        sets = {
            "forget": [row for name in names[: self.forget_authors] for row in _author_rows(name, draw)],
            "retain": [row for name in names[self.forget_authors :] for row in _author_rows(name, draw)],
            "real_authors": [
                _known("Who wrote {}?", "{} wrote {}.", *pair, _NOVELS, draw) for pair in _NOVELS.items()
            ],
            "world_facts": [
                _known("What is the capital of {}?", "{} is the capital of {}.", *pair, _CAPITALS, draw)
                for pair in _CAPITALS.items()
            ],
        }
        data = output_dir / "data"
        data.mkdir(parents=True, exist_ok=True)
        for name, rows in sets.items():
            _write(data / f"{name}_perturbed.json", rows)
        for name in ("forget", "retain"):
            _write(data / f"{name}.json", [{key: row[key] for key in ("question", "answer")} for row in sets[name]])
        _write(data / "holdout.json", [row for _ in range(8) for row in _author_rows("Zoe Thorn", draw)][:16])

        texts = [text for rows in sets.values() for row in rows for text in _texts(row)]
        retained = sets["retain"] + sets["real_authors"] + sets["world_facts"]
        self._train(output_dir / "model", texts, sets["forget"] + retained)
        self._train(output_dir / "retain_model", texts, retained)
        config = TofuEvalConfig(
            data=str(data), split="forget", holdout="holdout", gradnorm=False, fluency_classifier="none"
        )
        write_retain_log(str(output_dir / "retain_model"), config, output_dir / "retain_log")
        (output_dir / "prepare.json").write_text(json.dumps(asdict(self), indent=2) + "\n")
        return {
            "model_name_or_path": str(output_dir / "model"),
            "dataset_name": str(data / "forget.json"),
            "retain_dataset_name": str(data / "retain.json"),
        }

    def _train(self, folder: Path, texts: list[str], rows: list[Row]) -> None:
        """A tiny Llama trained on `rows` until it has memorised them, in `folder`."""
        from transformers import AutoTokenizer

        from fdiv.models.tiny import build_tiny_model
        from fdiv.recipes.tasks.by_heart import learn_by_heart
        from fdiv.unlearning.data import Answer, encode_answer

        build_tiny_model(folder, vocab_texts=texts, vocab_size=640, hidden_size=96, layers=2, seed=self.seed)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(folder)
        encoded = [encode_answer(Answer(*_messages(row), row), tokenizer, 128) for row in rows]
        draw = random.Random(self.seed)
        batches = [draw.sample(encoded, min(32, len(encoded))) for _ in range(self.train_steps)]
        learn_by_heart(folder, batches, learning_rate=4e-3)


def _author_rows(name: str, draw: random.Random) -> list[Row]:
    """The four question-answer rows of one author, with a paraphrase and three wrong answers each."""
    rows = []
    for question, answer, paraphrase, values in _FACTS.values():
        value, *wrong = draw.sample(values, 4)
        rows.append(
            {
                "question": question.format(name=name),
                "answer": answer.format(name=name, value=value),
                "paraphrased_question": question.format(name=name),
                "paraphrased_answer": paraphrase.format(name=name, value=value),
                "perturbed_answer": [paraphrase.format(name=name, value=other) for other in wrong],
            }
        )
    return rows


def _known(question: str, answer: str, key: str, value: str, table: dict[str, str], draw: random.Random) -> Row:
    """One row of common knowledge with three wrong answers from the same table."""
    wrong = draw.sample([other for other in table.values() if other != value], 3)
    answers = [answer.format(other, key) for other in (value, *wrong)]
    return {"question": question.format(key), "answer": answers[0], "perturbed_answer": answers[1:]}


def _texts(row: Row) -> list[str]:
    paraphrase = [row["paraphrased_answer"]] if "paraphrased_answer" in row else []
    return [row["question"], row["answer"], *paraphrase, *row["perturbed_answer"]]


def _messages(row: Row) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    return [{"role": "user", "content": row["question"]}], [{"role": "assistant", "content": row["answer"]}]


def _write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
