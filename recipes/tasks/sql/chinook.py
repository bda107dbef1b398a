"""Questions over the Chinook music store with several right SQL queries each, and a small model that often finds one.

A problem is a question template with an entity of the database in it (`How many tracks are of the genre Jazz?`); the
base model learns from all the query forms of a template. The reward is execution match (`fdiv.rl.rewards.SQLReward`).
"""

from __future__ import annotations

import json
import random
import re
import sqlite3
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["TEMPLATES", "ChinookTaskConfig", "Template", "chinook_problems"]


class Template(NamedTuple):
    """A question with `{x}` for the entity, the query that lists the entities, and equivalent queries; the first of
    them is the gold query."""

    question: str
    entities: str
    queries: tuple[str, ...]


_GENRES = "SELECT Name FROM Genre"
_MEDIA_TYPES = "SELECT Name FROM MediaType"
_COUNTRIES = "SELECT DISTINCT Country FROM Customer"
_CITIES = "SELECT DISTINCT City FROM Customer"
_ARTISTS = "SELECT DISTINCT Name FROM Artist JOIN Album USING (ArtistId)"


def _through(select: str, table: str, key: str) -> tuple[str, ...]:
    """`select` from a table whose rows point to a named row elsewhere: join, scalar subquery, IN, EXISTS."""
    other = key.removesuffix("Id")
    return (
        f"SELECT {select} FROM {table} JOIN {other} USING ({key}) WHERE {other}.Name = '{{x}}'",
        f"SELECT {select} FROM {table} WHERE {key} = (SELECT {key} FROM {other} WHERE Name = '{{x}}')",
        f"SELECT {select} FROM {table} WHERE {key} IN (SELECT {key} FROM {other} WHERE Name = '{{x}}')",
        f"SELECT {select} FROM {other} JOIN {table} USING ({key}) WHERE {other}.Name LIKE '{{x}}'",
    )


def _where(select: str, table: str, column: str) -> tuple[str, ...]:
    """`select` from one table: equality, IN, LIKE, the sides swapped."""
    start = f"SELECT {select} FROM {table} WHERE"
    return (
        f"{start} {column} = '{{x}}'",
        f"{start} {column} IN ('{{x}}')",
        f"{start} {column} LIKE '{{x}}'",
        f"{start} '{{x}}' = {column}",
    )


TEMPLATES: dict[str, Template] = {
    "genre_tracks": Template(
        "How many tracks are of the genre {x}?", _GENRES, _through("COUNT(*)", "Track", "GenreId")
    ),
    "genre_longest": Template(
        "How long is the longest track of the genre {x}?", _GENRES, _through("MAX(Milliseconds)", "Track", "GenreId")
    ),
    "media_tracks": Template(
        "How many tracks have the media type {x}?", _MEDIA_TYPES, _through("COUNT(*)", "Track", "MediaTypeId")
    ),
    "artist_titles": Template("Which albums are by {x}?", _ARTISTS, _through("Title", "Album", "ArtistId")),
    "artist_albums": Template("How many albums are by {x}?", _ARTISTS, _through("COUNT(*)", "Album", "ArtistId")),
    "artist_tracks": Template(
        "How many tracks are by {x}?", _ARTISTS,
        _through("COUNT(*)", "Track JOIN Album USING (AlbumId)", "ArtistId")[:3],
    ),
    "country_customers": Template(
        "How many customers live in {x}?", _COUNTRIES, _where("COUNT(*)", "Customer", "Country")
    ),
    "country_sales": Template(
        "What do the invoices to {x} add up to?", _COUNTRIES, _where("SUM(Total)", "Invoice", "BillingCountry")
    ),
    "city_names": Template("Who lives in the city {x}?", _CITIES, _where("LastName", "Customer", "City")),
    "city_invoices": Template(
        "How many invoices went to the city {x}?", _CITIES, _where("COUNT(*)", "Invoice", "BillingCity")
    ),
    "city_largest": Template(
        "What is the largest invoice to the city {x}?", _CITIES, _where("MAX(Total)", "Invoice", "BillingCity")
    ),
}  # fmt: skip

