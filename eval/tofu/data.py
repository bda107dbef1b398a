"""TOFU's rows, or one's own questions and answers, from the hub or from local files, checked before any model is
loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fdiv.errors import DataError
from fdiv.eval.tofu.rows import Row, checked_rows, forget_columns
from fdiv.files import DATA_FORMATS, folded, read_csv_rows, read_json_lines
from fdiv.inference.cache import fingerprint
from fdiv.rows.loading import loaded
from fdiv.rows.sources import Source, mark_source

__all__ = ["HUB_DATASET", "TofuRows", "load_rows", "load_tofu_rows"]

HUB_DATASET = "locuslab/TOFU"


@dataclass
class TofuRows:
    """The row sets of one forget split; `missing` says why a set is empty, or why its rows do not give a metric."""

    split: str
    forget: list[Row]
    retain: list[Row]
    ra: list[Row]
    wf: list[Row]
    holdout: list[Row]
    missing: dict[str, str]

    def forget_digest(self) -> str:
        """Fingerprint of the forget rows: what makes two logs comparable."""
        return fingerprint([forget_columns(row) for row in self.forget])


class Rows(list[Row]):
    """Rows with their origin, for messages."""

    fdiv_source: Source


def _read_file(path: Path, name: str) -> Rows:
    if path.suffix == ".parquet":
        from datasets import Dataset

        rows = Rows(loaded(lambda: Dataset.from_parquet(str(path)), str(path), quiet=True).to_list())
    else:
        rows = Rows(read_csv_rows(path) if path.suffix == ".csv" else read_json_lines(path))
    return mark_source(rows, Source(name, path))


def load_rows(source: str, name: str, split: str = "train") -> Rows:
    """Rows of one configuration of a dataset.

    Args:
        source: a local folder holding `NAME.json`, `.jsonl` (JSON lines or one JSON array), `.parquet` or `.csv`, or a
            hub name.
        name: the file's stem, or the configuration on the hub.
        split: split on the hub.
    Raises:
        FileNotFoundError: the local folder has no such file, the hub dataset no such configuration (a DataError is
            raised for an unreachable one).
    """
    folder = Path(source)
    if folder.is_dir():
        for suffix in DATA_FORMATS:
            if (folder / f"{name}{suffix}").exists():
                return _read_file(folder / f"{name}{suffix}", name)
        raise FileNotFoundError(f"{folder} has no {name}{_SUFFIXES}")
    if folder.is_absolute() or source.startswith(".") or folder.suffix in DATA_FORMATS:
        raise DataError(f"data {'file' if folder.suffix in DATA_FORMATS else 'folder'} {source} does not exist")
    from datasets import load_dataset

    try:
        rows = Rows(load_dataset(source, name, split=split).to_list())
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if re.match("BuilderConfig .* not found", reason):
            raise FileNotFoundError(f"{source} has no configuration {name}") from None
        raise DataError(
            f"{source} ({name}) cannot be had from the hub: {reason}; give a local folder with --data"
        ) from None
    return mark_source(rows, Source(f"{source} ({name})"))


_SUFFIXES = f"{', '.join(list(DATA_FORMATS)[:-1])} or {list(DATA_FORMATS)[-1]}"


def _first_of(source: str, names: Sequence[str]) -> tuple[str, Rows]:
    """(name, rows) of the first of `names` that `source` has; a name may also be the path of a file.

    Raises:
        FileNotFoundError: it has none of them.
    """
    reasons = []
    for name in names:
        path = Path(name)
        if path.suffix in DATA_FORMATS:
            if not path.is_file():
                raise DataError(f"data file {name} does not exist")
            return path.stem, _read_file(path, path.stem)
        try:
            if Path(source).is_file():
                raise FileNotFoundError(f"{source} is one file of forget rows and has no set {name}")
            return name, load_rows(source, name)
        except FileNotFoundError as error:
            reasons.append(str(error))
    raise FileNotFoundError(reasons[0] + (f", nor {' or '.join(names[1:])}" if names[1:] else ""))


def _set_names(split: str, holdout: str | None, retain: str | None) -> dict[str, list[str]]:
    """Which names are looked for, by row set; the first that exists is read."""
    other = split.replace("forget", "retain")
    retains = (
        ["retain_perturbed", f"{other}_perturbed", other, "retain"]
        if other != split
        else ["retain_perturbed", "retain"]
    )
    return {
        "forget": [f"{split}_perturbed", split],
        "retain": [retain] if retain else list(dict.fromkeys(retains)),
        "ra": ["real_authors_perturbed", "real_authors"],
        "wf": ["world_facts_perturbed", "world_facts"],
        "holdout": [holdout or split.replace("forget", "holdout")],
    }


def _pairs(rows: Sequence[Row]) -> set[tuple[str, str]]:
    return {(folded(row["question"]), folded(row["answer"])) for row in rows}


def _files_of(source: str) -> str:
    """What a folder holds, for an error message."""
    names = sorted(path.name for path in Path(source).glob("*") if path.suffix in DATA_FORMATS)
    return f"; it holds {', '.join(names[:8])}: name one with --split" if names else ""


def load_tofu_rows(
    split: str, source: str = HUB_DATASET, holdout: str | None = None, retain: str | None = None
) -> TofuRows:
    """The row sets TOFU's metrics need for one forget split, or as many of them as there are.

    Args:
        split: `forget01`, `forget05`, `forget10`, or any NAME for which `NAME_perturbed` or `NAME` exists. A file is a
            split of its own, named by its stem.
        source: hub name, local folder with files as those of `locuslab/TOFU` (see `load_rows`), or a file of forget
            rows.
        holdout: name or file of the holdout set for the membership attacks; by default `forgetXX` → `holdoutXX`.
        retain: name or file of the retain set; by default `retain_perturbed`, else `retain`.
    Returns:
        All rows. Every set but the forget rows may be absent, and rows may lack `paraphrased_answer` and
        `perturbed_answer`: `missing` then says so.
    Raises:
        DataError: no forget file, a row without question or answer, a forget row that stands in the retain or holdout
        set.
    """
    if Path(source).is_file():
        split, names = Path(source).stem, _set_names(Path(source).stem, holdout, retain) | {"forget": [source]}
    else:
        names = _set_names(split, holdout, retain)
    sets: dict[str, list[Row]] = {}
    missing: dict[str, str] = {}
    for row_set, wanted in names.items():
        if row_set == "holdout" and wanted == [split]:
            sets[row_set], missing[row_set] = [], f"split {split} names no holdout set; give one with --holdout"
            continue
        try:
            name, rows = _first_of(source, wanted)
        except FileNotFoundError as error:
            if row_set == "forget":
                raise DataError(f"{error}: the forget set of split {split}{_files_of(source)}") from None
            sets[row_set], missing[row_set] = [], str(error)
            continue
        sets[row_set], reasons = checked_rows(rows, name, row_set)
        missing |= reasons
    for other in ("retain", "holdout"):
        both = _pairs(sets["forget"]) & _pairs(sets[other])
        if both:
            raise DataError(
                f"{len(both)} forget rows of {split} stand in the {other} set too, for example {min(both)[0]!r}: "
                "the two must not overlap"
            )
    return TofuRows(split=split, missing=missing, **sets)
