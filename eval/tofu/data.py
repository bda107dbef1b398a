"""TOFU's rows, from the hub by name or from local files, checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdiv.errors import DataError
from fdiv.files import folded, read_json_lines
from fdiv.inference.cache import fingerprint

__all__ = ["HUB_DATASET", "TofuRows", "load_rows", "load_tofu_rows"]

HUB_DATASET = "locuslab/TOFU"
_FILE_TYPES = ("json", "jsonl", "parquet")

Row = dict[str, Any]


@dataclass
class TofuRows:
    """The row sets of one forget split; `missing` says why a set is empty."""

    split: str
    forget: list[Row]
    retain: list[Row]
    ra: list[Row]
    wf: list[Row]
    holdout: list[Row]
    missing: dict[str, str]

    def forget_digest(self) -> str:
        """Fingerprint of the forget rows: what makes two logs comparable."""
        return fingerprint(
            [[r["question"], r["answer"], r["paraphrased_answer"], r["perturbed_answer"]] for r in self.forget]
        )


def _read_file(path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        from datasets import Dataset

        return Dataset.from_parquet(str(path)).to_list()
    return read_json_lines(path)


def load_rows(source: str, name: str, split: str = "train") -> list[Row]:
    """Rows of one configuration of a dataset.

    Args:
        source: a local folder holding `NAME.json`, `.jsonl` or `.parquet` (JSON lines or one JSON array), or a hub
            name.
        name: the file's stem, or the configuration on the hub.
        split: split on the hub.
    Raises:
        FileNotFoundError: the local folder has no such file (a DataError is raised for an unreachable hub dataset).
    """
    folder = Path(source)
    if folder.is_dir():
        for suffix in _FILE_TYPES:
            if (folder / f"{name}.{suffix}").exists():
                return _read_file(folder / f"{name}.{suffix}")
        raise FileNotFoundError(f"{folder} has no {name}.json, .jsonl or .parquet")
    if folder.is_absolute() or source.startswith("."):
        raise DataError(f"data folder {source} does not exist")
    from datasets import load_dataset

    try:
        return load_dataset(source, name, split=split).to_list()
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{source} ({name}) cannot be had from the hub: {reason}; give a local folder with --data"
        ) from None


def _check_columns(rows: Sequence[Row], name: str, columns: Sequence[str]) -> None:
    if not rows:
        raise DataError(f"{name}: no rows")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{name}, row {index} is {repr(row)[:60]}, not an object with the columns of a row")
        for column in columns:
            value = row.get(column)
            wrong_list = column == "perturbed_answer" and not (
                isinstance(value, list) and value and all(isinstance(one, str) and one for one in value)
            )
            if wrong_list or (column != "perturbed_answer" and not isinstance(value, str)):
                found = "missing" if value is None else repr(value)[:60]
                raise DataError(
                    f"{name}, row {index}: column {column!r} is {found}; a row needs {', '.join(columns)} "
                    f"and has {', '.join(row)}"
                )
    counts = {len(row["perturbed_answer"]) for row in rows} if "perturbed_answer" in columns else {0}
    if len(counts) > 1:
        raise DataError(
            f"{name}: rows have {', '.join(map(str, sorted(counts)))} perturbed answers, expected one number"
        )


def _pairs(rows: Sequence[Row]) -> set[tuple[str, str]]:
    return {(folded(row["question"]), folded(row["answer"])) for row in rows}


def load_tofu_rows(split: str, source: str = HUB_DATASET, holdout: str | None = None) -> TofuRows:
    """The row sets TOFU's metrics need for one forget split.

    Args:
        split: `forget01`, `forget05`, `forget10`, or any name NAME for which `NAME_perturbed` exists.
        source: hub name or local folder with the files of `locuslab/TOFU` (see `load_rows`).
        holdout: name of the holdout set for the membership attacks; by default `forgetXX` → `holdoutXX`.
    Returns:
        All rows. Holdout, real authors and world facts may be absent from a local folder: `missing` then says so.
    Raises:
        DataError: a forget or retain file is absent, a column is missing, a forget row stands in the retain or
        holdout set.
    """
    answers = ("question", "answer", "perturbed_answer")
    needed = {
        "forget": (f"{split}_perturbed", (*answers, "paraphrased_answer")),
        "retain": ("retain_perturbed", (*answers, "paraphrased_answer")),
        "ra": ("real_authors_perturbed", answers),
        "wf": ("world_facts_perturbed", answers),
        "holdout": (holdout or split.replace("forget", "holdout"), ("question", "answer")),
    }
    sets: dict[str, list[Row]] = {}
    missing: dict[str, str] = {}
    for row_set, (name, columns) in needed.items():
        if row_set == "holdout" and name == split:
            sets[row_set], missing[row_set] = [], f"split {split} names no holdout set; give one with --holdout"
            continue
        try:
            rows = load_rows(source, name)
        except FileNotFoundError as error:
            if row_set in ("forget", "retain"):
                raise DataError(f"{error}: the {row_set} set of split {split}") from None
            sets[row_set], missing[row_set] = [], str(error)
            continue
        _check_columns(rows, name, columns)
        sets[row_set] = rows
    for other in ("retain", "holdout"):
        both = _pairs(sets["forget"]) & _pairs(sets[other])
        if both:
            raise DataError(
                f"{len(both)} forget rows of {split} stand in the {other} set too, for example {min(both)[0]!r}: "
                "the two must not overlap"
            )
    return TofuRows(split=split, missing=missing, **sets)