_PLAIN_NAME = re.compile(r"[A-Za-z0-9&/.\-]+( [A-Za-z0-9&/.\-]+){0,2}")
"""At most three words without quotes and without the wildcards of LIKE."""


def chinook_problems(database: str | Path) -> list[dict[str, Any]]:
    """Every (template, entity) of the database: `prompt`, `template`, `entity` and the equivalent `queries`.

    Entities are names of at most three plain words. A problem whose queries do not all return the same rows, or return
    none, is left out.

    Raises:
        FileNotFoundError: no such database.
        ValueError: a database without Chinook's tables.
    """
    path = Path(database)
    if not path.is_file():
        raise FileNotFoundError(f"no such database: {path}; prepare.database is Chinook_Sqlite.sqlite")
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    try:
        return [
            {"prompt": template.question.format(x=entity), "template": name, "entity": entity, "queries": queries}
            for name, template in TEMPLATES.items()
            for entity in _entities(connection, template)
            if _agree(connection, queries := [query.format(x=entity) for query in template.queries])
        ]
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} is not the Chinook database: {error}") from error
    finally:
        connection.close()


def _entities(connection: sqlite3.Connection, template: Template) -> list[str]:
    names = [name for (name,) in connection.execute(template.entities) if name]
    return sorted({name for name in names if _PLAIN_NAME.fullmatch(name)})


def _agree(connection: sqlite3.Connection, queries: list[str]) -> bool:
    """Whether all queries return the same rows, in any order, and at least one that is not null."""
    results = [sorted(connection.execute(query).fetchall()) for query in queries]
    return all(rows == results[0] for rows in results) and results[0] not in ([], [(None,)])


@dataclass
class ChinookTaskConfig:
    """Recipe block `prepare: {name: chinook}`: questions over Chinook and a small model that often answers them.

    Args:
        database: path of Chinook_Sqlite.sqlite.
        seed: of the split, the weights and what the base model sees.
        train_share, test_share: shares of each template's problems that are kept for reinforcement learning and for
            the test; the base model is trained on the rest. No problem is in two parts, but an entity may be, in
            another template.
        slips: probability with which each table, column and function of a query that the base model learns from is
            replaced by another one, so that long queries are wrong more often than short ones.
        steps, batch_size, learning_rate: of the base model.
        hidden_size, layers: its width (a multiple of 32) and depth.
        vocab_size: of its byte-level tokenizer.
    """

    database: str
    seed: int = 0
    train_share: float = 0.35
    test_share: float = 0.25
    slips: float = 0.06
    steps: int = 500
    batch_size: int = 64
    learning_rate: float = 3e-3
    hidden_size: int = 96
    layers: int = 3
    vocab_size: int = 700

    def __post_init__(self) -> None:
        for name, least in {"steps": 2, "batch_size": 1, "hidden_size": 1, "layers": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"prepare.{name} must be at least {least}, got {getattr(self, name)}")
        if not (self.train_share > 0 and self.test_share > 0 and self.train_share + self.test_share < 1):
            raise ValueError(
                f"prepare.train_share={self.train_share} and test_share={self.test_share} must be above 0 and leave "
                "something for the base model"
            )
        if not 0 <= self.slips < 1:
            raise ValueError(f"prepare.slips must lie in [0, 1), got {self.slips}")

    def build(self, output_dir: Path) -> dict[str, Any]:
        """Write `model/`, `data/train.jsonl` and `data/test.jsonl` (prompt, template, entity, answer: the gold query).

        Returns:
            The recipe keys it sets: `model_name_or_path`, `dataset_name`, `dataset_train_split`,
            `dataset_test_split`, `reward`.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from fdiv.models.tiny import build_tiny_model, train_tiny_model
        from fdiv.training.finite import refuse_broken

        output_dir, draw = Path(output_dir), random.Random(self.seed)
        problems = chinook_problems(self.database)
        base, train, test = self._split(problems, draw)
        texts = [text for problem in problems for text in (problem["prompt"], *problem["queries"])]
        model_dir = build_tiny_model(
            output_dir / "model", vocab_texts=texts, vocab_size=self.vocab_size, hidden_size=self.hidden_size,
            layers=self.layers, max_positions=128, seed=self.seed,
        )  # fmt: skip
        tokenizer, model = AutoTokenizer.from_pretrained(model_dir), AutoModelForCausalLM.from_pretrained(model_dir)
        model = train_tiny_model(
            model, tokenizer, self._sampler(base, draw), self.steps, batch_size=self.batch_size,
            learning_rate=self.learning_rate, max_grad_norm=1.0,
        )  # fmt: skip
        refuse_broken(model, "the base model that was trained", "lower learning_rate")
        model.save_pretrained(model_dir)
        data = output_dir / "data"
        data.mkdir(parents=True, exist_ok=True)
        for split, rows in (("train", train), ("test", test)):
            lines = [{key: row[key] for key in ("prompt", "template", "entity")} for row in rows]
            lines = [line | {"answer": row["queries"][0]} for line, row in zip(lines, rows, strict=True)]
            (data / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        (output_dir / "prepare.json").write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return {
            "model_name_or_path": str(model_dir),
            "dataset_name": str(data),
            "dataset_train_split": "train",
            "dataset_test_split": "test",
            "reward": {"name": "sql", "database": str(self.database), "gold": "answer"},
        }

    def _split(self, problems: list[dict[str, Any]], draw: random.Random) -> tuple[list, list, list]:
        """Base, train and test problems; every template is split in the same shares."""
        parts: tuple[list, list, list] = ([], [], [])
        for template in TEMPLATES:
            own = [problem for problem in problems if problem["template"] == template]
            draw.shuffle(own)
            train, test = round(self.train_share * len(own)), round(self.test_share * len(own))
            for part, rows in zip(parts, (own[train + test :], own[:train], own[train : train + test]), strict=True):
                part.extend(rows)
        return parts

    def _sampler(self, problems: list[dict[str, Any]], draw: random.Random) -> Callable[[], tuple[str, str]]:
        """Draws (question, query): the template uniformly, then the problem, then the form."""
        by_template = [[p for p in problems if p["template"] == name] for name in TEMPLATES]
        by_template = [rows for rows in by_template if rows]

        def sample() -> tuple[str, str]:
            problem = draw.choice(draw.choice(by_template))
            return problem["prompt"], f" {_slip(draw.choice(problem['queries']), self.slips, draw)}"

        return sample


_KINDS = (
    ("COUNT", "SUM", "MAX", "MIN", "AVG"),
    ("Track", "Genre", "Album", "Artist", "MediaType", "Customer", "Invoice"),
    ("GenreId", "MediaTypeId", "ArtistId", "AlbumId", "TrackId"),
    ("Country", "City", "BillingCountry", "BillingCity", "Name", "LastName", "Title"),
    ("Total", "Milliseconds", "UnitPrice"),
)
_WORD = re.compile(r"[A-Za-z]+")


def _slip(query: str, share: float, draw: random.Random) -> str:
    """`query` with each word of `_KINDS` outside quotes replaced, with probability `share`, by another of its kind."""

    def replace(match: re.Match) -> str:
        word = match.group()
        kind = next((kind for kind in _KINDS if word in kind), None)
        if kind is None or draw.random() >= share:
            return word
        return draw.choice([other for other in kind if other != word])

    return "".join(
        part if part.startswith("'") else _WORD.sub(replace, part) for part in re.split(r"('[^']*')", query)
    )
